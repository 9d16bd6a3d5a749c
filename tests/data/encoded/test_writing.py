"""Shards that are written again, by several at once, or cannot be."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded import EncodedDataset, Manifest, verify_shard
from ctpd_nemo.data.encoded_writer import write_encoded
from ctpd_nemo.data.preferences import PreferenceDataset
from ctpd_nemo.data.source import TextSource
from ctpd_nemo.data.templates import Side
from ctpd_nemo.errors import InputError
from tests.data.encoded.writing import PAIRS_PER_SHARD, content, write


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
    refused = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    template = refused + "{% for m in messages %}{{ m.content }}{% endfor %}"
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
