"""Optimizer state that three data-parallel ranks share out: each writes a share, and reads what its own is in."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ctpd_nemo.convert.architecture import parse_architecture
from ctpd_nemo.models.gpt import build_gpt
from ctpd_nemo.parallel import checkpoint, checkpoint_tensors, optimizer_state
from ctpd_nemo.parallel.checkpoint import TrainState
from ctpd_nemo.parallel.layout import ParallelConfig, initialize
from ctpd_nemo.parallel.optimizer import LightningOptimizer, OptimConfig, build_optimizer, wrap_data_parallel
from ctpd_nemo.parallel.precision import PrecisionConfig
from tests.losses.ranks import run_ranks

WORLD, STATES = 3, ("param", "exp_avg", "exp_avg_sq")
MODEL = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 37}
MODEL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64}


def stepped(seed: int) -> tuple[list[Any], LightningOptimizer]:
    """A model and its optimizer after one step."""
    parallel = ParallelConfig()
    gpt = build_gpt(parse_architecture(MODEL, "a test"), parallel, PrecisionConfig("fp32"))
    draw = torch.Generator().manual_seed(seed)
    for parameter in gpt[0].parameters():
        torch.nn.init.normal_(parameter, generator=draw)
    chunks = wrap_data_parallel(gpt, parallel)
    optimizer = LightningOptimizer(*build_optimizer(chunks, OptimConfig(lr=0.1), parallel, 10))
    chunks[0].zero_grad_buffer()
    for parameter in chunks[0].parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=draw))
    chunks[0].finish_grad_sync()
    optimizer.step()
    return chunks, optimizer


def shards(optimizer: LightningOptimizer) -> list[Tensor]:
    """Copies of what this rank has of every state."""
    part = optimizer_state._only_part(optimizer.megatron)
    own = optimizer_state._own_states(part)
    return [state[name].detach().clone() for state in own.values() for name in STATES]


def observe(rank: int, folder: str) -> None:
    """In a rank: what it would write, what it asks for when it reads, and what Megatron's own gather finds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    initialize(ParallelConfig(), 1)
    chunks, optimizer = stepped(1)
    part = optimizer_state._only_part(optimizer.megatron)
    state = optimizer_state.sharded_state(optimizer.megatron, checkpoint._model_state(chunks))
    written = {
        (number, name): place.data.detach().flatten().clone()
        for number, places in state["param_state"].items()
        for name, place in places.items()
    }
    gathered = part.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
    (whole,) = gathered[0].values()
    places = [place[:2] for place in part.buffers[0].param_index_map.values()]
    before = shards(optimizer)
    checkpoint.save(Path(folder) / "step-00000001", chunks, optimizer, TrainState({}, {}))
    chunks, optimizer = stepped(2)
    asked: list[int] = []
    region = checkpoint_tensors.CheckpointTensors.region

    def counted(self: Any, key: str, *args: Any) -> Tensor:
        tensor = region(self, key, *args)
        asked.append(tensor.numel())
        return tensor

    checkpoint_tensors.CheckpointTensors.region = counted  # type: ignore[method-assign]
    checkpoint.load(Path(folder) / "step-00000001", chunks, optimizer)
    equal = all(map(torch.equal, shards(optimizer), before))
    own = sum(tensor.numel() for tensor in before)
    seen = {"written": written, "whole": whole, "places": places, "own": own, "asked": asked, "equal": equal}
    torch.save(seen, Path(folder) / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = run_ranks(observe, tmp_path_factory.mktemp("ranks"))
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(WORLD)]


def test_every_state_is_written_once_and_is_what_all_ranks_have_of_it(ranks: list[dict[str, Any]]) -> None:
    whole, places = ranks[0]["whole"], ranks[0]["places"]
    written = [entry for rank in ranks for entry in rank["written"].items()]
    assert sorted(key for key, _ in written) == sorted((n, name) for n in range(len(places)) for name in STATES)
    for (number, name), state in written:
        start, end = places[number]
        assert torch.equal(state, whole[name][start:end]), (number, name)


def test_a_rank_has_no_more_to_write_than_its_share_and_one_parameter(ranks: list[dict[str, Any]]) -> None:
    largest = max(end - start for start, end in ranks[0]["places"])
    for rank in ranks:
        assert 0 < sum(state.numel() for state in rank["written"].values()) <= rank["own"] + 3 * largest


def test_a_rank_reads_the_parameters_that_it_has_a_share_of_and_no_others(ranks: list[dict[str, Any]]) -> None:
    largest = max(end - start for start, end in ranks[0]["places"])
    for rank in ranks:
        assert rank["own"] <= sum(rank["asked"]) <= rank["own"] + 2 * 3 * largest
        assert max(rank["asked"]) <= largest


def test_what_was_written_is_what_every_rank_has_again(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["equal"] for rank in ranks)
