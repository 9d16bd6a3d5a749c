"""Two processes over gloo load their own slices; together they compute the logits of ``transformers``.

What they save as a distributed checkpoint, one process exports.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ctpd_nemo.convert.export import export_hf
from ctpd_nemo.parallel.checkpoint_tensors import CheckpointTensors
from tests.forks.client import run_forked

CASES = ["llama-rope3-tied", "qwen2", "qwen3-tied", "mistral"]
EXPORTED = ["qwen2", "qwen3-tied"]
LAYOUTS = ["2,1,1", "1,2,2"]  # tensor, pipeline, virtual pipeline


def run_two(arguments: list[str], folder: Path) -> str:
    """Standard output of the worker, run by two processes."""
    worker = Path(__file__).with_name("parallel_worker.py")
    done = run_forked(folder, 2, program=str(worker), arguments=arguments)
    assert done.status == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def loaded_by_two(tiny_model: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    """The folder of the models and their checkpoints, and a row ``[layout, case, difference]`` for each."""
    home = tmp_path_factory.mktemp("two")
    for name in CASES:
        tiny = tiny_model(name)
        ids = torch.randint(0, 131, (40,), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            logits = tiny.model(ids[None]).logits[0]
        (home / name).symlink_to(tiny.folder)
        torch.save({"ids": ids, "logits": logits, "save": name in EXPORTED}, home / f"{name}.pt")
    output = run_two([":".join(LAYOUTS), *(str(home / name) for name in CASES)], home)
    return home, [line.split()[1:] for line in output.splitlines() if line.startswith("logits ")]


def test_two_ranks_reproduce_the_logits(loaded_by_two: tuple[Path, list[list[str]]]) -> None:
    rows = loaded_by_two[1]
    assert [row[:2] for row in rows] == [[layout, case] for layout in LAYOUTS for case in CASES]
    assert all(float(difference) < 1e-4 for *_, difference in rows), rows


@pytest.mark.parametrize("case", EXPORTED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_from_a_checkpoint_of_any_layout_is_bit_for_bit(
    layout: str, case: str, loaded_by_two: tuple[Path, list[list[str]]], tmp_path: Path
) -> None:
    folder = loaded_by_two[0] / case
    export_hf(tmp_path / "out", folder, CheckpointTensors(f"{folder}-{layout}"))
    exported, original = (
        {name: tensor for path in place.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for place in (tmp_path / "out", folder)
    )
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)
