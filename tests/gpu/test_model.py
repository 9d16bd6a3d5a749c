"""Span log-probs of Transformer Engine's layers: against ``transformers``, packed against alone, FP8 against bf16."""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.models.config import ModelsConfig, RunConfig, SideConfig
from ctpd_nemo.models.data import RunData
from ctpd_nemo.models.dpo import DPOConfig
from ctpd_nemo.models.teacher import FrozenModel
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.parallel.precision import PrecisionConfig
from tests.gpu.world import MAX_LENGTH, NUM_PAIRS

# Mean difference of a span's log-prob, in nats, and what the log-probs themselves must agree in.
BF16_TOLERANCE = 0.02
FP8_TOLERANCE = 0.15
FP8_CORRELATION = 0.98


def microbatches(world: Path, name: str, precision: PrecisionConfig, packing: str = "packed") -> list[Microbatch]:
    """All pairs, as the model of a folder reads them."""
    run = RunConfig(method=DPOConfig(), model=ModelsConfig(SideConfig(str(world / name))), precision=precision)
    run.data = dataclasses.replace(
        run.data,
        train=[str(world / "pairs.jsonl")],
        max_length=MAX_LENGTH,
        microbatch_tokens=2048,
        global_batch_size=NUM_PAIRS,
        shuffle=False,
        num_workers=0,
        packing=packing,
    )
    (step,) = RunData(run, ("chosen", "rejected"), two_sided=False).train_loader(0, 1, 0)
    return [microbatch.to("cuda") for microbatch in step.microbatches]


def scores(world: Path, name: str, precision: PrecisionConfig, packing: str = "packed") -> Tensor:
    """The log-prob of every span of all pairs, in the order of the pairs."""
    batches = microbatches(world, name, precision, packing)
    return in_order(batches, FrozenModel(str(world / name), ParallelConfig(), precision).score(batches))


def in_order(batches: list[Microbatch], scored: list[Tensor]) -> Tensor:
    """Scores of spans in the order of the pairs' rows, however they were packed."""
    rows: dict[int, Tensor] = {}
    for microbatch, score_S in zip(batches, scored, strict=True):
        sizes = torch.bincount(microbatch.span_response.long(), minlength=microbatch.num_responses).tolist()
        responses = score_S.split(sizes)
        for row, chosen, rejected in zip(
            microbatch.pair_index.tolist(), microbatch.chosen.tolist(), microbatch.rejected.tolist(), strict=True
        ):
            rows[row] = torch.cat([responses[chosen], responses[rejected]])
    return torch.cat([rows[row] for row in sorted(rows)]).double().cpu()


def in_transformers(world: Path, name: str) -> Tensor:
    """The same in fp32 by ``transformers``, a sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(world / name, dtype=torch.float32, attn_implementation="eager").cuda()
    batches = microbatches(world, name, PrecisionConfig())
    return in_order(batches, [_in_transformers(model, microbatch) for microbatch in batches])


@torch.no_grad()
def _in_transformers(model: PreTrainedModel, microbatch: Microbatch) -> Tensor:
    score_S = torch.zeros(microbatch.num_spans, dtype=torch.float64, device=microbatch.tokens.device)
    for begin, end in itertools.pairwise(microbatch.cu_seqlens.tolist()):
        at = begin + (microbatch.labels[begin:end] >= 0).nonzero().squeeze(1)
        every = model(microbatch.tokens[None, begin:end]).logits[0].double().log_softmax(-1)
        score_S.index_add_(0, microbatch.span_ids[at].long(), every[at - begin, microbatch.labels[at]])
    return score_S


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_bf16_log_probs_are_those_of_transformers(world: Path, name: str) -> None:
    difference = scores(world, name, PrecisionConfig()) - in_transformers(world, name)
    assert float(difference.abs().mean()) < BF16_TOLERANCE


def test_packed_and_padded_sequences_have_the_same_log_probs(world: Path) -> None:
    packed, padded = (scores(world, "student", PrecisionConfig(), packing) for packing in ("packed", "padded"))
    assert float((packed - padded).abs().mean()) < BF16_TOLERANCE / 2


def test_fp8_log_probs_are_near_those_of_bf16(world: Path, fp8: PrecisionConfig) -> None:
    for name in ("student", "teacher"):
        found, expected = scores(world, name, fp8), scores(world, name, PrecisionConfig())
        assert float((found - expected).abs().mean()) < FP8_TOLERANCE
        assert float(torch.corrcoef(torch.stack([found, expected]))[0, 1]) > FP8_CORRELATION
        assert not torch.equal(found, expected), "nothing was computed in FP8"


def test_first_and_last_layers_in_bf16_bring_fp8_nearer(world: Path, fp8: PrecisionConfig) -> None:
    if fp8.fp8 == "delayed":
        pytest.skip("delayed scaling has no layers in bf16")
    expected = scores(world, "teacher", PrecisionConfig())
    some = dataclasses.replace(fp8, bf16_first_layers=1, bf16_last_layers=2)
    errors = [float((scores(world, "teacher", precision) - expected).norm()) for precision in (fp8, some)]
    assert errors[1] < errors[0]


def test_frozen_fp8_weights_score_alike_in_about_half_the_memory(world: Path, fp8: PrecisionConfig) -> None:
    only = dataclasses.replace(fp8, fp8_frozen_weights=True)
    expected, found = scores(world, "teacher", fp8), scores(world, "teacher", only)
    assert float((found - expected).abs().mean()) < FP8_TOLERANCE
    held = []
    for precision in (PrecisionConfig(), only):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        model = FrozenModel(str(world / "teacher"), ParallelConfig(), precision)
        held.append(torch.cuda.memory_allocated() - before)
        del model
    # Embedding, output layer, norms and biases stay in bf16: 82 thousand of these 2.7 million parameters.
    assert held[1] < 0.62 * held[0]
