"""Tokenizers from folders of others."""

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ctpd_nemo.data.folder_files import LARGEST, check_files, read_config
from ctpd_nemo.data.limited_process import LimitError, run_limited
from ctpd_nemo.errors import InputError
from ctpd_nemo.json_files import read_object

_PROBE = Path(__file__).with_name("tokenizer_probe.py")
# A real tokenizer takes a second or two, and a few hundred MB.
_SECONDS, _BYTES = 60, 4 * 2**30
# Classes that take vocabulary, merges and special tokens of their files and nothing that grows beyond; the first two
# whatever the model, the others a BPE.
_ANY_MODEL = ("PreTrainedTokenizer", "TokenizersBackend")
_BPE_MODEL = ("LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer")
_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "starcoder2")
_PLAIN_BYTES, _PLAIN_NUMBER, _PLAIN_ENTRIES = 512 * 1024, 2**20, 5000
_BIG_NUMBERS = ("model_max_length", "max_position_embeddings", "sliding_window", "rope_theta")
# Contents that were tried, by their digest.
_tried: set[bytes] = set()


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """A tokenizer from a local folder; no code of the folder is run.

    What its files cost is tried first, once for each content, in a process that may die of it.

    Raises:
        InputError: There is none, it cannot be read, or it takes more time or memory than tokenizers do.
    """
    if not (Path(folder) / "tokenizer.json").is_file():
        found = "no tokenizer.json" if Path(folder).is_dir() else "no such folder"
        raise InputError(folder, found, "a folder with a Hugging Face fast tokenizer (tokenizer.json)")
    _try_out(folder)
    with _reading(folder):
        return read_tokenizer(folder)


def read_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The same of a folder that was tried, with whatever errors its readers have."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _try_out(folder: str) -> None:
    files = check_files(folder)
    if Path(folder) / "config.json" in files:
        read_config(folder)
    digest = hashlib.blake2b(digest_size=32)
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    if digest.digest() in _tried:
        return
    needs = _needs(Path(folder))
    whole = needs is None or any(path.name == "tekken.json" for path in files)
    place = str(Path(folder) / "tokenizer.json")
    try:
        verdict = run_limited(_PROBE, _SECONDS, _BYTES, folder=folder, whole=whole, model=needs)
    except LimitError as error:
        found = f"a tokenizer that a process of its own does not survive ({error})"
        raise InputError(place, found, "one that takes a second or two") from error
    if verdict["unread"] is not None:
        raise InputError(folder, f"a tokenizer that cannot be read ({verdict['unread']})", "a Hugging Face tokenizer")
    if verdict["fault"] is not None:
        raise InputError(place, verdict["fault"], "a tokenizer whose work grows with the text alone")
    _tried.add(digest.digest())


def _needs(folder: Path) -> str | None:
    """The kind of model with which the folder is a plain one, ``""`` for any; ``None`` where it is none by its configs.

    What is not plain ``transformers`` may make much of, as of ``num_labels`` or ``extra_ids``.
    """
    configs = {}
    for name in ("tokenizer_config.json", "config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).exists():
            configs[name] = read_object(folder / name, largest=LARGEST[name])
            if (folder / name).stat().st_size > _PLAIN_BYTES or not _is_plain(configs[name]):
                return None
    own = configs.get("tokenizer_config.json", {})
    if "init_inputs" in own or configs.get("config.json", {}).get("model_type", "llama") not in _MODEL_TYPES:
        return None
    kind = own.get("tokenizer_class") or configs.get("config.json", {}).get("tokenizer_class") or "LlamaTokenizer"
    kind = str(kind).removesuffix("Fast")
    return "" if kind in _ANY_MODEL else "BPE" if kind in _BPE_MODEL else None


def _is_plain(config: dict[str, Any]) -> bool:
    left: list[Any] = [config]
    while left:
        item = left.pop()
        if len(item) > _PLAIN_ENTRIES:
            return False
        pairs = item.items() if isinstance(item, dict) else enumerate(item)
        for key, value in pairs:
            if isinstance(value, dict | list):
                left.append(value)
            elif isinstance(value, int | float) and not value <= _PLAIN_NUMBER and key not in _BIG_NUMBERS:
                return False
    return True


@contextlib.contextmanager
def _reading(folder: str) -> Iterator[None]:
    try:
        yield
    # Parsers of several libraries, each with errors of its own; a panic of one in Rust is no ``Exception``.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(folder, f"a tokenizer that cannot be read ({reason})", "a Hugging Face tokenizer") from error
