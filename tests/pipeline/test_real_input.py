"""The recipe on real input: the tokenizers of Qwen2 and Llama-3 with all their tokens, and real preference pairs.

The models are narrow and untrained, but have as many vocabulary rows as the real ones. Needs the shared/ folder.
"""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PretrainedConfig, Qwen2Config

from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded_pair import EncodedPair, EncodedResponse
from ctpd_nemo.data.preferences import open_preferences
from ctpd_nemo.data.templates import Side
from ctpd_nemo.pipeline import quiet
from ctpd_nemo.pipeline.stages import StageResult, run_pipeline
from tests.pipeline.recipe import composed
from tests.pipeline.tool import run_tool
from tests.rounding import of_long_sum, of_model

MAX_LENGTH = 256
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True}
_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Rows of the embedding: Qwen2.5 has more than tokens, Llama 3 just as many.
WORDS = 152064
TEACHER = Qwen2Config(**_SIZES, vocab_size=WORDS)
STUDENT = LlamaConfig(**_SIZES, vocab_size=128256, rope_parameters=_ROPE)

# Of a model of two layers, whose products have sums of 48 terms at the most.
TOLERANCE = of_model(2, 48)


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> None:
    quiet.after_imports()


@pytest.fixture(scope="module")
def world(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``teacher`` and ``student``, and eight pairs in ``pairs.jsonl``."""
    home = tmp_path_factory.mktemp("real")
    write_model(home / "teacher", TEACHER, shared_dir / "tokenizers/qwen2", seed=1)
    write_model(home / "student", STUDENT, shared_dir / "tokenizers/llama3", seed=2)
    with (shared_dir / "preferences/train.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    (home / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in handful(rows)), encoding="utf-8")
    return home


def handful(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shortest pairs above 100 characters: multi-turn Chinese, single-turn Chinese and English, with a system."""
    chosen: list[dict[str, Any]] = []
    kinds = (
        (3, lambda row: row["source"] == "oasst1_zh" and len(row["prompt"]) >= 3),
        (1, lambda row: row["source"] == "oasst1_zh" and len(row["prompt"]) == 1),
        (2, lambda row: row["source"] == "mt_bench_human"),
        (2, lambda row: row["prompt"][0]["role"] == "system"),
    )
    for count, is_of_kind in kinds:
        found = [row for row in rows if is_of_kind(row) and characters(row) > 100 and row not in chosen]
        chosen += sorted(found, key=characters)[:count]
    assert len(chosen) == 8
    return chosen


def characters(row: dict[str, Any]) -> int:
    return sum(len(message["content"]) for name in ("prompt", "chosen", "rejected") for message in row[name])


def write_model(folder: Path, config: PretrainedConfig, tokenizer: Path, seed: int) -> None:
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for path in tokenizer.iterdir():
        shutil.copyfile(path, folder / path.name)


def recipe(world: Path, run_dir: Path) -> list[str]:
    """Two steps a stage."""
    return [
        f"model.teacher.path={world / 'teacher'}",
        f"model.student.path={world / 'student'}",
        f"data.train=[{world / 'pairs.jsonl'}]",
        f"run_dir={run_dir}",
        "precision=fp32",
        f"data.max_length={MAX_LENGTH}",
        f"data.microbatch_tokens={2 * MAX_LENGTH}",
        "data.global_batch_size=4",
        "data.num_workers=1",
        *(f"stages.{name}.optim.lr=1e-3" for name in ("sft_teacher", "sft_student")),
        *(f"stages.{name}.optim.lr=1e-3" for name in ("dpo_positive", "dpo_negative", "ctpd")),
        # Adam divides by the gradient's size: what is rounding alone would be blown up where a smaller epsilon let it.
        "optim.eps=1e-4",
    ]


@dataclasses.dataclass(frozen=True)
class Finished:
    """What the recipe left."""

    world: Path
    run_dir: Path
    results: dict[str, StageResult]


@pytest.fixture(scope="module")
def finished(world: Path) -> Finished:
    run_dir = world / "run"
    return Finished(world, run_dir, run_pipeline(composed("pipeline", recipe(world, run_dir))))


def scores(run_dir: Path, role: str) -> dict[str, tuple[list[float], list[float]]]:
    rows = pq.read_table(run_dir / f"score/cache/{role}-00000.parquet").to_pylist()
    return {row["pair_id"]: (row["chosen"], row["rejected"]) for row in rows}


def encoded_pairs(finished: Finished) -> Iterator[EncodedPair]:
    teacher, student = (Side(AutoTokenizer.from_pretrained(finished.world / name)) for name in ("teacher", "student"))
    pairs = open_preferences(finished.world / "pairs.jsonl")
    for pair in PairEncoder(student, teacher, True, MAX_LENGTH).encode(range(len(pairs)), pairs[:]):
        assert isinstance(pair, EncodedPair)
        yield pair


def of_words(response: EncodedResponse) -> float:
    """How far a span's score may be off by the sums over all words, of each of its tokens."""
    return int(np.bincount(response.reference.response_span).max()) * of_long_sum(WORDS)


def test_every_stage_is_done_on_all_pairs(finished: Finished) -> None:
    assert list(finished.results) == ["sft_teacher", "sft_student", "dpo_positive", "dpo_negative", "score", "ctpd"]
    for name in finished.results:
        if name != "score":
            rows = [json.loads(line) for line in (finished.run_dir / name / "metrics.jsonl").read_text().splitlines()]
            assert [row["step"] for row in rows] == [1, 2]
            assert all(row["skipped"] == 0 and np.isfinite(row["loss"]) for row in rows)
    assert len(scores(finished.run_dir, "reference")) == 8


def test_span_scores_are_those_of_transformers(finished: Finished) -> None:
    """The teacher that SFT exported, read by ``transformers``, gives every span of every response the cached score."""
    model = AutoModelForCausalLM.from_pretrained(finished.results["sft_teacher"].output).eval()
    cached = scores(finished.run_dir, "reference")
    split = 0
    for pair in encoded_pairs(finished):
        for response, found in zip((pair.chosen, pair.rejected), cached[pair.id], strict=True):
            tokens = response.reference
            ids = torch.tensor(np.concatenate([tokens.prompt_ids, tokens.response_ids]).astype(np.int64))
            with torch.no_grad():
                logprobs = model(ids[None]).logits[0].double().log_softmax(-1)
            at = len(tokens.prompt_ids) - 1 + torch.arange(len(tokens.response_ids))
            expected = torch.zeros(response.n_spans, dtype=torch.float64)
            expected.index_add_(0, torch.tensor(tokens.response_span).long(), logprobs[at, ids[at + 1]])
            np.testing.assert_allclose(found, expected.numpy(), rtol=TOLERANCE, atol=of_words(response))
            split += len(response.policy.response_ids) != len(tokens.response_ids)
    # The two tokenizers do cut these responses in different ways.
    assert split > 8


def test_the_exported_student_loads_in_transformers_and_answers(finished: Finished) -> None:
    folder = finished.results["ctpd"].output
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.get_input_embeddings().weight.shape == (128256, 32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "你好"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert answer.shape[1] > prompt["input_ids"].shape[1]


@pytest.mark.parametrize("sizes", ["{tensor:2}", "{pipeline:2}"])
@pytest.mark.slow
def test_two_processes_get_the_same_models_and_scores(finished: Finished, tmp_path: Path, sizes: str) -> None:
    overrides = [*recipe(finished.world, tmp_path / "run"), f"parallel={sizes}"]
    status, _, stderr = run_tool("pipeline.py", overrides, tmp_path, processes=2)
    assert status == 0, stderr
    for name, result in finished.results.items():
        if name != "score":
            one = load_file(result.output / "model.safetensors")
            two = load_file(tmp_path / "run" / name / "export/model.safetensors")
            for tensor, values in one.items():
                assert (two[tensor] - values).norm() <= 2 * TOLERANCE * values.norm(), f"{name}: {tensor}"
    off = 2 * max(of_words(response) for pair in encoded_pairs(finished) for response in (pair.chosen, pair.rejected))
    for role in ("reference", "positive", "negative"):
        one_scores, two_scores = scores(finished.run_dir, role), scores(tmp_path / "run", role)
        assert one_scores.keys() == two_scores.keys()
        for pair_id, sides in one_scores.items():
            for found, expected in zip(two_scores[pair_id], sides, strict=True):
                np.testing.assert_allclose(found, expected, rtol=2 * TOLERANCE, atol=off)
