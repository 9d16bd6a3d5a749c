"""Damage, and datasets of something else: one error that names the file."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded import EncodedDataset, Manifest
from ctpd_nemo.data.encoded_writer import write_encoded
from ctpd_nemo.data.loader import Batching, build_step_loader
from ctpd_nemo.data.preferences import PreferenceDataset
from ctpd_nemo.data.source import TextSource
from ctpd_nemo.data.steps import StepPlan
from ctpd_nemo.data.templates import Side
from ctpd_nemo.errors import InputError
from tests.data.encoded.writing import N_PAIRS, PAIRS_PER_SHARD, content, opened, write


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
