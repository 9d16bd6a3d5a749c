"""An encoded dataset stands for encoding: the same steps bit for bit."""

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded_pair import EncodedPair, Skipped
from ctpd_nemo.data.loader import Batching, StepBatch, build_step_loader
from ctpd_nemo.data.preferences import PreferenceDataset
from ctpd_nemo.data.source import TextSource
from ctpd_nemo.data.steps import StepPlan
from tests.data.encoded.writing import N_PAIRS, content, opened, write

FIELDS = [field.name for field in dataclasses.fields(Microbatch) if field.name != "max_seqlen"]


def assert_equal(one: StepBatch, other: StepBatch) -> None:
    assert (one.step, one.epoch, one.skipped, one.stats) == (other.step, other.epoch, other.skipped, other.stats)
    for name in ("microbatches", "reference_microbatches"):
        for mine, theirs in zip(getattr(one, name), getattr(other, name), strict=True):
            assert mine.max_seqlen == theirs.max_seqlen
            for buffer in FIELDS:
                assert getattr(mine, buffer).numpy().tobytes() == getattr(theirs, buffer).numpy().tobytes(), buffer


@pytest.mark.parametrize("name", ["two sides", "one side", "other template"])
@pytest.mark.parametrize(
    "batching",
    [
        Batching(512),
        Batching(512, side="reference"),
        Batching(512, online=True),
        Batching(512, responses=("chosen",), padding="padded", pad_to_multiple=16),
    ],
    ids=["policy", "reference", "online", "padded"],
)
def test_steps_are_those_of_encoding_on_the_fly_bit_for_bit(
    name: str,
    batching: Batching,
    dataset: PreferenceDataset,
    encoders: dict[str, PairEncoder],
    folders: dict[str, Path],
) -> None:
    encoder = encoders[name]
    plan = StepPlan(N_PAIRS, global_batch_size=8, epochs=2, seed=1)
    encoded = opened(folders[name], dataset, encoder)
    steps = list(build_step_loader(dataset, encoder, plan, batching))
    read = list(build_step_loader(dataset, encoder, plan, batching, encoded=encoded))
    assert sum(step.stats.skipped.total() for step in steps) == 2 * 6
    assert sum(step.stats.truncated for step in steps) > 0
    for one, other in zip(steps, read, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("name", ["two sides", "one side"])
def test_pairs_are_equal_in_every_part(
    name: str, dataset: PreferenceDataset, encoders: dict[str, PairEncoder], folders: dict[str, Path]
) -> None:
    expected = TextSource(dataset, encoders[name]).pairs(range(N_PAIRS))
    found = opened(folders[name], dataset, encoders[name]).pairs(range(N_PAIRS))
    for one, other in zip(found, expected, strict=True):
        if isinstance(other, Skipped):
            assert one == other
            continue
        assert isinstance(one, EncodedPair)
        assert (one.index, one.id) == (other.index, other.id)
        for mine, theirs in ((one.chosen, other.chosen), (one.rejected, other.rejected)):
            assert (mine.n_spans, mine.truncated) == (theirs.n_spans, theirs.truncated)
            assert (mine.reference is mine.policy) == encoders[name].one_sided
            arrays = [(mine.bounds, theirs.bounds)]
            for side in ("policy", "reference"):
                arrays += [
                    (getattr(mine.side(side), part), getattr(theirs.side(side), part))
                    for part in ("prompt_ids", "response_ids", "response_span")
                ]
            for array, like in arrays:
                assert array.dtype == like.dtype
                assert array.tolist() == like.tolist()


def test_workers_read_and_write_what_the_process_itself_does(
    dataset: PreferenceDataset, encoders: dict[str, PairEncoder], folders: dict[str, Path], tmp_path: Path
) -> None:
    encoder, folder = encoders["two sides"], folders["two sides"]
    written = write(tmp_path / "encoded", dataset, encoder, num_workers=2)
    assert content(written.folder) == content(folder)
    plan = StepPlan(N_PAIRS, global_batch_size=8)
    alone = list(build_step_loader(dataset, encoder, plan, Batching(512)))
    for one, other in zip(
        build_step_loader(dataset, encoder, plan, Batching(512), encoded=written, num_workers=2), alone, strict=True
    ):
        assert_equal(one, other)


def test_an_opened_dataset_goes_to_another_process_without_its_files(
    dataset: PreferenceDataset, encoders: dict[str, PairEncoder], folders: dict[str, Path]
) -> None:
    encoded = opened(folders["two sides"], dataset, encoders["two sides"])
    before = encoded.pairs([0, 22])
    sent = pickle.dumps(encoded)
    assert len(sent) < 5000
    after = pickle.loads(sent).pairs([0, 22])
    assert [pair.id for pair in after] == [pair.id for pair in before]
    for one, other in zip(after, before, strict=True):
        assert one.chosen.policy.response_ids.tolist() == other.chosen.policy.response_ids.tolist()


@pytest.mark.parametrize("side", ["policy", "reference"])
@pytest.mark.parametrize("responses", [("chosen",), ("chosen", "rejected")])
def test_lengths_are_known_without_reading_the_pairs(
    side: Any, responses: Any, dataset: PreferenceDataset, encoders: dict[str, PairEncoder], folders: dict[str, Path]
) -> None:
    encoded = opened(folders["two sides"], dataset, encoders["two sides"])
    rows = [22, 0, 3, 17, 12, 5]
    lengths, response_lengths = encoded.lengths(rows, side, responses)
    for row, length, response_length in zip(rows, lengths.tolist(), response_lengths.tolist(), strict=True):
        (pair,) = encoded.pairs([row])
        sequences = [] if isinstance(pair, Skipped) else [one.side(side) for one in pair.responses(responses)]
        assert length == ([len(sequence) for sequence in sequences] or [0] * len(responses))
        assert response_length == ([len(sequence.response_ids) for sequence in sequences] or [0] * len(responses))


def test_lengths_of_text_are_estimated_alike_everywhere_and_near_the_truth(
    dataset: PreferenceDataset, encoders: dict[str, PairEncoder], folders: dict[str, Path]
) -> None:
    encoder = encoders["two sides"]
    whole = [row for row in range(N_PAIRS) if row not in (3, 4, *range(10, 15))]
    for side in ("policy", "reference"):
        ask = (whole, side, ("chosen", "rejected"))
        exact, exact_response = opened(folders["two sides"], dataset, encoder).lengths(*ask)
        estimates = [TextSource(dataset, encoder).lengths(*ask) for _ in range(2)]
        for name in (0, 1):
            assert np.array_equal(estimates[0][name], estimates[1][name])
        assert abs(estimates[0][0].sum() / exact.sum() - 1) < 0.1
        assert abs(estimates[0][1].sum() / exact_response.sum() - 1) < 0.1
        assert np.corrcoef(estimates[0][0].ravel(), exact.ravel())[0, 1] > 0.9


def test_ranks_share_known_lengths_and_every_pair_is_at_one(
    dataset: PreferenceDataset, encoders: dict[str, PairEncoder], folders: dict[str, Path]
) -> None:
    encoder = encoders["two sides"]
    encoded = opened(folders["two sides"], dataset, encoder)
    plan = StepPlan.in_order(N_PAIRS, N_PAIRS)
    shares = [
        next(iter(build_step_loader(dataset, encoder, plan, Batching(512), dp_rank=rank, dp_size=2, encoded=encoded)))
        for rank in range(2)
    ]
    seen = [row for share in shares for batch in share.microbatches for row in batch.pair_index.tolist()]
    seen += [pair.index for share in shares for pair in share.skipped]
    assert sorted(seen) == list(range(N_PAIRS))
    tokens = [share.stats.tokens for share in shares]
    assert max(tokens) / min(tokens) < 1.02
