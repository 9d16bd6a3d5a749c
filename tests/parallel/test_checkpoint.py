"""Checkpoints in one process: what is saved is what is loaded, and the steps that follow are the same, bit for bit."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from ctpd_nemo.convert.architecture import Architecture, read_architecture
from ctpd_nemo.convert.load import chunk_parameters
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.gpt import PrecisionConfig, build_gpt
from ctpd_nemo.parallel import checkpoint
from ctpd_nemo.parallel.checkpoint import TrainState
from ctpd_nemo.parallel.checkpoint_tensors import CheckpointTensors
from ctpd_nemo.parallel.layout import ParallelConfig, initialize
from ctpd_nemo.parallel.optimizer import LightningOptimizer, OptimConfig, build_optimizer, wrap_data_parallel

_SIZES: dict[str, Any] = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
STATE = TrainState({"global_step": 2, "loops": {"done": [1, 2]}}, {"data": "abc"})
TOTAL_STEPS = 5

Run = tuple[list[Any], LightningOptimizer]


@pytest.fixture(scope="module", params=["tied", "untied with biases"])
def architecture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    folder = tmp_path_factory.mktemp("model")
    config = LlamaConfig(**_SIZES, tie_word_embeddings=True) if request.param == "tied" else Qwen2Config(**_SIZES)
    config.save_pretrained(folder)
    return read_architecture(folder)


@pytest.fixture(params=list(itertools.product(["fp32", "bf16"], [True, False])), ids=str)
def start(request: pytest.FixtureRequest, architecture: Architecture) -> Callable[[int], Run]:
    """``start(seed)``: a model of random weights, and its optimizer before the first step."""
    precision, distributed = request.param

    def make(seed: int) -> Run:
        initialize(ParallelConfig(), seed)
        parallel = ParallelConfig(distributed_optimizer=distributed)
        gpt = build_gpt(architecture, parallel, PrecisionConfig(precision))
        for parameter in gpt[0].parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        chunks = wrap_data_parallel(gpt, parallel)
        optim = OptimConfig(lr=0.1, weight_decay=0.1, warmup_fraction=0.2)
        return chunks, LightningOptimizer(*build_optimizer(chunks, optim, parallel, TOTAL_STEPS))

    return make


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


def test_a_run_that_is_loaded_takes_the_same_next_steps(start: Callable[[int], Run], tmp_path: Path) -> None:
    first = start(1)
    for number in range(2):
        step(first, number)
    checkpoint.save(tmp_path / "step-00000002", first[0], first[1], STATE)
    saved, drawn = weights(first), torch.rand(4)
    rates, norms = [], []
    for number in range(2, TOTAL_STEPS):
        rates.append(first[1].lr)
        step(first, number)
        norms.append(first[1].grad_norm)

    second = start(2)
    assert not torch.equal(
        weights(second)["embedding.word_embeddings.weight"], saved["embedding.word_embeddings.weight"]
    )
    assert checkpoint.load(tmp_path / "step-00000002", second[0], second[1]) == STATE
    assert_equal(weights(second), saved)
    if "layout" in STATE.fingerprints:
        assert torch.equal(torch.rand(4), drawn)
    for number in range(2, TOTAL_STEPS):
        assert second[1].lr == rates[number - 2]
        step(second, number)
        assert second[1].grad_norm == norms[number - 2]
    assert_equal(weights(second), weights(first))


def test_random_states_are_loaded_where_the_layout_is_the_same(start: Callable[[int], Run], tmp_path: Path) -> None:
    run = start(1)
    step(run, 0)
    for fingerprints, same in (({"layout": checkpoint.layout_name()}, True), ({"layout": "tp2-pp1"}, False)):
        checkpoint.save(tmp_path / "step-00000001", *run, TrainState({}, fingerprints))
        drawn = torch.rand(4)
        torch.manual_seed(99)
        checkpoint.load(tmp_path / "step-00000001", *run)
        assert torch.equal(torch.rand(4), drawn) is same


@pytest.fixture
def saved(start: Callable[[int], Run], tmp_path: Path) -> tuple[Path, Run]:
    run = start(3)
    checkpoint.save(tmp_path / "step-00000001", run[0], None, STATE)
    return tmp_path / "step-00000001", run


def test_weights_alone_are_saved_and_loaded(saved: tuple[Path, Run], start: Callable[[int], Run]) -> None:
    folder, run = saved
    other = start(4)
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
    with pytest.raises(KeyError, match="bias"):
        CheckpointTensors(saved[0])("decoder.final_layernorm.bias", (16,))


def test_a_checkpoint_replaces_one_of_the_same_name_once_it_is_whole(saved: tuple[Path, Run]) -> None:
    folder, run = saved
    (folder / "left over").touch()
    with torch.no_grad():
        run[0][0].module.decoder.final_layernorm.weight.fill_(7.0)
    checkpoint.save(folder, run[0], None, STATE)
    assert not (folder / "left over").exists()
    assert not folder.with_name(folder.name + ".writing").exists()
    assert (CheckpointTensors(folder)("decoder.final_layernorm.weight", (16,)) == 7.0).all()


def test_checkpoints_are_found_in_order_and_only_whole_ones(saved: tuple[Path, Run]) -> None:
    folder, run = saved
    for number in (10, 9):
        checkpoint.save(folder.with_name(f"step-{number:08d}"), run[0], None, STATE)
    folder.with_name("step-00000011").mkdir()
    folder.with_name("step-00000010").rename(folder.with_name("step-00000010.writing"))
    found = [path.name for path in checkpoint.find_checkpoints(folder.parent)]
    assert found == ["step-00000001", "step-00000009"]


def test_checkpoints_of_a_folder_that_is_not_there_are_none(tmp_path: Path) -> None:
    assert checkpoint.find_checkpoints(tmp_path / "nothing") == []


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_that_is_no_checkpoint_stops_with_its_name(exists: bool, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    if exists:
        folder.mkdir()
    for read in (checkpoint.read_state, CheckpointTensors, lambda path: checkpoint.load(path, [], None)):
        with pytest.raises(InputError, match="a checkpoint folder") as error:
            read(folder)
        assert error.value.place == str(folder)
