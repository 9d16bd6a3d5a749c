"""What the planner says of distillation against real steps and counted operators."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from ctpd_nemo.data.batch import Microbatch
from ctpd_nemo.data.loader import StepBatch
from ctpd_nemo.losses import whole_logits
from ctpd_nemo.losses.dskd import PROJECTORS, divergence
from ctpd_nemo.losses.top_logprobs import top_logprobs
from ctpd_nemo.losses.uld import paired_rows, sorted_distance
from ctpd_nemo.losses.whole_logits import WholeLogits, loss_of_logits
from ctpd_nemo.models.config import RunConfig
from ctpd_nemo.models.distillation import DistillationModel
from ctpd_nemo.models.forward import StepLoss
from ctpd_nemo.models.response_states import ResponseStates, response_lengths
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.parallel.precision import PrecisionConfig
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from ctpd_nemo.planner import distillation as planned
from ctpd_nemo.planner.distillation import DistillationLoss, loss_bytes, loss_flops
from ctpd_nemo.planner.estimate import check_layout, estimate
from ctpd_nemo.planner.flops import hardware_flops
from ctpd_nemo.planner.hardware import Hardware
from ctpd_nemo.planner.jobs import Layout
from ctpd_nemo.planner.numerics import numerics_of
from ctpd_nemo.planner.shapes import Shape, shape_of
from ctpd_nemo.planner.workload import Lengths
from tests.pipeline.recipe import composed, small_job, small_world
from tests.planner.conftest import SMALL, benchmark, jobs_of

pytestmark = pytest.mark.usefixtures("one_quiet_thread")

METHODS = {
    "uld": ("uld",),
    "uld of the largest": ("uld", "method.top_k=12"),
    "dskd": ("dskd",),
    "multilevel_ot": ("multilevel_ot", "method.top_k=12"),
}


WORKER = benchmark("planner_worker")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return small_world(tmp_path_factory.mktemp("distillation"))


def job(world: TinyWorld, run_dir: Path, method: Sequence[str], *more: str) -> RunConfig:
    """One step beside the teacher."""
    values = small_job(world, run_dir, *method, f"model.teacher.path={world.teacher}", "trainer.max_steps=1", *more)
    return run_config(composed("train", values))


class Seen:
    """The batches of a job, its loss, and the memory that the loss of its last microbatch takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, memory: bool = False) -> None:
        self.batches: list[StepBatch] = []
        self.loss: DistillationLoss | None = None
        self.bytes = 0
        prepare, loss_of = DistillationModel.prepare_step, DistillationModel.microbatch_loss

        def spy(model: DistillationModel, batch: StepBatch) -> None:
            self.batches.append(batch)
            method, teacher = model.run.method, model.teacher.architecture
            self.loss = DistillationLoss(method.name, model.architecture, teacher, getattr(method, "top_k", None))
            prepare(model, batch)

        def measured(model: DistillationModel, states: ResponseStates, microbatch: Microbatch) -> StepLoss:
            weight_VH = states.weight_VH.detach().requires_grad_()
            alone = replace(states, hidden_NH=states.hidden_NH.detach().requires_grad_(), weight_VH=weight_VH)
            live = WORKER.LiveBytes()
            live.ignore(tensor for tensor in vars(alone).values() if isinstance(tensor, Tensor))
            for chunk in (*model.chunks, *model.teacher.chunks):
                live.ignore(chunk.parameters())
            with live:
                total = model.terms(alone, microbatch).total
                projectors = [one for name, one in model.chunks[-1].named_parameters() if PROJECTORS in name]
                torch.autograd.grad(total, (alone.hidden_NH, weight_VH, *projectors))
            self.bytes = live.peak
            return loss_of(model, states, microbatch)

        monkeypatch.setattr(DistillationModel, "prepare_step", spy)
        # What a job writes down of its last weights is no part of a step.
        monkeypatch.setattr("ctpd_nemo.pipeline.callbacks.take_probe", lambda model: None)
        if memory:
            monkeypatch.setattr(DistillationModel, "microbatch_loss", measured)


