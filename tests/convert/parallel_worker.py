"""Run by ``test_parallel_load`` in several processes: load folders in several layouts and compare the logits of each.

Arguments: layouts as ``tensor,pipeline,virtual``, joined by ``:``; then folders. Beside each folder lies
``<folder>.pt`` with ``ids`` ``[T]``, the expected ``logits`` ``[T, V]``, and whether to ``save`` the loaded model as a
checkpoint ``<folder>-<layout>``. Prints layout, folder, largest difference.
"""

import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from ctpd_nemo.convert.architecture import Architecture, read_architecture
from ctpd_nemo.convert.load import load_hf_weights
from ctpd_nemo.models.gpt import build_gpt
from ctpd_nemo.parallel import checkpoint
from ctpd_nemo.parallel.layout import ParallelConfig, initialize
from ctpd_nemo.parallel.precision import PrecisionConfig


def hidden_states(chunks: list[GPTModel], ids: Tensor, parallel: ParallelConfig, width: int) -> Tensor:
    """Walk one sequence through all chunks by hand; every rank returns the last stage's hidden states ``[T, H]``."""
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    packed = PackedSeqParams("thd", cu_seqlens, cu_seqlens, max_seqlen_q=len(ids), max_seqlen_kv=len(ids))
    positions = torch.arange(len(ids))[None]
    stage, group = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_group()
    hidden = torch.empty(len(ids), 1, width)
    for chunk in chunks:
        for at in range(parallel.pipeline):
            if at == stage:
                chunk.set_input_tensor(None if chunk.pre_process else hidden)
                hidden = chunk(ids[None], positions, None, packed_seq_params=packed)
                hidden = hidden.reshape(len(ids), 1, width).contiguous()
            dist.broadcast(hidden, group=group, group_src=at)
    return hidden.flatten(0, 1)


def logits_of(
    chunks: list[GPTModel], ids: Tensor, parallel: ParallelConfig, architecture: Architecture
) -> Tensor | None:
    """Logits ``[T, V]`` on the ranks of the last stage."""
    hidden = hidden_states(chunks, ids, parallel, architecture.hidden_size)
    if not chunks[-1].post_process:
        return None
    weight = chunks[-1].output_layer.weight
    if weight is None:
        weight = chunks[-1].embedding.word_embeddings.weight
    shares = [torch.empty(len(ids), weight.shape[0]) for _ in range(parallel.tensor)]
    dist.all_gather(shares, hidden @ weight.T, group=parallel_state.get_tensor_model_parallel_group())
    logits, padding = torch.cat(shares, dim=1).tensor_split([architecture.vocab_size], dim=1)
    assert padding.shape[1] == -architecture.vocab_size % parallel.tensor
    assert not padding.any()
    return logits


@torch.no_grad()
def main() -> None:
    for layout in sys.argv[1].split(":"):
        tensor, pipeline, virtual = (int(size) for size in layout.split(","))
        parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual if virtual > 1 else None)
        initialize(parallel)
        for folder in map(Path, sys.argv[2:]):
            case = torch.load(folder.with_suffix(".pt"))
            architecture = read_architecture(folder)
            chunks = build_gpt(architecture, parallel, PrecisionConfig("fp32"))
            load_hf_weights(chunks, folder, architecture)
            if case["save"]:
                checkpoint.save(f"{folder}-{layout}", chunks, None, checkpoint.TrainState({}, {}))
            logits = logits_of(chunks, case["ids"], parallel, architecture)
            if logits is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
                print("logits", layout, folder.name, (logits - case["logits"]).abs().max().item(), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
