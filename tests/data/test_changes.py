"""A file that changes under a run is noticed by the next look at it, however it was changed."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from ctpd_nemo.data.changes import WatchedFile
from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded import Manifest
from ctpd_nemo.data.encoded_writer import write_encoded
from ctpd_nemo.data.preferences import PreferenceDataset, open_preferences
from ctpd_nemo.data.source import TextSource
from ctpd_nemo.errors import InputError

ROWS = [{"prompt": f"Name sea {number}.", "chosen": "The Baltic.", "rejected": "Paris."} for number in range(9)]


def overwrite(path: Path) -> None:
    """In place, with as many bytes, and with the times of before."""
    before = path.stat()
    data = path.read_bytes().replace(b"The Baltic.", b"The Pacific"[:11])
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    other.replace(path)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n")


def touch(path: Path) -> None:
    path.touch()


def copy(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


@pytest.mark.parametrize("change", [overwrite, truncate, replace, append])
def test_a_file_that_is_written_to_is_named(change: Callable[[Path], Any], write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl(ROWS)
    dataset = open_preferences([write_jsonl(ROWS, "first.jsonl"), path])
    dataset.check_unchanged()
    change(path)
    with pytest.raises(InputError, match=r"/pairs\.jsonl: found other content than when the job began") as stopped:
        dataset.check_unchanged()
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize("change", [touch, copy])
def test_the_same_content_is_no_change_and_is_read_once_more_only(
    change: Callable[[Path], Any], write_jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(ROWS)
    dataset = open_preferences(path)
    change(path)
    dataset.check_unchanged()
    monkeypatch.setattr("ctpd_nemo.data.changes._content", lambda path: pytest.fail("it was read again"))
    dataset.check_unchanged()
    assert [pair.chosen for pair in dataset] == ["The Baltic."] * len(ROWS)


def test_a_file_that_is_gone_is_read_on_and_said_once(
    write_jsonl: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(ROWS)
    dataset = open_preferences(path)
    path.unlink()
    with caplog.at_level(logging.WARNING, "ctpd_nemo"):
        dataset.check_unchanged()
        dataset.check_unchanged()
    assert len(caplog.records) == 1
    assert len(list(dataset)) == len(ROWS)


@pytest.mark.parametrize("kind", ["parquet", "dataset", "gzip", "list", "folder"])
def test_files_of_every_kind_are_watched(kind: str, tmp_path: Path) -> None:
    import gzip
    import json

    if kind == "parquet":
        path = watched = tmp_path / "pairs.parquet"
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == "dataset":
        path = tmp_path / "saved"
        Dataset.from_list(ROWS).save_to_disk(path)
        (watched,) = path.glob("*.arrow")
    elif kind == "gzip":
        path = watched = tmp_path / "pairs.jsonl.gz"
        path.write_bytes(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)))
    else:
        path = tmp_path if kind == "folder" else tmp_path / "pairs.json"
        watched = tmp_path / "pairs.json"
        watched.write_text(json.dumps(ROWS))
    dataset = open_preferences(path)
    dataset.check_unchanged()
    append(watched)
    with pytest.raises(InputError, match=f"{watched.name}: found other content"):
        dataset.check_unchanged()


def test_a_file_that_is_written_to_while_it_is_opened_is_refused(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl(ROWS)
    watched = WatchedFile(path)
    append(path)
    with pytest.raises(InputError, match=r"pairs\.jsonl: found a file that changes while it is read"):
        watched.opened()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_no_shard_of_changed_text_is_encoded_under_the_name_of_the_old(
    num_workers: int, encoder: PairEncoder, write_jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_jsonl(ROWS)
    dataset: PreferenceDataset = open_preferences(path)
    manifest = Manifest.of(dataset, encoder, 3)
    overwrite(path)
    with pytest.raises(InputError, match=r"pairs\.jsonl: found other content than when the job began"):
        list(write_encoded(tmp_path / "encoded", manifest, TextSource(dataset, encoder), num_workers))
    assert [one.name for one in (tmp_path / "encoded").iterdir()] == ["manifest.json"]
