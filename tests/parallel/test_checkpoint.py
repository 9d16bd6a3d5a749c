"""Checkpoints in one process: what is saved is what is loaded, and the steps that follow are the same, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from ctpd_nemo.convert.architecture import Architecture, read_architecture
from ctpd_nemo.convert.load import chunk_parameters
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.gpt import build_gpt
from ctpd_nemo.parallel import checkpoint
from ctpd_nemo.parallel.checkpoint import TrainState
from ctpd_nemo.parallel.checkpoint_files import find_checkpoints
from ctpd_nemo.parallel.checkpoint_tensors import CheckpointTensors
from ctpd_nemo.parallel.layout import ParallelConfig, initialize
from ctpd_nemo.parallel.optimizer import LightningOptimizer, OptimConfig, build_optimizer, wrap_data_parallel
from ctpd_nemo.parallel.precision import PrecisionConfig

_SIZES: dict[str, Any] = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
STATE = TrainState({"global_step": 2, "loops": {"done": [1, 2]}}, {"data": "abc"})
TOTAL_STEPS = 5

Run = tuple[list[Any], LightningOptimizer]


@pytest.fixture(scope="module")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Architecture]:
    """By whether the embeddings are tied; the untied one has biases."""
    folder = tmp_path_factory.mktemp("models")
    LlamaConfig(**_SIZES, tie_word_embeddings=True).save_pretrained(folder / "tied")
    Qwen2Config(**_SIZES).save_pretrained(folder / "untied")
    return {tied: read_architecture(folder / name) for tied, name in ((True, "tied"), (False, "untied"))}


def make_run(architecture: Architecture, seed: int, precision: str = "fp32", distributed: bool = True) -> Run:
    """A model of random weights, and its optimizer before the first step."""
    initialize(ParallelConfig(), seed)
    parallel = ParallelConfig(distributed_optimizer=distributed)
    gpt = build_gpt(architecture, parallel, PrecisionConfig(precision))
    for parameter in gpt[0].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    chunks = wrap_data_parallel(gpt, parallel)
    optim = OptimConfig(lr=0.1, weight_decay=0.1, warmup_fraction=0.2)
    return chunks, LightningOptimizer(*build_optimizer(chunks, optim, parallel, TOTAL_STEPS))


def step(run: Run, number: int) -> None:
    """One step with gradients that are a function of its number."""
    chunks, optimizer = run
    draw = torch.Generator().manual_seed(number)
    chunks[0].zero_grad_buffer()
    optimizer.zero_grad()
    for parameter in chunks[0].parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=draw))
    chunks[0].finish_grad_sync()
    optimizer.step()


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in chunk_parameters(run[0][0].module).items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("precision", "distributed", "tied"),
    [("fp32", True, True), ("fp32", False, False), ("bf16", True, False), ("bf16", False, True)],
)
def test_a_run_that_is_loaded_takes_the_same_next_steps(
    precision: str, distributed: bool, tied: bool, architectures: dict[bool, Architecture], tmp_path: Path
) -> None:
    first = make_run(architectures[tied], 1, precision, distributed)
    for number in range(2):
        step(first, number)
    state = TrainState(STATE.trainer, {"layout": checkpoint.layout_name()})
    checkpoint.save(tmp_path / "step-00000002", *first, state)
    saved, drawn = weights(first), torch.rand(4)
    rates, norms = [], []
    for number in range(2, TOTAL_STEPS):
        rates.append(first[1].lr)
        step(first, number)
        norms.append(first[1].grad_norm)

    second = make_run(architectures[tied], 2, precision, distributed)
    embedding = "embedding.word_embeddings.weight"
    assert not torch.equal(weights(second)[embedding], saved[embedding])
    assert checkpoint.load(tmp_path / "step-00000002", *second) == state
    assert_equal(weights(second), saved)
    assert torch.equal(torch.rand(4), drawn), "the random state is that of the run that was saved"
    for number in range(2, TOTAL_STEPS):
        assert second[1].lr == rates[number - 2]
        step(second, number)
        assert second[1].grad_norm == norms[number - 2]
    assert_equal(weights(second), weights(first))


def test_another_layout_keeps_its_own_random_states(architectures: dict[bool, Architecture], tmp_path: Path) -> None:
    run = make_run(architectures[True], 1)
    step(run, 0)
    checkpoint.save(tmp_path / "step-00000001", *run, TrainState({}, {"layout": "tp2-pp1"}))
    torch.manual_seed(99)
    drawn = torch.rand(4)
    torch.manual_seed(99)
    checkpoint.load(tmp_path / "step-00000001", *run)
    assert torch.equal(torch.rand(4), drawn)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def saved(request: pytest.FixtureRequest, architectures: dict[bool, Architecture], tmp_path: Path) -> tuple[Path, Run]:
    run = make_run(architectures[request.param], 3)
    checkpoint.save(tmp_path / "step-00000001", run[0], None, STATE)
    return tmp_path / "step-00000001", run


def test_weights_alone_are_saved_and_loaded(saved: tuple[Path, Run], architectures: dict[bool, Architecture]) -> None:
    folder, run = saved
    other = make_run(architectures["output_layer.weight" not in weights(run)], 4)
    assert checkpoint.load(folder, other[0], None) == STATE
    assert checkpoint.read_state(folder) == STATE
    assert_equal(weights(other), weights(run))


def test_checkpoint_tensors_are_those_of_the_model_layer_by_layer(saved: tuple[Path, Run]) -> None:
    folder, run = saved
    tensors, expected = CheckpointTensors(folder), weights(run)
    assert len([name for name in expected if name.startswith("decoder.layers.2.")]) >= 6
    for name, weight in expected.items():
        found = tensors(name, tuple(weight.shape))
        assert found.dtype == weight.dtype
        assert torch.equal(found, weight), name


def test_checkpoint_tensors_know_no_other_names(saved: tuple[Path, Run]) -> None:
    with pytest.raises(InputError, match="bias"):
        CheckpointTensors(saved[0])("decoder.final_layernorm.bias", (16,))


def test_a_checkpoint_replaces_one_of_the_same_name_once_it_is_whole(saved: tuple[Path, Run]) -> None:
    folder, run = saved
    (folder / "left over").touch()
    with torch.no_grad():
        run[0][0].module.decoder.final_layernorm.weight.fill_(7.0)
    checkpoint.save(folder, run[0], None, STATE)
    assert not (folder / "left over").exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["latest", folder.name]
    assert (CheckpointTensors(folder)("decoder.final_layernorm.weight", (16,)) == 7.0).all()


def test_checkpoints_are_found_in_order_and_only_whole_ones(saved: tuple[Path, Run]) -> None:
    folder, run = saved
    for number in (10, 9):
        checkpoint.save(folder.with_name(f"step-{number:08d}"), run[0], None, STATE)
    folder.with_name("step-00000011").mkdir()
    folder.with_name("step-00000010").rename(folder.with_name("step-00000010.writing"))
    found = [path.name for path in find_checkpoints(folder.parent)]
    assert found == ["step-00000001", "step-00000009"]


def test_checkpoints_of_a_folder_that_is_not_there_are_none(tmp_path: Path) -> None:
    assert find_checkpoints(tmp_path / "nothing") == []


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_is_no_checkpoint_stops_with_its_name(exists: bool, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    if exists:
        folder.mkdir()
    for read in (checkpoint.read_state, CheckpointTensors, lambda path: checkpoint.load(path, [], None)):
        with pytest.raises(InputError, match="a checkpoint folder") as error:
            read(folder)
        assert error.value.place == str(folder)
