"""The bytes that each token id stands for.

Byte-level BPE writes every byte as one printable character (GPT-2's alphabet). SentencePiece-style models write a space
as a meta symbol (U+2581) and, where they have no piece, fall back to single bytes written ``<0xF0>``.
"""

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from ctpd_nemo.spans.text_backend import JsonDict, components

# What an id of unknown bytes spells: a byte that UTF-8 never uses, so that no text is ever spelled with it.
UNKNOWN_BYTES = b"\xff"

BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, slots=True)
class PieceTable:
    """The bytes of every token id, end to end in one buffer.

    Attributes:
        buffer: uint8, the bytes of all pieces in id order.
        starts: int64 [n_ids], where each id's bytes begin in ``buffer``.
        lengths: int64 [n_ids], how many bytes each id stands for, at least 1; an id whose bytes are not known (the
            unknown token, a gap) stands for ``UNKNOWN_BYTES``.
        dropped_bytes: the bytes that a byte-level model has no token for, not even an unknown one; it skips them.
    """

    buffer: NDArray[np.uint8]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    dropped_bytes: bytes

    def spell(self, ids: NDArray[np.int64]) -> tuple[bytes, NDArray[np.int64]]:
        """Join the bytes that ``ids`` [n] stand for; return them and the int64 [n + 1] positions between the ids."""
        lengths = self.lengths[ids]
        bounds = np.zeros(len(ids) + 1, dtype=np.int64)
        lengths.cumsum(out=bounds[1:])
        # Byte j of the result is buffer[starts[id] + (j - begin of that id in the result)].
        source = (self.starts[ids] - bounds[:-1]).repeat(lengths)
        source += np.arange(len(source))
        return self.buffer.take(source).tobytes(), bounds


def piece_table(backend: Tokenizer, spec: JsonDict) -> PieceTable:
    """Read the bytes of every token id from a tokenizer and its JSON description (see ``text_backend``)."""
    meta_symbol = _meta_symbol(spec)
    byte_level = any(part["type"] == "ByteLevel" for key in _PARTS for part in components(spec[key]))
    added = {token["id"]: token["content"].encode() for token in spec["added_tokens"] if not token["special"]}
    unknown = {token["id"] for token in spec["added_tokens"] if token["special"]}
    unknown.add(_unknown_token_id(backend, spec))

    pieces = [UNKNOWN_BYTES] * (max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1)
    for piece, index in backend.get_vocab(with_added_tokens=False).items():
        if index not in unknown:
            text = _without_affixes(piece, spec["model"])
            known = _byte_level_bytes(text) if byte_level else _text_bytes(text, spec["model"], meta_symbol)
            pieces[index] = known or UNKNOWN_BYTES
    for index, content in added.items():
        pieces[index] = content

    lengths = np.array([len(piece) for piece in pieces], dtype=np.int64)
    buffer = np.frombuffer(b"".join(pieces), dtype=np.uint8)
    skips = byte_level and model_letters(spec) is not None
    dropped_bytes = bytes(set(range(256)) - {piece[0] for piece in pieces if len(piece) == 1}) if skips else b""
    return PieceTable(buffer, np.cumsum(lengths) - lengths, lengths, dropped_bytes)


def model_letters(spec: JsonDict) -> frozenset[str] | None:
    """The characters that the model has a token for, if it skips all others in silence; None if it skips none."""
    model = spec["model"]
    if model["type"] != "BPE" or model["unk_token"] is not None:
        return None
    letters = frozenset(text for piece in model["vocab"] if len(text := _without_affixes(piece, model)) == 1)
    has_all_bytes = letters.issuperset(map(chr, _BYTE_LEVEL_ALPHABET)) or (
        model["byte_fallback"] and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    )
    return None if has_all_bytes else letters


_PARTS = ("normalizer", "pre_tokenizer", "decoder")


def _meta_symbol(spec: JsonDict) -> str | None:
    """The character that stands for a space in the pieces (U+2581 in SentencePiece), or None."""
    for part in components(spec["pre_tokenizer"]):
        if part["type"] == "Metaspace":
            return str(part["replacement"])
    for part in components(spec["normalizer"]):
        if part["type"] == "Replace" and part["pattern"] == {"String": " "} and len(part["content"]) == 1:
            return str(part["content"])
    return None


def _unknown_token_id(backend: Tokenizer, spec: JsonDict) -> int | None:
    model = spec["model"]
    if model["type"] == "Unigram":
        return model["unk_id"]
    return None if model.get("unk_token") is None else backend.token_to_id(model["unk_token"])


def _without_affixes(piece: str, model: JsonDict) -> str:
    """Drop the marks that say where in a word a piece stands (``##ing`` of WordPiece, ``ing</w>`` of some BPE)."""
    piece = piece.removeprefix(model.get("continuing_subword_prefix") or "")
    return piece.removesuffix(model.get("end_of_word_suffix") or "")


def _text_bytes(piece: str, model: JsonDict, meta_symbol: str | None) -> bytes:
    byte_piece = BYTE_PIECE.fullmatch(piece) if model.get("byte_fallback") else None
    if byte_piece:
        return bytes([int(byte_piece[1], 16)])
    return (piece.replace(meta_symbol, " ") if meta_symbol else piece).encode()


def _byte_level_alphabet() -> dict[int, int]:
    """Code point to byte in GPT-2's alphabet: printable Latin-1 stands for itself, other bytes from U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {0x100 + order: byte for order, byte in enumerate(others)}


_BYTE_LEVEL_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(piece: str) -> bytes:
    """The bytes of a piece written in GPT-2's alphabet; empty where it holds any other character."""
    try:
        return piece.translate(_BYTE_LEVEL_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:
        return b""
