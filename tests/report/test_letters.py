"""Every byte is shown, and nothing that is shown acts."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctpd_nemo.report.letters import Part, plain, readable, without_surrogates


def bytes_of(parts: list[Part]) -> bytes:
    """What parts stand for, read back."""
    signs = {"\u00b7": b" ", "\u2192": b"\t", "\u21b5": b"\n"}
    data = b""
    for part in parts:
        if part.kind == "bytes":
            data += bytes.fromhex(part.text)
        elif part.kind == "code":
            data += chr(int(part.text[2:], 16)).encode()
        elif part.kind == "space":
            data += signs[part.text]
        else:
            data += part.text.removeprefix("\u25cc").encode()
    return data


@given(st.binary())
def test_all_bytes_can_be_read_back(data: bytes) -> None:
    # A text may hold the dotted circle itself.
    if "\u25cc" not in data.decode(errors="replace"):
        assert bytes_of(readable(data)) == data


@given(st.text())
def test_no_character_that_acts_is_shown_as_it_is(text: str) -> None:
    for part in readable(text.encode("utf-8", "replace")):
        for char in part.text:
            assert char == "\u200d" or unicodedata.category(char)[0] not in "CZ" or part.text == "end of turn", part


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"", ""),
        (b"a b\tc\n", "a\u00b7b\u2192c\u21b5"),
        ("\u202eabc\x00".encode(), "[U+202E]abc[U+0000]"),
        ("\U0001f999".encode()[:2], "[F0 9F]"),
        ("\U0001f999".encode()[2:] + b"x", "[A6 99]x"),
        (b" \xf0\x9f", "\u00b7[F0 9F]"),
        ("\u0301".encode(), "\u25cc\u0301"),
        ("e\u0301".encode(), "e\u0301"),
        ("\u200d\U0001f469".encode(), "[U+200D]\U0001f469"),
        ("\U0001f468\u200d\U0001f469".encode(), "\U0001f468\u200d\U0001f469"),
        ("a\u200db".encode(), "a[U+200D]b"),
        ("\ufe0f".encode(), "[U+FE0F]"),
        ("\u2764\ufe0f".encode(), "\u2764\ufe0f"),
        ("\u3000".encode(), "[U+3000]"),
    ],
)
def test_what_is_shown(data: bytes, shown: str) -> None:
    assert plain(readable(data)) == shown


def test_lone_surrogates_become_replacement_characters() -> None:
    assert without_surrogates("a\ud800b\udfffc\U0001f642") == ("a\ufffdb\ufffdc\U0001f642", 2)
