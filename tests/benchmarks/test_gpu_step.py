"""The one-device benchmark, all but the GPU: toy shapes on the CPU."""

import pytest
import torch
from gpu_cases.shapes import STUDENTS, forward_flops, parameters, write_folder
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from ctpd_nemo.convert.architecture import read_architecture
from tests.benchmarks.script import run_benchmark

TOY = ["--device", "cpu", "--shapes", "toy", "--precisions", "fp32", "--workers", 0]
TOY += ["--pairs", 8, "--batch", 4, "--max-length", 128, "--microbatch-tokens", 256]
TOY += ["--scoring-tokens", 256, "--steps", 3, "--warmup", 1]
TOY += ["--head-hidden", 16, "--head-vocab", 200, "--head-length", 8]


@pytest.fixture(scope="module")
def report(world, tmp_path_factory):
    tokenizers = ["--student-tokenizer", world.student, "--teacher-tokenizer", world.teacher]
    folder = tmp_path_factory.mktemp("gpu_step")
    return run_benchmark("gpu_step.py", folder, *TOY, *tokenizers, "--preferences", world.train)["results"]


def test_students_train_and_teachers_score(report):
    train, score = report["cases"]
    assert (train["case"]["part"], score["case"]["part"]) == ("train", "score")
    for case in (train, score):
        assert len(case["steps"]) == 2
        assert case["matrix_rate"]["flops_per_second"] > 0
        for step in case["steps"]:
            assert 0 < step["response_tokens"] < step["tokens"]
            # Every weight of the layers multiplies every token once; the backward pass counts twice.
            assert step["flops"] > 2 * step["tokens"] * 2 * (64 * 64 + 3 * 64 * 128)
    # Drawn weights know nothing: every token of every span costs about the log of the vocabulary.
    assert -40 < score["steps"][0]["mean_score"] < -5
    # Invented scores are far above what the student begins with, which makes the loss no ln 2.
    assert all(step["loss"] > 0 for step in train["steps"])


def test_all_heads_compute_one_loss(report):
    (head,) = report["head"].values()
    assert {"lean", "plain", "megatron"} <= set(head)
    for name, side in head.items():
        assert side["loss"] == pytest.approx(head["plain"]["loss"], rel=1e-5), name
        # Megatron-Core's fused backward gives gradients in bf16.
        assert side["gradient_error"] < (1e-2 if name == "megatron" else 1e-5), name


def test_a_recipe_that_is_not_there_is_named_and_the_others_go_on(world, tmp_path):
    precisions = ["--parts", "score", "--precisions", "mxfp8", "fp32", "--steps", 2]
    data = ["--student-tokenizer", world.student, "--teacher-tokenizer", world.teacher, "--preferences", world.train]
    mxfp8, fp32 = run_benchmark("gpu_step.py", tmp_path, *TOY, *precisions, *data)["results"]["cases"]
    assert "mxfp8" in mxfp8["failed"]
    assert len(fp32["steps"]) == 1


def test_operations_and_weights_against_transformers(world, tmp_path):
    write_folder(tmp_path / "toy", STUDENTS["toy"], world.student, layers=2)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "toy", attn_implementation="eager"))
    architecture, tokens = read_architecture(tmp_path / "toy"), 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(tokens)[None])
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    # transformers multiplies all queries with all keys; those that the causal mask leaves are (T + 1) of 2 T.
    attention = counts.pop("aten.bmm") * (tokens + 1) / (2 * tokens)
    assert forward_flops(architecture, [tokens], tokens) == pytest.approx(sum(counts.values()) + attention, rel=1e-9)
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    assert parameters(architecture) == matrices
