"""Preference files of every format and form, and what bad ones say."""

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from ctpd_nemo.data.forms import Message, PreferencePair
from ctpd_nemo.data.preferences import open_preferences
from ctpd_nemo.errors import InputError

USER = {"role": "user", "content": "Name a sea."}
ASSISTANT = {"role": "assistant", "content": "The Baltic."}
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD = {"prompt": "Name a sea.", "chosen": "The Baltic.", "rejected": "Paris."}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def content(pair: PreferencePair) -> tuple[Any, ...]:
    return pair.id, pair.prompt, pair.chosen, pair.rejected


# Every form of the same pair: one user turn, no system message.
FORMS: dict[str, dict[str, Any]] = {
    "conversational": {"prompt": [USER], "chosen": [answer("The Baltic.")], "rejected": [answer("Paris.")]},
    "ultrafeedback": {
        "prompt": "Name a sea.",
        "chosen": [USER, answer("The Baltic.")],
        "rejected": [USER, answer("Paris.")],
    },
    "implicit": {"chosen": [USER, answer("The Baltic.")], "rejected": [USER, answer("Paris.")]},
    "messages and strings": {"prompt": [USER], "chosen": "The Baltic.", "rejected": "Paris."},
    "string and messages": {"prompt": "Name a sea.", "chosen": [answer("The Baltic.")], "rejected": [answer("Paris.")]},
    "whole conversations beside a prompt": {
        "prompt": [USER],
        "chosen": [USER, answer("The Baltic.")],
        "rejected": [USER, answer("Paris.")],
    },
    "plain": GOOD,
}


def save(rows: list[dict[str, Any]], kind: str, folder: Path) -> tuple[Path, str | None]:
    """Write rows in a format; the path, and the split to read it with."""
    if kind == "jsonl":
        path = folder / "pairs.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path, None
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / "pairs.parquet", row_group_size=2)
        return folder / "pairs.parquet", None
    dataset = Dataset.from_list(rows)
    if kind == "dataset":
        dataset.save_to_disk(folder / "pairs")
        return folder / "pairs", None
    DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(folder / "splits")
    return folder / "splits", "train"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset", "dataset_dict"])
@pytest.mark.parametrize("form", FORMS)
def test_every_format_and_form_reads_as_the_same_pair(kind: str, form: str, tmp_path: Path) -> None:
    rows = [{"id": f"sea-{number}", **FORMS[form], "unused": number} for number in range(3)]
    path, split = save(rows, kind, tmp_path)
    dataset = open_preferences(path, split=split)
    expected = [
        (f"sea-{number}", (Message("user", "Name a sea."),), "The Baltic.", "Paris.") for number in range(len(rows))
    ]
    assert [content(pair) for pair in dataset] == expected
    assert dataset.text_bytes.tolist() == [[len("Name a sea."), len("The Baltic."), len("Paris.")]] * 3


def test_fingerprint_follows_content_and_not_folder_format_or_form(tmp_path: Path) -> None:
    fingerprints = set()
    for kind in ("jsonl", "parquet", "dataset", "dataset_dict"):
        for number, form in enumerate(FORMS.values()):
            folder = tmp_path / f"{kind}{number}"
            folder.mkdir()
            path, split = save([{"id": f"sea-{row}", **form} for row in range(3)], kind, folder)
            fingerprints.add(open_preferences(path, split=split).fingerprint)
    assert len(fingerprints) == 1


@pytest.mark.parametrize(
    "change", [{"id": "other"}, {"prompt": "Name a sea"}, {"chosen": "The Baltic"}, {"rejected": "Rome."}]
)
def test_fingerprint_changes_with_every_part_of_a_pair(
    change: dict[str, str], write_jsonl: Callable[..., Path]
) -> None:
    before = open_preferences(write_jsonl([{"id": "sea", **GOOD}])).fingerprint
    assert open_preferences(write_jsonl([{"id": "sea", **GOOD, **change}])).fingerprint != before


def test_several_turns_and_system_messages(write_jsonl: Callable[..., Path]) -> None:
    turns = [USER, ASSISTANT, {"role": "user", "content": "Another?"}]
    rows = [
        {"prompt": [SYSTEM, *turns], "chosen": [answer("a")], "rejected": [answer("b")]},
        {"prompt": turns, "system": "Be brief.", "chosen": "a", "rejected": "b"},
        {"prompt": [SYSTEM, USER], "chosen": [*turns[1:], answer("a")], "rejected": [*turns[1:], answer("b")]},
        {"prompt": "Another?", "chosen": [SYSTEM, *turns, answer("a")], "rejected": [SYSTEM, *turns, answer("b")]},
    ]
    for pair in open_preferences(write_jsonl(rows)):
        assert [message.role for message in pair.prompt] == ["system", "user", "assistant", "user"]
        assert [message.content for message in pair.prompt] == ["Be brief.", "Name a sea.", "The Baltic.", "Another?"]
        assert (pair.chosen, pair.rejected) == ("a", "b")


