"""A user's id is a label: pairs are known by file and row, and by what they say."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded_pair import EncodedPair
from ctpd_nemo.data.preferences import open_preferences
from ctpd_nemo.data.templates import Side
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.weighting import SpanDraws, pair_draws


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"Name sea {number}.", "chosen": f"The Baltic {number}.", "rejected": "Paris.", **more}


IDS: dict[str, tuple[list[Any], list[str]]] = {
    # ids of three rows, and what the pairs are called
    "from zero in both files": ([0, 1, 2], ["0", "1", "2"]),
    "one id over several pairs": (["sea", "sea", "sea"], ["sea", "sea", "sea"]),
    "numbers with a point": ([1.0, 2.5, 1.0], ["1.0", "2.5", "1.0"]),
    "missing": ([None, 7, None], ["{stem}-1", "7", "{stem}-3"]),
    "not a number": ([float("nan"), 7, 8], ["{stem}-1", "7", "8"]),
    "like a name that is made": (["second-2", "first-2", None], ["second-2", "first-2", "{stem}-3"]),
}


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_no_id_keeps_a_pair_out(name: str, suffix: str, tmp_path: Path) -> None:
    given, called = IDS[name]
    paths = []
    for number, stem in enumerate(("first", "second")):
        rows = [row(3 * number + n, **({} if own is None else {"id": own})) for n, own in enumerate(given)]
        path = tmp_path / f"{stem}{suffix}"
        if suffix == ".parquet":
            columns = {key: [one.get(key) for one in rows] for key in ("id", *row(0))}
            if all(isinstance(own, str | None) for own in given):
                columns["id"] = pa.array(columns["id"], pa.string())
            pq.write_table(pa.table(columns), path)
        else:
            path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        paths.append(path)
    dataset = open_preferences(paths)
    assert not dataset.skipped
    assert [pair.prompt[0].content for pair in dataset] == [row(n)["prompt"] for n in range(6)]
    if suffix == ".jsonl":
        expected = [label.format(stem=stem) for stem in ("first", "second") for label in called]
        assert [pair.id for pair in dataset] == expected
        assert dataset.shared_ids == {label for label in expected if expected.count(label) > 1}
    assert [pair.place for pair in dataset] == [f"{path}:{n}" for path in paths for n in (1, 2, 3)]
    assert [dataset.place(n) for n in range(6)] == [pair.place for pair in dataset]


def test_fingerprints_of_data_are_those_of_before(write_jsonl: Callable[..., Path]) -> None:
    """The hash of ids, prompts and responses that caches and checkpoints know data by."""
    import hashlib

    rows = [row(1, id="a"), row(2), row(3, id=7, system="Be brief.", tools=[], source="web")]
    digest = hashlib.blake2b(digest_size=16)
    for label, one in zip(("a", "pairs-2", "7"), rows, strict=True):
        prompt = [["system", one["system"]]] if "system" in one else []
        content = [label, [*prompt, ["user", one["prompt"]]], one["chosen"], one["rejected"]]
        digest.update(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
    assert open_preferences(write_jsonl(rows)).fingerprint == digest.hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        {"tools": [{"name": "weather"}]},
        {"prompt": [{"role": "user", "content": "Name sea 1.", "name": "Anna"}]},
        {"chosen": [{"role": "assistant", "content": "The Baltic 1.", "reasoning_content": "Hm."}]},
        {"prompt": [{"role": "developer", "content": ""}, {"role": "user", "content": "Name sea 1."}]},
    ],
    ids=["tools", "name", "reasoning", "role"],
)
def test_what_is_rendered_beside_the_text_is_part_of_the_fingerprint(
    change: dict[str, Any], write_jsonl: Callable[..., Path]
) -> None:
    before = open_preferences(write_jsonl([row(1, id="a")]))
    after = open_preferences(write_jsonl([{**row(1, id="a"), **change}]))
    assert before.fingerprint != after.fingerprint
    assert before.content_hashes.tolist() != after.content_hashes.tolist()


def test_pairs_of_one_dataset_are_found_in_another_by_what_they_say(
    write_jsonl: Callable[..., Path],
) -> None:
    numbers = list(range(40))
    random.Random(0).shuffle(numbers)
    # Ids are those of other pairs, and one pair is there twice.
    scored = open_preferences(write_jsonl([row(n, id=n % 7) for n in [*numbers, 3]], "scored.jsonl"))
    held_out = open_preferences(write_jsonl([row(n, id="x") for n in (3, 20, 3, 39)], "held_out.jsonl"))
    found = held_out.numbers_in(scored)
    assert [scored[int(n)].prompt for n in found] == [pair.prompt for pair in held_out]
    other = open_preferences(write_jsonl([row(1), {**row(2), "rejected": "Rome."}], "other.jsonl"))
    with pytest.raises(InputError, match=r"other\.jsonl:2: found 1 of 2 pairs that are not among those of the cache"):
        other.numbers_in(scored)


def test_pairs_of_one_id_have_draws_of_their_own_and_others_those_of_before(
    bpe_side: Side, write_jsonl: Callable[..., Path]
) -> None:
    rows = [row(1, id="a"), row(1, id="b"), row(1, id="b"), row(1, id="c")]
    dataset = open_preferences(write_jsonl(rows))
    pairs = PairEncoder(bpe_side, None, True, 128).encode(range(4), dataset[:])
    draws = SpanDraws(5, dataset.shared_ids)
    drawn = [np.concatenate(draws.lookup(pair)[2:]) for pair in pairs if isinstance(pair, EncodedPair)]
    assert len({tuple(numbers) for numbers in drawn}) == 4
    for at in (0, 3):
        assert isinstance(pairs[at], EncodedPair)
        before = pair_draws(5, pairs[at])
        np.testing.assert_array_equal(drawn[at], np.concatenate([part.numpy() for part in before]))
