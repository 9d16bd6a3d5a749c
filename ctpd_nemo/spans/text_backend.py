"""A private copy of a fast tokenizer that encodes plain text and nothing else.

The caller's tokenizer carries state that must not leak into alignment, and that alignment must not touch: padding,
truncation, a post-processor that adds special tokens or trims offsets, and special tokens that match inside the text.
The copy is made once from the backend's own JSON, with those parts taken out.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from ctpd_nemo.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JsonDict = dict[str, Any]


def fast_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return the Rust tokenizer inside a Hugging Face fast tokenizer; raise InputError if there is none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise InputError(_place(tokenizer), f"a {type(tokenizer).__name__}", "a Hugging Face fast tokenizer")
    return backend


def description(tokenizer: PreTrainedTokenizerBase) -> str:
    """All that the backend is made of, as JSON; raise InputError if its parts cannot be written so."""
    try:
        return fast_backend(tokenizer).to_str()
    except InputError:
        raise
    except Exception as error:  # the Rust side raises a bare Exception for parts written in Python
        found = f"parts that cannot be copied ({error})"
        raise InputError(_place(tokenizer), found, "a tokenizer that can be saved") from error


def text_backend(tokenizer: PreTrainedTokenizerBase) -> tuple[Tokenizer, JsonDict]:
    """Copy the backend of ``tokenizer`` into one that reads every string as ordinary text.

    The copy has no padding, truncation, post-processor or BPE dropout, and no text can make it give the id of a special
    token, even where the model's own vocabulary holds the token's string (Unigram, WordPiece). Added tokens that are
    not special keep working. The one exception is a special token of a single character: it may belong to the model's
    alphabet, so it stays what the model makes of it.

    Args:
        tokenizer: a Hugging Face fast tokenizer; it is only read.

    Returns:
        The copy, and the JSON description it was made from.

    Raises:
        InputError: the tokenizer is not a fast one, or its parts cannot be written as JSON.
    """
    spec: JsonDict = json.loads(description(tokenizer))
    spec["padding"] = spec["truncation"] = spec["post_processor"] = None
    if spec["model"]["type"] == "BPE":
        spec["model"]["dropout"] = None
    _make_special_tokens_unreachable(spec, set(tokenizer.all_special_tokens))
    copy = Tokenizer.from_str(json.dumps(spec))
    copy.encode_special_tokens = True
    for token in spec["added_tokens"]:
        if copy.token_to_id(token["content"]) != token["id"]:
            found = f"added token {token['content']!r} at id {token['id']}"
            raise InputError(_place(tokenizer), found, "added tokens whose ids have no gap")
    return copy, spec


def _place(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"tokenizer {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}"


def components(part: JsonDict | None) -> Iterator[JsonDict]:
    """Yield the parts of a normalizer, pre-tokenizer or decoder in order, sequences flattened; nothing for None."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
    for key in ("normalizers", "pretokenizers", "decoders"):
        for inner in part.get(key, ()):
            yield from components(inner)


def _make_special_tokens_unreachable(spec: JsonDict, role_tokens: Collection[str]) -> None:
    """Mark role tokens as special, and give every special piece of the model's vocabulary a name no text contains.

    ``encode_special_tokens`` stops added tokens from matching; it does not stop the model itself. A Unigram model takes
    ``</s>`` from its vocabulary as one piece, a WordLevel model ``[SEP]``, a BPE model what its merges can build.
    """
    special = set(role_tokens)
    for token in spec["added_tokens"]:
        token["special"] = token["special"] or token["content"] in special
        if token["special"]:
            special.add(token["content"])
    unguessable = uuid.uuid4().hex
    renamed = {content: f"{unguessable}{content}" for content in special if len(content) > 1}

    model = spec["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {renamed.get(piece, piece): index for piece, index in model["vocab"].items()}
        model["unk_token"] = renamed.get(model.get("unk_token"), model.get("unk_token"))
    else:
        model["vocab"] = [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]
    if model["type"] == "BPE":
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if left not in renamed and right not in renamed and left + right.removeprefix(prefix) not in renamed
        ]
    for token in spec["added_tokens"]:
        token["content"] = renamed.get(token["content"], token["content"])
