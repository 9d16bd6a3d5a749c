"""What a row holds beside its text is rendered as transformers renders it, or the row is refused for a reason."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from ctpd_nemo.data.chat_template import RefusedConversationError
from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded_pair import FAULTS, EncodedPair, Skipped
from ctpd_nemo.data.preferences import open_preferences
from ctpd_nemo.data.templates import Side
from tests.data.conversations import CONVERSATIONS, TEMPLATES, Oracle, rows

LONG = 4096


def encoder_of(tokenizer: PreTrainedTokenizerFast, *templates: str, on_bad: str = "skip") -> PairEncoder:
    sides = [Side(tokenizer, template) for template in templates]
    return PairEncoder(sides[0], sides[1] if len(sides) > 1 else None, True, LONG, on_bad=on_bad)


def text(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_row_is_read_as_transformers_writes_it_or_refused_and_counted(
    name: str, bpe_tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path]
) -> None:
    """Every conversation in every form; one form of a conversation is used if and only if all are."""
    encoder, oracle = encoder_of(bpe_tokenizer, TEMPLATES[name]), Oracle(bpe_tokenizer, TEMPLATES[name])
    written = list(rows())
    path = write_jsonl([{"id": number, **row} for number, (*_, row) in enumerate(written)])
    dataset = open_preferences(path, on_bad="skip", kept=encoder.kept)
    results = {int(pair.id): pair for pair in encoder.encode(range(len(dataset)), dataset[:])}
    kept: Counter[str] = Counter()
    for number, (conversation, form, whole, _) in enumerate(written):
        expected, found = oracle.expected(whole), results.get(number)
        what = f"{conversation}, {form}: {found}"
        assert isinstance(found, EncodedPair) == (expected is not None), what
        if isinstance(found, EncodedPair) and expected is not None:
            prompt, *responses = expected
            for response, side in zip(responses, (found.chosen, found.rejected), strict=True):
                asked, answered = (
                    text(bpe_tokenizer, ids) for ids in (side.policy.prompt_ids, side.policy.response_ids[:-1])
                )
                # What a template opens every response with is no part of it, unless reasoning stands in it.
                block = "<think></think>" if name.startswith("a block") and "<think>" not in response else ""
                assert (asked, answered) == (prompt + block, response), what
            kept["used"] += 1
        else:
            kept[found.reason if isinstance(found, Skipped) else "no pair"] += 1
    assert sum(kept.values()) == len(written)
    assert kept["no pair"] == dataset.skipped.total()
    assert set(kept) <= {"used", "no pair", *FAULTS}
    assert kept["used"]


def test_control_tokens_in_tools_and_fields_are_text(bpe_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    encoder = encoder_of(bpe_tokenizer, TEMPLATES["tools"])
    special = [bpe_tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")]
    counts = []
    for name in ("tools", "control tokens in tools"):
        whole = CONVERSATIONS[name]
        row = {"prompt": whole.prompt, "chosen": [whole.chosen], "rejected": [whole.rejected], **whole.columns}
        (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
        dataset = open_preferences(tmp_path / "pairs.jsonl", kept=encoder.kept)
        (pair,) = encoder.encode([0], dataset[:])
        assert isinstance(pair, EncodedPair)
        counts.append([int((pair.chosen.policy.prompt_ids == index).sum()) for index in special])
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "name", ["tools", "a call to be made", "reasoning", "a name", "documents", "a call and its result"]
)
def test_a_field_that_means_something_stops_a_run_by_file_row_and_field(
    name: str, bpe_tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path]
) -> None:
    encoder = encoder_of(bpe_tokenizer, TEMPLATES["plain"], on_bad="stop")
    whole, plain = CONVERSATIONS[name], CONVERSATIONS["text"]
    written = [
        {"prompt": one.prompt, "chosen": [one.chosen], "rejected": [one.rejected], **one.columns}
        for one in (plain, whole, plain)
    ]
    dataset = open_preferences(write_jsonl(written), kept=encoder.kept)
    assert dataset.first_of_kinds == [1]
    with pytest.raises(RefusedConversationError, match=r"pairs\.jsonl:2") as stopped:
        encoder.encode(range(3), dataset[:])
    assert "\n" not in str(stopped.value)
    assert stopped.value.reason in FAULTS


def test_both_sides_must_render_what_means_something_and_write_one_response(
    bpe_tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path]
) -> None:
    whole = CONVERSATIONS["reasoning"]
    path = write_jsonl([{"prompt": whole.prompt, "chosen": [whole.chosen], "rejected": [whole.rejected]}])
    other_words = TEMPLATES["reasoning"].replace("<think>", "<thought>")
    for templates, reason in (
        (("reasoning", "reasoning"), ""),
        (("reasoning", "plain"), "unread_field"),
        (("plain", "reasoning"), "unread_field"),
        (("reasoning", other_words), "rewritten_by_template"),
    ):
        encoder = encoder_of(bpe_tokenizer, *(TEMPLATES.get(name, name) for name in templates))
        (found,) = encoder.encode([0], open_preferences(path, kept=encoder.kept)[:])
        assert (found.reason if isinstance(found, Skipped) else "") == reason, templates


def test_a_table_says_what_json_says(bpe_tokenizer: PreTrainedTokenizerFast, write_jsonl: Callable[..., Path]) -> None:
    """Columns of Parquet have one type: objects get the fields of others, as null, and tools may be text."""
    encoder = encoder_of(bpe_tokenizer, TEMPLATES["tools"])
    names = ["text", "a call and its result", "text and a call to be made", "tools", "a name"]
    written: list[dict[str, Any]] = []
    for name in names:
        whole = CONVERSATIONS[name]
        tools = whole.columns.get("tools")
        row = {"id": name, "prompt": whole.prompt, "chosen": [whole.chosen], "rejected": [whole.rejected]}
        written.append({**row, "tools": tools and json.dumps(tools)})
    lines = write_jsonl(written)
    pq.write_table(pa.Table.from_pylist(written), lines.with_suffix(".parquet"))
    both = [open_preferences(lines.with_suffix(suffix), kept=encoder.kept) for suffix in (".jsonl", ".parquet")]
    assert both[0].fingerprint == both[1].fingerprint
    of_lines, of_table = (encoder.encode(range(len(names)), dataset[:]) for dataset in both)
    assert [type(one) for one in of_lines] == [EncodedPair] * 4 + [Skipped]
    for one, other in zip(of_lines, of_table, strict=True):
        if isinstance(one, EncodedPair):
            assert isinstance(other, EncodedPair)
            assert one.chosen.policy.prompt_ids.tolist() == other.chosen.policy.prompt_ids.tolist()
            assert one.chosen.policy.response_ids.tolist() == other.chosen.policy.response_ids.tolist()


def test_pictures_beside_text_refuse_the_row_and_take_no_memory(
    bpe_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = {"prompt": ["a", "b", "c"], "chosen": ["x"] * 3, "rejected": ["y"] * 3}
    pictures = pa.array([[b"\x89PNG" * 1000], None, []], pa.list_(pa.binary()))
    pq.write_table(pa.table({**rows, "images": pictures}), tmp_path / "pairs.parquet")
    encoder = encoder_of(bpe_tokenizer, TEMPLATES["plain"])
    dataset = open_preferences(tmp_path / "pairs.parquet", kept=encoder.kept)
    assert [dataset.fields(row)["images"] for row in range(3)] == [True, None, None]
    found = encoder.encode(range(3), dataset[:])
    assert [one.reason if isinstance(one, Skipped) else "" for one in found] == ["unread_field", "", ""]
