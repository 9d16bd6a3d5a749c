"""What a stranger's ``tokenizer.json`` does with a few texts, tried in a process of its own that may die of it.

A script: it imports the standard library and ``tokenizers``, which takes 40 ms, and reads its arguments as one JSON
object: ``path`` (``sys.path``), ``folder``, ``bytes`` and ``seconds`` (limits of memory and CPU), ``whole`` (also load
it as ``transformers`` does, which takes seconds) and ``model`` (the same where its model is of another kind). It prints
a JSON object: ``unread`` is why it cannot be read, ``fault`` what is wrong with it.
"""

import base64
import json
import re
import resource
import sys
import time
import unicodedata
from collections.abc import Iterator
from typing import Any

# Real normalizers write at most three characters for one, those of Unicode up to 18, templates each sequence once.
MOST_GROWTH = 16
MOST_UNICODE_GROWTH = 32
MOST_COPIES = 4
# Real ones add tens of thousands at most, for speech. Of many, what ``transformers`` makes is tried, too.
MOST_ADDED, MANY_ADDED = 100_000, 10_000
# A text of so many characters, and CPU seconds for all of them. Real tokenizers take a hundredth.
LENGTH = 4096
SECONDS = 10.0
_SCRIPTS = "aZ 0.,'\n\t-_(&é中か한ไ🦙́"


def main() -> None:
    """Say on standard output what is wrong."""
    given = json.loads(sys.argv[1])
    sys.path[:] = given["path"]
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_CPU, given["seconds"])
    _limit_memory(given["bytes"])
    print(json.dumps(dict(zip(("unread", "fault"), _try_out(given), strict=True))))


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _limit_memory(size: int) -> None:
    """Let the process have so many more bytes than it has."""
    with open("/proc/self/statm") as statistics:
        has = int(statistics.read().split()[0]) * resource.getpagesize()
    _limit(resource.RLIMIT_AS, has + size)


def _try_out(given: dict[str, Any]) -> tuple[str | None, str | None]:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(f"{given['folder']}/tokenizer.json")
    except BaseException as error:
        return _said(error), None
    added = len(tokenizer.get_added_tokens_decoder())
    if added > MOST_ADDED:
        return None, f"{added:,} added tokens"
    if given["whole"] or added > MANY_ADDED or given["model"] not in ("", type(tokenizer.model).__name__):
        # Imports map far more than they use.
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        from ctpd_nemo.data.tokenizer_folder import read_tokenizer

        _limit_memory(given["bytes"])
        try:
            read_tokenizer(given["folder"])
        except BaseException as error:
            return _said(error), None
    return None, _fault(tokenizer)


def _said(error: BaseException) -> str:
    """What a library says of a file that it cannot read. A limit is no saying; a panic of Rust is no ``Exception``."""
    if isinstance(error, MemoryError) or not (isinstance(error, Exception) or _panicked(error)):
        raise error
    return " ".join(str(error).split()) or type(error).__name__


