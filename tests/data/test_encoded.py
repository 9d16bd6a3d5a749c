"""An encoded dataset stands for encoding: the same steps bit for bit, or one error that names the file."""

import dataclasses
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.data.encode import EncodedPair, PairEncoder, Skipped
from ctpd_nemo.data.encoded import EncodedDataset, Manifest, verify_shard
from ctpd_nemo.data.encoded_writer import write_encoded
from ctpd_nemo.data.forms import PreferencePair
from ctpd_nemo.data.loader import Batching, StepBatch, build_step_loader
from ctpd_nemo.data.preferences import PreferenceDataset, open_preferences
from ctpd_nemo.data.source import TextSource
from ctpd_nemo.data.steps import StepPlan
from ctpd_nemo.data.templates import Side
from ctpd_nemo.errors import InputError

N_PAIRS = 23
PAIRS_PER_SHARD = 5
FIELDS = [field.name for field in dataclasses.fields(Microbatch) if field.name != "max_seqlen"]


@pytest.fixture(scope="module")
def dataset(
    tmp_path_factory: pytest.TempPathFactory,
    make_pairs: Callable[..., list[PreferencePair]],
    as_row: Callable[[PreferencePair], dict[str, Any]],
) -> PreferenceDataset:
    rows = [as_row(pair) for pair in make_pairs(N_PAIRS)]
    # One that no truncation can fit, one that is truncated; a whole shard of pairs that are skipped.
    rows[3]["prompt"][-1]["content"] = "the sea " * 400
    rows[4]["chosen"][0]["content"] = "日本 🙂 the sea " * 60
    for row in rows[10:15]:
        row["prompt"][-1]["content"] = "the sea " * 400
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_preferences(path)


@pytest.fixture(scope="module")
def encoders(unigram_side: Side, bpe_side: Side) -> dict[str, PairEncoder]:
    return {
        "two sides": PairEncoder(unigram_side, bpe_side, include_eos=True, max_length=128),
        "one side": PairEncoder(bpe_side, None, include_eos=False, max_length=128),
        "other template": PairEncoder(
            bpe_side, Side(bpe_side.tokenizer, "{{ messages[-1].content }} "), include_eos=True, max_length=128
        ),
    }


def write(folder: Path, dataset: PreferenceDataset, encoder: PairEncoder, num_workers: int = 0) -> EncodedDataset:
    manifest = Manifest.of(dataset, encoder, PAIRS_PER_SHARD)
    for _ in write_encoded(folder, manifest, TextSource(dataset, encoder), num_workers):
        pass
    return EncodedDataset(folder, manifest)


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, dataset: PreferenceDataset, encoders: dict[str, PairEncoder]
) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("encoded")
    return {name: write(home / name, dataset, encoder).folder for name, encoder in encoders.items()}