def test_an_empty_system_message_is_kept(write_jsonl: Callable[..., Path]) -> None:
    row = {**FORMS["conversational"], "prompt": [{"role": "system", "content": ""}, USER]}
    assert open_preferences(write_jsonl([row]))[0].prompt[0] == Message("system", "")


def test_text_is_kept_byte_for_byte(write_jsonl: Callable[..., Path]) -> None:
    odd = "  nul \x00, CRLF \r\n, e\u0301, \u2028, 🦙\ufffd, <|im_end|> \t"
    pair = open_preferences(write_jsonl([{"prompt": odd, "chosen": odd + "a", "rejected": odd + "b"}]))[0]
    assert pair.prompt[0].content == odd
    assert pair.chosen == odd + "a"


def test_ids_and_places_name_the_line_of_the_file(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl([b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b"", b"  \r", {**GOOD, "id": 7}, GOOD])
    pairs = open_preferences(path)
    assert [pair.id for pair in pairs] == ["pairs-1", "7", "pairs-5"]
    assert [pair.place for pair in pairs] == [f"{path}:1", f"{path}:4", f"{path}:5"]


def test_files_are_read_one_after_the_other(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    first = write_jsonl([GOOD, GOOD], "first.jsonl")
    second, _ = save([GOOD], "parquet", tmp_path)
    assert [pair.id for pair in open_preferences([first, second])] == ["first-1", "first-2", "pairs-1"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_a_dataset_can_be_sent_to_another_process(kind: str, tmp_path: Path) -> None:
    dataset = open_preferences(save([GOOD, GOOD], kind, tmp_path)[0])
    again = pickle.loads(pickle.dumps(dataset))
    assert list(again) == list(dataset)
    assert again.fingerprint == dataset.fingerprint


BAD_ROWS: dict[str, tuple[Any, str, str]] = {
    # name: row, reason, words of the message
    "malformed": (
        b'{"prompt": "a", "chosen"',
        "malformed_json",
        "malformed JSON (Expecting ':' delimiter at column 25)",
    ),
    "cut file": (b'{"prompt": "a', "malformed_json", "malformed JSON (Unterminated string starting at at column 12)"),
    "deep": (b"[" * 100_000, "malformed_json", "JSON that cannot be read"),
    "number": (b'{"id": ' + b"1" * 5000 + b"}", "malformed_json", "JSON that cannot be read"),
    "not an object": ([GOOD], "not_an_object", "JSON of type list"),
    "latin-1": (b'{"prompt": "\xe9"}', "invalid_utf8", "the byte 0xe9 at byte 12 of the line"),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "missing_field", "field 'prompt': found no such field"),
    "no chosen": ({"prompt": "a", "rejected": "b"}, "missing_field", "field 'chosen': found no such field"),
    "null": ({**GOOD, "rejected": None}, "missing_field", "field 'rejected': found null"),
    "empty prompt": ({**GOOD, "prompt": ""}, "empty_field", "field 'prompt': found no text"),
    "blank chosen": ({**GOOD, "chosen": " \n"}, "empty_field", "field 'chosen': found white space only"),
    "no messages": ({**GOOD, "chosen": []}, "empty_field", "field 'chosen': found no messages"),
    "empty message": (
        {**GOOD, "prompt": [{"role": "user", "content": ""}]},
        "empty_field",
        "field 'prompt[0]': found no text",
    ),
    "number for text": ({**GOOD, "chosen": 3}, "wrong_type", "field 'chosen': found a number"),
    "object for text": ({**GOOD, "prompt": {}}, "wrong_type", "field 'prompt': found an object"),
    "system number": ({**GOOD, "system": 3}, "wrong_type", "field 'system': found a number"),
    "boolean id": ({**GOOD, "id": True}, "wrong_type", "field 'id': found a boolean"),
    "string for message": ({**GOOD, "prompt": ["a"]}, "wrong_type", "field 'prompt[0]': found a string"),
    "sharegpt": (
        {**GOOD, "prompt": [{"from": "human", "value": "a"}]},
        "wrong_type",
        "found an object with 'from': a string, 'value': a string; expected a message",
    ),
    "null content": (
        {**GOOD, "chosen": [USER, {"role": "assistant", "content": None}]},
        "wrong_type",
        "field 'chosen[1]': found an object with 'role': a string, 'content': null",
    ),
    "tool": ({**GOOD, "prompt": [USER, {"role": "tool", "content": "x"}]}, "unknown_role", "field 'prompt[1]'"),
    "equal": ({**GOOD, "rejected": "The Baltic."}, "equal_responses", "found the text of `chosen`"),
    "user last": (
        {**FORMS["implicit"], "chosen": [USER, ASSISTANT, USER]},
        "last_turn_not_assistant",
        "field 'chosen': found role 'user' in the last turn",
    ),
    "system inside": (
        {**FORMS["conversational"], "prompt": [USER, SYSTEM]},
        "role_order",
        "field 'prompt': found roles user, system",
    ),
    "two users": ({**GOOD, "prompt": [USER, USER]}, "role_order", "found roles user, user"),
    "assistant first": ({**GOOD, "prompt": [ASSISTANT, USER]}, "role_order", "found roles assistant, user"),
    "prompt ends with assistant": ({**GOOD, "prompt": [USER, ASSISTANT]}, "role_order", "roles user, assistant"),
    "system twice": (
        {**GOOD, "system": "Hm.", "prompt": [SYSTEM, USER]},
        "role_order",
        "found roles system, system, user",
    ),
    "two prompts": (
        {"chosen": [USER, answer("a")], "rejected": [{**USER, "content": "Other?"}, answer("b")]},
        "prompt_mismatch",
        "field 'rejected': found other turns before the last one than `chosen` has",
    ),
    "foreign prompt": (
        {**FORMS["ultrafeedback"], "prompt": "Name a city."},
        "prompt_mismatch",
        "field 'prompt': found a text that is not in the conversations",
    ),
    "surrogate": (
        b'{"prompt": "ab\\ud800", "chosen": "a", "rejected": "b"}',
        "lone_surrogate",
        "field 'prompt': found the lone surrogate U+D800 at character 2",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_stops_with_its_line_and_field(name: str, write_jsonl: Callable[..., Path]) -> None:
    row, _, message = BAD_ROWS[name]
    path = write_jsonl([GOOD, row, GOOD])
    with pytest.raises(InputError) as stopped:
        open_preferences(path)
    assert str(stopped.value).startswith(f"{path}:2")
    assert message in str(stopped.value)
    assert "\n" not in str(stopped.value)


def test_bad_rows_can_be_skipped_and_are_counted(
    write_jsonl: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl([GOOD, *(row for row, _, _ in BAD_ROWS.values()), GOOD])
    with caplog.at_level(logging.WARNING, "ctpd_nemo"):
        dataset = open_preferences(path, on_bad="skip")
    assert [pair.place for pair in dataset] == [f"{path}:1", f"{path}:{len(BAD_ROWS) + 2}"]
    reasons = [reason for _, reason, _ in BAD_ROWS.values()]
    assert dict(dataset.skipped) == {reason: reasons.count(reason) for reason in reasons}
    assert f"Skipped {len(BAD_ROWS)} of {len(BAD_ROWS) + 2} rows" in caplog.text
    assert f"{path}:2" in caplog.text


def test_a_bad_parquet_row_stops_with_its_number(tmp_path: Path) -> None:
    path, _ = save([GOOD, {**GOOD, "chosen": None}], "parquet", tmp_path)
    with pytest.raises(InputError, match=r"pairs\.parquet:2, field 'chosen': found null"):
        open_preferences(path)


def test_invalid_utf8_in_parquet_is_found(tmp_path: Path) -> None:
    broken = pa.array([b"\xe9"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": ["a"], "chosen": broken, "rejected": ["b"]}), tmp_path / "p.parquet")
    with pytest.raises(InputError, match="expected UTF-8"):
        open_preferences(tmp_path / "p.parquet")


def test_a_file_that_shrinks_while_it_is_used_stops_with_its_line(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl([GOOD, GOOD])
    dataset = open_preferences(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"pairs\.jsonl:2: found malformed JSON"):
        dataset[1]


def test_unusable_paths_say_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\n")
    (tmp_path / "fake.parquet").write_text("no")
    (tmp_path / "bad.jsonl").write_text("{}\n")
    (tmp_path / "folder").mkdir()
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    for name, message in {
        "absent.jsonl": "absent.jsonl: found no such file or folder",
        "empty.jsonl": "empty.jsonl: found no rows",
        "empty.parquet": "empty.parquet: found no rows",
        "pairs.csv": "pairs.csv: found the extension '.csv'; expected a .jsonl file",
        "fake.parquet": "fake.parquet: found a file Arrow cannot read",
        "folder": "found a folder without state.json or dataset_dict.json",
    }.items():
        with pytest.raises(InputError) as stopped:
            open_preferences(tmp_path / name)
        assert message in str(stopped.value)
    with pytest.raises(InputError, match="no usable pair in 1 rows; the first"):
        open_preferences(tmp_path / "bad.jsonl", on_bad="skip")
    with pytest.raises(InputError, match="at least one preference file"):
        open_preferences([])


def test_a_split_must_be_named_and_be_there(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    path, _ = save([GOOD], "dataset_dict", tmp_path)
    with pytest.raises(InputError, match="found the splits train, test and none asked for"):
        open_preferences(path)
    with pytest.raises(InputError, match="found no split 'dev'; expected one of train, test"):
        open_preferences(path, split="dev")
    with pytest.raises(InputError, match="none of the given paths holds named splits"):
        open_preferences(write_jsonl([GOOD]), split="train")


def test_real_preferences_read_as_the_json_in_the_file(shared_dir: Path) -> None:
    path = shared_dir / "preferences" / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    dataset = open_preferences(path)
    assert len(dataset) == len(rows) == 435
    for pair, row in zip(dataset, rows, strict=True):
        assert pair.id == row["id"]
        assert [(message.role, message.content) for message in pair.prompt] == [
            (message["role"], message["content"]) for message in row["prompt"]
        ]
        assert (pair.chosen, pair.rejected) == (row["chosen"][0]["content"], row["rejected"][0]["content"])