def _panicked(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


def _fault(tokenizer: Any) -> str | None:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    kinds = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    parts = {kind: list(_parts(getattr(tokenizer, kind))) for kind in kinds}
    fault = _growth(parts["normalizer"], "normalizer") or _growth(parts["decoder"], "decoder")
    fault = fault or _copies(parts["post_processor"])
    longest = max(map(len, tokenizer.get_vocab()), default=0)
    if longest > LENGTH:
        fault = fault or f"a token of {longest:,} characters"
    return fault or _of_model(tokenizer.model) or _work(tokenizer, list(_texts(parts)))


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """The parts of a normalizer and its like, sequences flattened."""
    left = [] if part is None else [json.loads(part.__getstate__())]
    while left:
        state = left.pop(0)
        inner = [state.get(key) for key in ("normalizers", "pretokenizers", "processors", "decoders")]
        if any(inner):
            left = next(filter(None, inner)) + left
        else:
            yield state


def _growth(parts: list[dict[str, Any]], kind: str) -> str | None:
    """How many characters one may become, by what each part can write at most."""
    growth = 1.0
    for part in parts:
        if part["type"] == "Replace":
            ((how, pattern),) = part["pattern"].items()
            growth *= max(1.0, len(part["content"]) / (len(pattern) if how == "String" and pattern else 1))
        elif part["type"] == "Precompiled":
            growth *= max(1.0, _longest_replacement(part["precompiled_charsmap"]) / MOST_UNICODE_GROWTH)
        elif part["type"] == "Prepend" and len(part["prepend"]) > MOST_GROWTH:
            return f"a {kind} that puts {len(part['prepend']):,} characters before a text"
    if growth > MOST_GROWTH:
        return f"a {kind} that may make {growth:,.0f} characters of one"
    return None


def _longest_replacement(charsmap: str) -> int:
    """Bytes of the longest text that a SentencePiece normalizer writes: they lie behind its trie, ended by zeros."""
    content = base64.b64decode(charsmap)
    trie = int.from_bytes(content[:4], "little")
    return max(map(len, content[4 + trie :].split(b"\0")))


def _copies(parts: list[dict[str, Any]]) -> str | None:
    for part in parts:
        pieces = [*part.get("single", ()), *part.get("pair", ())]
        copies = sum("Sequence" in piece for piece in pieces)
        if copies > MOST_COPIES:
            return f"a post-processor that writes a text {copies:,} times"
    return None


def _texts(parts: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Texts on which work shows that grows faster than a text: runs, mixtures, and what the tokenizer looks for."""
    yield "The quick brown fox's 12 jumps over 345 lazy dogs, e.g. naïve ones.\n\n" * (LENGTH // 64)
    yield "".join(chr(code) for code in range(32, 0x3000, 7) if unicodedata.category(chr(code)) != "Cn")
    yield " \n\t" * (LENGTH // 3)
    for character in _SCRIPTS:
        yield character * LENGTH + "!x"
    for part in (part for kind in parts.values() for part in kind):
        pattern = part.get("pattern")
        if isinstance(pattern, dict):
            ((how, content),) = pattern.items()
            yield (content * (LENGTH // max(1, len(content)) + 1))[:LENGTH]
            if how == "Regex":
                for character in dict.fromkeys(re.sub(r"\\.|[^\w\s]", "", content)[:64]):
                    yield character * LENGTH + "!"
                    yield f"{character}{character}b" * (LENGTH // 3)


def _of_model(model: Any) -> str | None:
    if getattr(model, "dropout", None):
        return f"a BPE model with dropout {model.dropout}, which draws its tokens at random"
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        affix = getattr(model, name, None) or ""
        if len(affix) > MOST_GROWTH:
            return f"a model that adds {len(affix):,} characters to each word ({name})"
    if getattr(model, "max_input_chars_per_word", 0) > LENGTH:
        return f"a model that looks for pieces in words of {model.max_input_chars_per_word:,} characters"
    return None


def _work(tokenizer: Any, texts: list[str]) -> str | None:
    began = time.process_time()
    for text in texts:
        try:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            written = len(tokenizer.decode(ids[:LENGTH], skip_special_tokens=False))
        except MemoryError:
            raise
        except Exception:  # of this text alone: a character that the vocabulary lacks
            continue
        except BaseException as error:
            if not _panicked(error):
                raise
            return f"a panic ({error}) on a text of {len(text):,} characters"
        size = len(text.encode())
        if len(ids) > MOST_GROWTH * MOST_UNICODE_GROWTH * size:
            return f"{len(ids):,} tokens of a text of {size:,} bytes"
        if written > MOST_GROWTH * MOST_UNICODE_GROWTH * size:
            return f"{written:,} characters decoded of a text of {size:,} bytes"
        if time.process_time() - began > SECONDS:
            return f"more than {SECONDS:g} CPU seconds for texts of {LENGTH:,} characters"
    return None


if __name__ == "__main__":
    main()
