"""The fingerprint follows the content of a folder's weights and nothing else."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ctpd_nemo.convert import fingerprint
from ctpd_nemo.convert.fingerprint import weights_fingerprint
from ctpd_nemo.errors import InputError


@pytest.fixture
def folder(tiny_model: Callable, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("llama").folder, tmp_path / "model"))


def flip_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_copy_elsewhere_has_the_same_fingerprint(folder: Path, tiny_model: Callable) -> None:
    (folder / "README.md").write_text("not weights")
    assert weights_fingerprint(folder) == weights_fingerprint(tiny_model("llama").folder)
    assert len(weights_fingerprint(folder)) == 64


@pytest.mark.parametrize("chunk_bytes", [1000, 64 * 1024 * 1024])
def test_one_bit_anywhere_changes_it(chunk_bytes: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_CHUNK_BYTES", chunk_bytes)
    original = weights_fingerprint(folder)
    shards = sorted(folder.glob("*.safetensors"))
    for path, at in [(folder / "config.json", 0), (shards[0], -1), (shards[3], 1000), (shards[-1], 999)]:
        flip_bit(path, at)
        assert weights_fingerprint(folder) != original
        flip_bit(path, at)
    assert weights_fingerprint(folder) == original


def test_swapped_shards_change_it(folder: Path) -> None:
    original = weights_fingerprint(folder)
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert weights_fingerprint(folder) != original


def test_a_folder_without_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        weights_fingerprint(tmp_path)