@pytest.mark.parametrize("method", METHODS)
def test_operations_are_those_that_torch_counts(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    seen = Seen(monkeypatch)
    run = job(world, tmp_path, METHODS[method])
    with FlopCounterMode(display=False, custom_mapping=WORKER._UNCOUNTED) as counted:
        train(run)
    ((batch,), loss) = seen.batches, seen.loss
    assert loss is not None
    assert loss.teacher is not None
    one, expected = ParallelConfig(), 0.0
    for own, other in zip(batch.microbatches, batch.reference_microbatches, strict=True):
        shapes = [_shape(own), _shape(other)]
        bare = [Shape(s.tokens, 0, s.sequences, s.longest, s.attended, s.scored) for s in shapes]
        expected += hardware_flops(loss.student, one, bare[0], device="cpu").total
        expected += hardware_flops(loss.teacher, one, bare[1], backward=False, device="cpu").total
        expected += loss_flops(loss, one, shapes[0].targets, shapes[1].targets, hardware=True)
        expected += _left_out(loss, own, other)
    assert counted.get_total_flops() == expected


def pair_of_equal_lengths(world: TinyWorld) -> str:
    """The row whose chosen response has as many tokens to both models, as the planner takes it to have."""
    sides = [AutoTokenizer.from_pretrained(folder) for folder in (world.teacher, world.student)]

    def apart(row: str) -> int:
        text = json.loads(row)["chosen"][0]["content"]
        teacher, student = (len(side(text, add_special_tokens=False)["input_ids"]) for side in sides)
        return abs(teacher - student)

    found = min(world.train.read_text(encoding="utf-8").splitlines(keepends=True), key=apart)
    assert apart(found) == 0
    return found


@pytest.mark.parametrize("method", METHODS)
def test_memory_of_the_loss_is_within_a_tenth(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    seen = Seen(monkeypatch, memory=True)
    data = tmp_path / "pair.jsonl"
    data.write_text(pair_of_equal_lengths(world))
    train(job(world, tmp_path / "run", METHODS[method], "data.global_batch_size=1", f"data.train=[{data}]"))
    ((batch,), loss) = seen.batches, seen.loss
    assert loss is not None
    numerics = numerics_of(PrecisionConfig("fp32"), loss.student)
    found = loss_bytes(loss, ParallelConfig(), numerics, _shape(batch.microbatches[-1]), "cpu")
    assert (found.saved + found.work) / seen.bytes == pytest.approx(1.0, abs=0.1)


def _shape(batch: Microbatch) -> Shape:
    lengths = batch.cu_seqlens.diff().tolist()
    return shape_of(lengths, int((batch.labels >= 0).sum()), "local")


def _left_out(loss: DistillationLoss, own: Microbatch, other: Microbatch) -> float:
    """What the planner leaves out: which tokens have one of the same number, and the attention of DSKD."""
    student_R, teacher_R = response_lengths(own), response_lengths(other)
    pairs = float((student_R * teacher_R).sum())
    assert loss.teacher is not None
    s, t = loss.student.hidden_size, loss.teacher.hidden_size
    if loss.name == "dskd":
        return 2.0 * pairs * (2 * (2 * t) + 3 * s + 3 * t)
    if loss.name == "uld" and loss.top_k is None:
        paired = int((paired_rows(student_R, teacher_R) >= 0).sum())
        return 2.0 * loss.teacher.vocab_size * t * (paired - min(int(student_R.sum()), int(teacher_R.sum())))
    return 0.0


class Moved(TorchDispatchMode):
    """Bytes that operators read and write of tensors of at least so many elements."""

    # Views, buffers that nobody has written yet, and what touches a few columns only.
    _FREE = ("view", "detach", "alias", "slice", "t", "transpose", "unsqueeze", "empty", "new_empty", "empty_like")
    _FREE += ("expand", "gather", "scatter_add_")

    def __init__(self, least: int) -> None:
        super().__init__()
        self.bytes, self._least = 0, least

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::").removeprefix("_unsafe_")
        if name not in self._FREE:
            for tensor in (*tree_leaves(args), *tree_leaves(result)):
                if isinstance(tensor, Tensor) and tensor.numel() >= self._least:
                    self.bytes += tensor.nbytes
        return result


TOKENS, WORDS, HIDDEN = 50, 4000, 4


def losses() -> dict[str, tuple[Callable[[], Tensor], int]]:
    """The losses as the models make them, over one chunk of tokens, and the bytes that the planner has for a logit."""
    hidden = [torch.randn(TOKENS, HIDDEN, requires_grad=True) for _ in range(3)]
    weight = torch.randn(WORDS, HIDDEN, requires_grad=True)
    labels = torch.randint(0, WORDS, (TOKENS,))
    other = WholeLogits(torch.randn(WORDS, HIDDEN), WORDS)

    def uld(logits: Tensor, part: slice) -> Tensor:
        logprobs = logits.log_softmax(dim=1)
        with torch.no_grad():
            target = other(hidden[1][part]).softmax(dim=1)
        return (F.nll_loss(logprobs, labels[part], reduction="sum") + sorted_distance(logprobs.exp(), target).sum())[
            None
        ]

    def student_space(logits: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            target = other(hidden[1][part])
            right = target.argmax(dim=1) == labels[part]
        pulled = (divergence(target, logits, 2.0) * right).sum()
        return (F.cross_entropy(logits, labels[part], reduction="sum") + pulled)[None]

    def projection(logits: Tensor, part: slice) -> Tensor:
        return F.cross_entropy(logits, labels[part], reduction="sum")[None]

    def teacher_space(logits: Tensor, part: slice) -> Tensor:
        with torch.no_grad():
            target = other(hidden[1][part])
        return divergence(target, logits, 2.0).sum()[None]

    def of(evaluate: whole_logits.LogitLoss, trained: bool = True) -> Callable[[], Tensor]:
        return lambda: loss_of_logits(evaluate, 1, hidden[0], weight if trained else weight.detach(), WORDS)[0]

    def largest() -> Tensor:
        found = top_logprobs(hidden[0], weight, labels, 50, WORDS)
        return found.label_N.sum() + found.top_NK.sum()

    return {
        "top_k": (largest, planned.TOP_K_BYTES),
        "uld": (of(uld), planned.ULD_STUDENT_BYTES + planned.ULD_TEACHER_BYTES),
        "dskd, student": (of(student_space), planned.DSKD_STUDENT_BYTES),
        "dskd, projection": (of(projection, trained=False), planned.DSKD_PROJECTION_BYTES),
        "dskd, teacher": (of(teacher_space, trained=False), planned.DSKD_TEACHER_BYTES),
    }


@pytest.mark.parametrize("name", ["top_k", "uld", "dskd, student", "dskd, projection", "dskd, teacher"])
def test_bytes_of_a_logit_are_those_that_operators_move(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_logits, "COPIES", 1)
    loss, bytes_of_logit = losses()[name]
    with Moved(TOKENS * WORDS // 2) as moved:
        loss().backward()  # type: ignore[no-untyped-call]
    assert moved.bytes / (TOKENS * WORDS) == pytest.approx(bytes_of_logit, rel=0.01)


@pytest.mark.parametrize("name", ["uld", "dskd", "multilevel_ot"])
def test_a_stage_of_distillation_is_planned(name: str, h100: Hardware, lengths: Lengths) -> None:
    jobs = jobs_of(SMALL, f"stages.{name}={{method:{{name:{name}}}}}")
    job, sft = jobs[name], jobs["sft_student"]
    layout = Layout(8, ParallelConfig(tensor=2, sequence=True), 8192)
    check_layout(job, layout)
    found, plain = (estimate(one, layout, h100, lengths) for one in (job, sft))
    assert job.responses == ("chosen",)
    # The teacher's forward pass: two operations a weight of its layers and token, of 6.5e9, beside six of 1.2e9.
    assert 2.0 < found.model_flops / plain.model_flops < 5.0
    assert found.step_seconds > plain.step_seconds
    teacher = 15.2e9 / 2
    assert found.stages[0].frozen == pytest.approx(teacher, rel=0.01)
    gathered = sum(one.payload for one in found.traffic if (one.group, one.kind) == ("tensor", "all-gather"))
    assert gathered > sum(one.payload for one in plain.traffic if (one.group, one.kind) == ("tensor", "all-gather"))


def test_a_cache_takes_the_teacher_away(h100: Hardware, lengths: Lengths) -> None:
    cached = "stages.uld={method:{name:uld,reference:cache,top_k:50}}"
    jobs = jobs_of(SMALL, cached, "stages.score.method.top_k=50", "stages.dskd={method:{name:dskd}}")
    layout = Layout(8, ParallelConfig(), 8192)
    uld, dskd, sft = (estimate(jobs[name], layout, h100, lengths) for name in ("uld", "dskd", "sft_student"))
    assert not jobs["uld"].frozen
    assert uld.model_flops == sft.model_flops
    assert uld.stages[0].frozen == 0
    # Three maps between widths of 3584 and 2048, six products of both, are trained beside the student's weights.
    more = dskd.stages[0].gradients - uld.stages[0].gradients
    assert more == pytest.approx(4 * 6 * 3584 * 2048, rel=0.01)


def test_the_log_probs_of_a_cache_are_as_many_as_the_score_stage_keeps() -> None:
    values = ["stages.uld={method:{name:uld,reference:cache}}", "stages.score.method.top_k=30"]
    loss = jobs_of(SMALL, *values)["uld"].loss
    assert loss is not None
    assert (loss.top_k, loss.teacher) == (30, None)
