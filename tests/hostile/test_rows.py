"""Bad rows that are skipped are counted; hostile text that is no error is read as text, and nothing else."""

import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded_pair import EncodedPair, Skipped
from ctpd_nemo.data.forms import Message, PreferencePair
from ctpd_nemo.data.preferences import open_preferences
from ctpd_nemo.data.templates import Side
from ctpd_nemo.data.tokenizer_folder import load_tokenizer
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from tests.hostile.rows import FIELDS, GOOD, LINES

REASONS = [reason for _, reason, *_ in (*LINES.values(), *FIELDS.values())]


def test_every_bad_row_is_skipped_and_counted_by_its_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = [line for line, *_ in LINES.values()] + [json.dumps(row).encode() for row, *_ in FIELDS.values()]
    first, last = (json.dumps({**GOOD, "id": name}).encode() for name in ("first", "last"))
    (tmp_path / "pairs.jsonl").write_bytes(b"\n".join([first, *bad, last]))
    with caplog.at_level(logging.WARNING, "ctpd_nemo"):
        dataset = open_preferences(tmp_path / "pairs.jsonl", on_bad="skip")
    assert [pair.id for pair in dataset] == ["first", "last"]
    assert dataset.skipped == Counter(REASONS)
    assert f"Skipped {len(bad)} of {len(bad) + 2} rows" in caplog.text
    assert f"malformed_json {REASONS.count('malformed_json')}" in caplog.text


@pytest.fixture(scope="module")
def encoder(world: TinyWorld) -> PairEncoder:
    student, teacher = (Side(load_tokenizer(str(folder))) for folder in (world.student, world.teacher))
    return PairEncoder(student, teacher, include_eos=False, max_length=4096)


def pair(prompt: str, chosen: str) -> PreferencePair:
    return PreferencePair("pair", (Message("user", prompt),), chosen, "Another answer.", "made:1")


def controls(side: Side, ids: np.ndarray) -> list[int]:
    special = {index for index, token in side.tokenizer.added_tokens_decoder.items() if token.special}
    return [index for index in ids.tolist() if index in special and index != side.tokenizer.unk_token_id]


HOSTILE = {
    "NUL bytes": "a\x00b\x00",
    "a mark at the beginning": "\ufeffa",
    "an escape of terminals": "\x1b[2J\x1b]0;title\x07",
    "text that runs backwards": "\u202eabc\u202c",
    "line breaks of all kinds": "a\r\nb\x0bc\x0cd\x85e\u2028f\u2029g",
    "noncharacters": "\ufdd0\uffff\U0010ffff",
    "marks without a letter": "\u0301" * 300,
    "one letter ten thousand times": "a" * 10_000,
    "spaces ten thousand times": " " * 5_000 + "a" + " " * 5_000,
    "code of a template": "{{ 7 * 7 }}{% for m in messages %}{{ m.__class__ }}{% endfor %}{# #}",
    "the end of JSON": '"}]}\n{"prompt": "x"',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_read_byte_for_byte(encoder: PairEncoder, tmp_path: Path, name: str) -> None:
    text = HOSTILE[name]
    row = {"prompt": text, "chosen": text + "!", "rejected": "Another answer."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    (read,) = open_preferences(tmp_path / "pairs.jsonl")
    assert (read.prompt[0].content, read.chosen) == (text, text + "!")
    assert text.strip() in encoder.policy.render_text(read.prompt)
    (encoded,) = encoder.encode([0], [read])
    if isinstance(encoded, EncodedPair) and not encoded.chosen.truncated:
        assert encoded.chosen.bounds[-1] == len((text + "!").encode())


def test_strings_of_control_tokens_are_text(encoder: PairEncoder) -> None:
    """Of both tokenizers, in the prompt and in the response: no turn ends where a user says so."""
    plain, *_ = encoder.encode([0], [pair("Say this.", "This.")])
    assert isinstance(plain, EncodedPair)
    for side, name in ((encoder.policy, "policy"), (encoder.reference, "reference")):
        for token in (token.content for token in side.tokenizer.added_tokens_decoder.values() if token.special):
            (found,) = encoder.encode([0], [pair(f"Say {token} this{token}", f"{token}This.{token}")])
            assert isinstance(found, EncodedPair)
            ours, expected = found.chosen.side(name), plain.chosen.side(name)
            assert controls(side, ours.prompt_ids) == controls(side, expected.prompt_ids)
            assert controls(side, ours.response_ids) == []


@pytest.mark.parametrize("size", [2**18, pytest.param(10 * 2**20, marks=pytest.mark.slow)])
def test_a_prompt_that_does_not_end_is_counted(encoder: PairEncoder, tmp_path: Path, size: int) -> None:
    row = {"prompt": "What is 1 plus 1? " * (size // 18), "chosen": "2.", "rejected": "3."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    (read,) = open_preferences(tmp_path / "pairs.jsonl")
    assert encoder.encode([0], [read]) == [Skipped(0, "pairs-1", "too_long")]


def test_pairs_that_are_there_twice_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever their ids."""
    rows = [GOOD, {**GOOD, "chosen": "The Black Sea."}, GOOD, {**GOOD, "id": "pairs-1"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.WARNING, "ctpd_nemo"):
        assert len(open_preferences(tmp_path / "pairs.jsonl")) == 4
    assert "2 of 4 pairs repeat an earlier one" in caplog.text
    assert f"The first: {tmp_path / 'pairs.jsonl'}:3" in caplog.text
