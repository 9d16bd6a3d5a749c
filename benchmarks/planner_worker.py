"""Run by ``planner_memory.py`` in every process of a job: real training steps, every allocation and collective counted.

Arguments: a JSON file with a list of cases, and the folder that ``rank-<rank>.json`` goes to. A case is a dict of
``name``, ``architecture`` (the content of a ``config.json``), ``parallel``, ``precision``, ``frozen`` (how many models
of the same architecture stand beside the policy) and ``microbatches``: for each, the prompt and response tokens of
every sequence.

Bytes are those of tensor storages, each counted once: no allocator, no resident set. What a kernel allocates inside and
frees again before it returns is not seen.
"""

import contextlib
import json
import sys
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import MegatronModule
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, sdpa_backward_flop, sdpa_flop

from ctpd_nemo.convert.architecture import Architecture, parse_architecture
from ctpd_nemo.data.batch import Microbatch, build_microbatch
from ctpd_nemo.data.encoded_pair import EncodedPair, EncodedResponse, SideTokens
from ctpd_nemo.losses.logprobs import token_logprobs
from ctpd_nemo.models.forward import LossFunction, StepLoss, run_microbatches
from ctpd_nemo.models.gpt import build_gpt
from ctpd_nemo.parallel.layout import ParallelConfig, initialize
from ctpd_nemo.parallel.optimizer import LightningOptimizer, OptimConfig, build_optimizer, wrap_data_parallel
from ctpd_nemo.parallel.precision import PrecisionConfig

_CPU = torch.device("cpu")
# c10d's operators, as the dispatcher sees them, and where each keeps the tensors whose bytes are the payload: those
# that every rank ends with, or begins with, in full.
_COLLECTIVES = {
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::allreduce_coalesced_": ("all-reduce", 0),
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::allgather_into_tensor_coalesced_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::send": ("send", 0),
    "c10d::recv_": ("receive", 0),
}
# The CPU's attention kernels, and a product that is added in place, are not among those that the counter knows; these
# are its own formulas for the others.
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop(query, key, value)


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop(grad, query, key, value)


def _addmm_flops(total: Any, left: Any, right: Any, **_: Any) -> int:
    return addmm_flop(total, left, right)


_UNCOUNTED = {
    _ATTENTION: _attention_flops,
    _ATTENTION_BACKWARD: _attention_backward_flops,
    torch.ops.aten.addmm_: _addmm_flops,
}


def storage_bytes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of each storage that some tensors lie in, by its address."""
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make, until they are freed; ``peak`` is the most there were at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        self._old: set[int] = set()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leave out what was there before."""
        self._old |= set(storage_bytes(tensors))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._old or storage in self._known:
            return
        size = self._known[storage] = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size


class SavedBytes:
    """Counts the storages that autograd keeps for the backward pass; ``peak`` is the most there were at one time."""

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        self.now = self.peak = 0
        self._ignored = set(storage_bytes(ignored))
        self._held: Counter[int] = Counter()

    class _Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def pack(self, tensor: Tensor) -> "SavedBytes._Kept":
        kept = SavedBytes._Kept(tensor)
        ((address, size),) = storage_bytes([tensor]).items()
        if address not in self._ignored:
            self._held[address] += 1
            if self._held[address] == 1:
                self.now += size
                self.peak = max(self.peak, self.now)
            weakref.finalize(kept, self._dropped, address, size)
        return kept

    def _dropped(self, address: int, size: int) -> None:
        self._held[address] -= 1
        if not self._held[address]:
            self.now -= size

    def hooks(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda kept: kept.tensor)


class Collectives(TorchDispatchMode):
    """Counts calls and bytes of collectives by group and kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._names = _group_names()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("c10d::"):
            self._count(name, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        kind, place = _COLLECTIVES.get(name, (name, 0))
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
        if group.size() == 1:
            return
        payload = [tensor for tensor in tree_leaves(args[place]) if isinstance(tensor, Tensor)]
        # Megatron-Core receives over the default group where two stages have groups of their own to send over.
        name = "pipeline" if kind in ("send", "receive") else self._names.get(group.group_name, "other")
        key = f"{name} {kind}"
        self.calls[key] += 1
        self.bytes[key] += sum(tensor.nbytes for tensor in payload)


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())


def _group_names() -> dict[str, str]:
    """The name of what each of Megatron's groups is for. A group of one process is of no interest."""
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "context": parallel_state.get_context_parallel_group(),
        "embedding": parallel_state.get_embedding_group(check_initialized=False),
        "model": parallel_state.get_model_parallel_group(),
    }
    return {
        group.group_name: name for name, group in reversed(groups.items()) if group is not None and group.size() > 1
    }


def microbatch(sequences: Sequence[tuple[int, int]], vocab: int, parallel: ParallelConfig) -> Microbatch:
    """A microbatch of sequences of so many prompt and response tokens; two in a row are a pair."""

    def encoded(prompt: int, response: int) -> EncodedResponse:
        tokens = SideTokens(
            np.arange(prompt, dtype=np.int32) % vocab,
            np.arange(response, dtype=np.int32) % vocab,
            np.arange(response, dtype=np.int32),
        )
        return EncodedResponse(tokens, tokens, np.arange(response + 1), response, truncated=False)

    ends = [encoded(*sequence) for sequence in sequences]
    pairs = [EncodedPair(i, str(i), *pair) for i, pair in enumerate(zip(ends[::2], ends[1::2], strict=True))]
    return build_microbatch(
        pairs,
        pad_token_id=0,
        pad_to_multiple=parallel.token_shares(),
        sequence_multiple=2 * parallel.context if parallel.context > 1 else 1,
    )


