"""A full disk in whatever a job writes beside checkpoints: one line, with the file that could not be written."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from ctpd_nemo.convert.companions import copy_companions
from ctpd_nemo.convert.export import HFWriter
from ctpd_nemo.parallel.checkpoint_files import write_whole
from ctpd_nemo.pipeline import entry, origin
from ctpd_nemo.text_files import replace_text
from tests.pipeline.score_cache.made import write_shard, writer


def fill(disk: Path) -> None:
    with (disk / "other files").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def export_weights(folder: Path) -> None:
    with HFWriter(folder / "export", 10**9) as export:
        fill(folder)
        export.add("weight", torch.zeros(10_000))


def export_companions(folder: Path) -> None:
    reference = folder.parent / "reference"
    reference.mkdir()
    (reference / "config.json").write_text("{}")
    fill(folder)
    copy_companions(reference, folder, None)


def append_a_start(folder: Path) -> None:
    (folder / "starts.jsonl").touch()
    fill(folder)
    origin._append(folder / "starts.jsonl", {"step": 0})


def write_scores(folder: Path) -> None:
    cache = writer(folder / "cache")
    cache.begin()
    fill(folder)
    write_shard(cache, "reference", 0)


def write_status(folder: Path) -> None:
    fill(folder)
    write_whole(folder / "stage.json", "{}")


def write_page(folder: Path) -> None:
    fill(folder)
    replace_text(folder / "report.html", "a page")


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (export_weights, ".export.partial/shard-0"),
        (export_companions, "config.json"),
        (append_a_start, "starts.jsonl"),
        (write_scores, "cache/reference-00000.parquet"),
        (write_status, "stage.json"),
        (write_page, "report.html"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_full_disk_is_told_with_the_file_that_had_no_room(
    write: Callable[[Path], None], name: str, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        entry.run(lambda config: write(small_disk), OmegaConf.create({"run_dir": "elsewhere"}))
    assert end.value.code == 2
    expected = f"error: {small_disk / name}: found No space left on device; expected room to write\n"
    assert capsys.readouterr().err == expected
    assert not list(small_disk.rglob("*writing*"))