def opened(folder: Path, dataset: PreferenceDataset, encoder: PairEncoder) -> EncodedDataset:
    return EncodedDataset(folder, Manifest.of(dataset, encoder, PAIRS_PER_SHARD))


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


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_writing_goes_on_at_the_first_missing_shard(
    dataset: PreferenceDataset, encoders: dict[str, PairEncoder], folders: dict[str, Path], tmp_path: Path
) -> None:
    encoder = encoders["two sides"]
    source = TextSource(dataset, encoder)
    manifest = Manifest.of(dataset, encoder, PAIRS_PER_SHARD)
    folder = tmp_path / "encoded"
    progress = write_encoded(folder, manifest, source, num_workers=0)
    assert [next(progress), next(progress)] == [(1, 5), (2, 5)]
    progress.close()
    with pytest.raises(InputError, match="found no shard-00002; expected every shard"):
        EncodedDataset(folder, manifest)
    # What a job that was killed while it wrote leaves; in a container the next one has the same process number.
    left = folder / f"shard-00002.writing-{os.getpid()}"
    left.mkdir()
    (left / "tokens.npy").write_bytes(b"half")
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npy")}
    assert list(write_encoded(folder, manifest, source, num_workers=0)) == [(done, 5) for done in range(1, 6)]
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    shutil.rmtree(left)
    assert content(folder) == content(folders["two sides"])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage", "found"),
    [
        ("shard-00001/tokens.npy", truncate, "CRC-32"),
        ("shard-00001/tokens.npy", flip, "CRC-32"),
        ("shard-00001/index.npy", flip, "CRC-32"),
        ("shard-00001/ids.npy", flip, "CRC-32"),
        ("shard-00001/ids.npy", Path.unlink, "a file that cannot be read"),
        ("shard-00001/checks.json", Path.unlink, "no such file"),
        ("shard-00001/checks.json", lambda path: path.write_text("[]"), "a JSON list"),
        ("manifest.json", lambda path: path.write_text("{"), "no JSON"),
        ("manifest.json", lambda path: path.write_text("[1]"), "a JSON list"),
        ("manifest.json", Path.unlink, "no manifest.json"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damage_is_found_before_anything_is_trained(
    file: str,
    damage: Callable[[Path], Any],
    found: str,
    dataset: PreferenceDataset,
    encoders: dict[str, PairEncoder],
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(folders["two sides"], tmp_path / "encoded"))
    damage(folder / file)
    before = content(folder)
    with pytest.raises(InputError) as error:
        write(folder, dataset, encoders["two sides"])
    missing = "manifest.json" in found
    assert error.value.place == str(folder if missing else folder / file)
    assert found in error.value.found
    assert content(folder) == before


@pytest.mark.parametrize("damage", [truncate, Path.unlink, lambda path: np.save(path, np.zeros((2, 2)))])
def test_damage_that_comes_later_is_named_too(
    damage: Callable[[Path], Any],
    dataset: PreferenceDataset,
    encoders: dict[str, PairEncoder],
    folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(folders["two sides"], tmp_path / "encoded"))
    encoded = opened(folder, dataset, encoders["two sides"])
    damage(folder / "shard-00001" / "tokens.npy")
    plan = StepPlan.in_order(N_PAIRS, 8)
    loader = build_step_loader(dataset, encoders["two sides"], plan, Batching(512), encoded=encoded, num_workers=1)
    with pytest.raises(InputError, match=r"shard-00001/tokens\.npy: found .*; expected .*to encode it again"):
        list(loader)


def test_pickled_objects_are_not_read(
    dataset: PreferenceDataset, encoders: dict[str, PairEncoder], folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folders["two sides"], tmp_path / "encoded"))
    np.save(folder / "shard-00000" / "tokens.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"tokens\.npy: found a file that cannot be mapped"):
        opened(folder, dataset, encoders["two sides"]).pairs([0])


@pytest.mark.parametrize(
    ("other", "field"),
    [("one side", "one_sided"), ("lengths", "lengths"), ("data", "data"), ("other template", "policy_tokenizer")],
)
def test_an_encoded_dataset_of_something_else_is_refused(
    other: str,
    field: str,
    dataset: PreferenceDataset,
    encoders: dict[str, PairEncoder],
    folders: dict[str, Path],
    unigram_side: Side,
    bpe_side: Side,
) -> None:
    manifest = Manifest.of(dataset, encoders["two sides"], PAIRS_PER_SHARD)
    there = folders["two sides"]
    if other in encoders:
        manifest = Manifest.of(dataset, encoders[other], PAIRS_PER_SHARD)
    elif other == "lengths":
        manifest = Manifest.of(dataset, PairEncoder(unigram_side, bpe_side, True, 64), PAIRS_PER_SHARD)
    else:
        manifest = dataclasses.replace(manifest, fingerprints={**manifest.fingerprints, "data": "other"})
    for open_it in (
        lambda: EncodedDataset(there, manifest),
        lambda: next(write_encoded(there, manifest, TextSource(dataset, encoders["two sides"]), 0)),
    ):
        with pytest.raises(InputError) as error:
            open_it()
        assert error.value.place == f"{there}/manifest.json, {field}"
        assert error.value.found != error.value.expected


def test_names_are_those_of_equal_content(
    dataset: PreferenceDataset, encoders: dict[str, PairEncoder], unigram_side: Side, bpe_side: Side
) -> None:
    names = {name: Manifest.of(dataset, encoder).name for name, encoder in encoders.items()}
    assert len(set(names.values())) == 3
    again = PairEncoder(Side(bpe_side.tokenizer), Side(bpe_side.tokenizer), include_eos=False, max_length=128)
    assert Manifest.of(dataset, again).name == names["one side"], "a reference that reads as the policy does"


def test_bad_input_of_a_shard_stops_with_the_same_error(
    dataset: PreferenceDataset, bpe_side: Side, tmp_path: Path
) -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[-1].content }}"
    encoder = PairEncoder(Side(bpe_side.tokenizer, template), None, include_eos=True, max_length=128)
    for num_workers in (0, 2):
        with pytest.raises(InputError, match=r"pairs\.jsonl:\d+, .*a template that fails on the roles system"):
            write(tmp_path / str(num_workers), dataset, encoder, num_workers)


def test_a_folder_that_cannot_be_written_is_named(
    dataset: PreferenceDataset, encoders: dict[str, PairEncoder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(InputError, match=r"shard-00000.*: found No space left on device; expected a folder"):
        write(tmp_path / "encoded", dataset, encoders["two sides"])
    assert [path.name for path in (tmp_path / "encoded").iterdir()] == ["manifest.json"]


def test_a_place_that_cannot_hold_the_folder_is_named(
    dataset: PreferenceDataset, encoders: dict[str, PairEncoder], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match=r"file/encoded: found .*; expected a folder that can be written"):
        write(tmp_path / "file" / "encoded", dataset, encoders["two sides"])


def test_jobs_of_one_process_number_do_not_disturb_each_other(
    dataset: PreferenceDataset,
    encoders: dict[str, PairEncoder],
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Containers of several nodes: one job writes all of the shard that another is in the middle of."""
    encoder, save = encoders["two sides"], np.save
    other: list[EncodedDataset] = []

    def interrupted(path: Path, *arguments: Any, **options: Any) -> None:
        save(path, *arguments, **options)
        if path.name == "tokens.npy" and not other:
            monkeypatch.setattr(np, "save", save)
            other.append(write(tmp_path / "encoded", dataset, encoder))

    monkeypatch.setattr(np, "save", interrupted)
    write(tmp_path / "encoded", dataset, encoder)
    assert other
    assert content(tmp_path / "encoded") == content(folders["two sides"])


def test_a_shard_that_another_job_wrote_first_is_kept(
    dataset: PreferenceDataset, encoders: dict[str, PairEncoder], folders: dict[str, Path], tmp_path: Path
) -> None:
    encoder = encoders["two sides"]
    manifest = Manifest.of(dataset, encoder, PAIRS_PER_SHARD)
    folder = tmp_path / "encoded"
    progress = write_encoded(folder, manifest, TextSource(dataset, encoder), num_workers=0)
    next(progress)
    shutil.copytree(folders["two sides"] / "shard-00001", folder / "shard-00001")
    for _ in progress:
        pass
    assert content(folder) == content(folders["two sides"])
    for shard in range(5):
        verify_shard(folder, shard)