def fill(chunks: Sequence[MegatronModule]) -> None:
    """Small weights in place of what happened to be in memory."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            torch.nn.init.normal_(parameter, std=0.02)


def minus_sum(policy_S: Tensor, batch: Microbatch) -> StepLoss:
    """The loss of SFT."""
    return StepLoss(-policy_S.sum(), len(policy_S))


class Case:
    """One case, built and ready to step."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.architecture: Architecture = parse_architecture(case["architecture"], case["name"])
        self.parallel = ParallelConfig(**case["parallel"])
        self.precision = PrecisionConfig(case["precision"])
        initialize(self.parallel)
        gpt = build_gpt(self.architecture, self.parallel, self.precision)
        fill(gpt)
        self.chunks = wrap_data_parallel(gpt, self.parallel)
        self.optimizer = LightningOptimizer(*build_optimizer(self.chunks, OptimConfig(), self.parallel, 10))
        self.frozen = [self._frozen() for _ in range(case["frozen"])]
        self.batches = [microbatch(one, self.architecture.vocab_size, self.parallel) for one in case["microbatches"]]

    def _frozen(self) -> list[Any]:
        with torch.no_grad():
            chunks = build_gpt(self.architecture, self.parallel, self.precision, frozen=True)
            fill(chunks)
        return [chunk.requires_grad_(False).eval() for chunk in chunks]

    def run(self, chunks: Sequence[MegatronModule], loss: LossFunction, forward_only: bool) -> None:
        run_microbatches(chunks, self.batches, self.architecture.vocab_size, loss, forward_only, _CPU)

    def step(self) -> None:
        """Forward, backward and the reduction of gradients."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.run(self.chunks, minus_sum, forward_only=False)

    def weights(self) -> list[Tensor]:
        return [parameter.data for chunk in self.chunks for parameter in chunk.parameters()]

    def gradients(self) -> list[Tensor]:
        return [buffer.grad_data for chunk in self.chunks for buffer in chunk.buffers]

    def optimizer_state(self) -> list[Tensor]:
        inner = [part.optimizer for part in self.optimizer.megatron.chained_optimizers]
        main = [parameter for adam in inner for group in adam.param_groups for parameter in group["params"]]
        state = [value for adam in inner for values in adam.state.values() for value in values.values()]
        return [tensor for tensor in [*main, *state] if isinstance(tensor, Tensor)]

    def known(self) -> list[Tensor]:
        """What is there before a step."""
        frozen = [parameter.data for chunks in self.frozen for chunk in chunks for parameter in chunk.parameters()]
        batches = [buffer for batch in self.batches for buffer in batch._buffers]
        return [*self.weights(), *self.gradients(), *self.optimizer_state(), *frozen, *batches]


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Bytes by kind, floating-point operations and collectives of one step on this rank."""
    built = Case(case)
    # The first step makes the optimizer's state, and the tables of rotary angles that are kept.
    built.step()
    built.optimizer.step()
    weights, gradients = storage_bytes(built.weights()), storage_bytes(built.gradients())
    optimizer = storage_bytes(built.optimizer_state())
    frozen = storage_bytes(p.data for chunks in built.frozen for chunk in chunks for p in chunk.parameters())
    live, saved, collectives = LiveBytes(), SavedBytes(built.known()), Collectives()
    live.ignore(built.known())
    with live, collectives, saved.hooks():
        built.step()
        before_update = live.peak
        built.optimizer.step()
    # By itself: this mode holds on to tensors.
    with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as flops:
        built.step()
    return {
        "case": case["name"],
        "rank": dist.get_rank(),
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(size for at, size in optimizer.items() if at not in weights and at not in gradients),
        "frozen": sum(frozen.values()),
        "activations": saved.peak,
        "step": before_update,
        "head": head_bytes(built),
        "scoring": scoring_bytes(built),
        "flops": flops.get_total_flops(),
        "bytes": dict(collectives.bytes),
        "calls": dict(collectives.calls),
    }


def head_bytes(built: Case) -> int:
    """The most that the log-probs of one microbatch take beyond their inputs, forward and backward."""
    batch, chunk = built.batches[0], built.chunks[-1].module
    if not chunk.post_process:
        return 0
    # Of which a context-parallel rank has about its share.
    count = round(int((batch.labels >= 0).sum()) / built.parallel.context)
    weight = (
        chunk.shared_embedding_or_output_weight() if built.architecture.tied_embeddings else chunk.output_layer.weight
    )
    hidden_NH = torch.randn(count, built.architecture.hidden_size, dtype=weight.dtype, requires_grad=True)
    weight_VH = weight.detach().requires_grad_()
    labels_N = torch.zeros(count, dtype=torch.int64)
    live = LiveBytes()
    live.ignore([hidden_NH, weight_VH, labels_N])
    with live:
        group = parallel_state.get_tensor_model_parallel_group()
        total = token_logprobs(hidden_NH, weight_VH, labels_N, built.architecture.vocab_size, group).sum()
        torch.autograd.grad(total, (hidden_NH, weight_VH))
    return live.peak


def scoring_bytes(built: Case) -> int:
    """The most that scoring with the first frozen model takes beyond what was there."""
    if not built.frozen:
        return 0
    live = LiveBytes()
    live.ignore(built.known())
    with live:
        built.run(built.frozen[0], minus_sum, forward_only=True)
    return live.peak


@contextlib.contextmanager
def process_groups() -> Iterator[None]:
    initialize(ParallelConfig())
    try:
        yield
    finally:
        dist.destroy_process_group()


def main() -> None:
    """Measure every case and write down what was found."""
    torch.set_num_threads(1)
    cases, folder = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2])
    with process_groups():
        found = [measure(case) for case in cases]
        (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
