"""The leaderboard's tasks over local rows, against ``transformers`` one choice at a time."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.card import evaluation_rows
from ctpd_nemo.evaluation.evaluate import EvaluateConfig, PairsConfig, TasksConfig, evaluate
from ctpd_nemo.evaluation.harness import run_harness
from ctpd_nemo.evaluation.local_rows import read_local_rows
from ctpd_nemo.evaluation.preferences import evaluate_folder
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from tests.pipeline.recipe import small_world
from tests.pipeline.tool import run_tool

MADE: dict[str, list[dict[str, Any]]] = {
    "hellaswag": [
        {"ctx": f"Adding: Somebody adds {n} and 2. they", "endings": ["say so.", f"say {n + 2}.", "go", "sit down."]}
        | {"label": n % 4}
        for n in range(10)
    ],
    "arc_challenge": [
        {"question": f"What is {n} and 1?", "choices": [str(n), str(n + 1), "none"], "label": 1} for n in range(4)
    ],
    "mmlu": [
        {"subject": subject, "question": f"Is {n} even?", "choices": ["yes", "no", "both", "neither"], "label": n % 2}
        for n in range(3)
        for subject in ("anatomy", "virology")
    ],
    "truthfulqa_mc": [
        {"question": f"Is {n} odd?", "mc2_choices": ["Yes", "It is", "No"], "mc2_labels": [1, 1, 0]} for n in range(3)
    ],
    "winogrande": [
        {"sentence": f"A met {n} Bs because _ was late.", "option1": "A", "option2": "B", "answer": str(1 + n % 2)}
        for n in range(4)
    ],
    "gsm8k": [{"question": f"{n} and 2?", "answer": f"It is {n + 2}.\n#### {n + 2}"} for n in range(3)],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    return small_world(tmp_path_factory.mktemp("tiny") / "world")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for name, rows in MADE.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@torch.no_grad()
def choice_logprob(model: Any, tokenizer: Any, context: str, choice: str) -> float:
    """log p(choice | context), one sequence in double precision."""
    whole = tokenizer(context + choice)["input_ids"]
    start = len(tokenizer(context)["input_ids"])
    steps = torch.log_softmax(model(torch.tensor([whole])).logits[0], dim=-1)
    return sum(steps[at - 1, whole[at]].item() for at in range(start, len(whole)))


def test_hellaswag_equals_one_choice_at_a_time(world: TinyWorld, data: Path) -> None:
    pytest.importorskip("lm_eval")
    tokenizer = AutoTokenizer.from_pretrained(world.student)
    model = AutoModelForCausalLM.from_pretrained(world.student).double()
    right = []
    for row in MADE["hellaswag"]:
        scores = [choice_logprob(model, tokenizer, row["ctx"], f" {ending}") / len(ending) for ending in row["endings"]]
        right.append(float(scores.index(max(scores)) == row["label"]))
    found = run_harness(world.student, ["hellaswag"], data=data, num_fewshot=0)["hellaswag"]
    assert found["n"] == 10
    assert found["value"] == pytest.approx(sum(right) / 10)
    assert found["standard_error"] == pytest.approx(torch.tensor(right).std().item() / 10**0.5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        # The harness alone would draw these weights at random, and score what comes of it.
        (lambda weights: weights.pop("model.layers.0.mlp.up_proj.weight"), r"missing keys: model\.layers\.0\.mlp\.up"),
        (lambda weights: weights["model.norm.weight"].fill_(float("nan")), "found logits that are not finite"),
    ],
)
def test_a_broken_model_has_no_scores(
    spoil: Callable[[dict[str, torch.Tensor]], Any], message: str, world: TinyWorld, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    folder = shutil.copytree(world.student, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    spoil(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=message):
        run_harness(folder, ["hellaswag"], data=data, num_fewshot=0, limit=2)
    with pytest.raises(InputError, match=message):
        evaluate_folder(folder, world.test)


@pytest.mark.slow
def test_all_tasks_run_on_local_rows_and_land_in_the_card(world: TinyWorld, data: Path) -> None:
    pytest.importorskip("lm_eval")
    config = EvaluateConfig(str(world.student), TasksConfig(data=str(data), num_fewshot=1, limit=2))
    config.pairs = PairsConfig(str(world.test), str(world.teacher), max_new_tokens=8)
    found = evaluate(config)
    assert found["tasks"].keys() == {"arc_challenge", "gsm8k", "hellaswag", "mmlu", "truthfulqa_mc2", "winogrande"}
    assert found["tasks"]["mmlu"]["n"] == 4
    assert json.loads((world.student / "evaluation.json").read_text()) == found
    card = (world.student / "README.md").read_text()
    for name in (*found["tasks"], "brier_score", "mean_tokens_sampled"):
        assert name in card
    # What a later evaluation does not touch stays.
    again = evaluate(EvaluateConfig(str(world.student), TasksConfig(["winogrande"], str(data), 0)))
    assert again["tasks"]["winogrande"]["n"] == 4
    assert again["tasks"]["gsm8k"] == found["tasks"]["gsm8k"]
    assert again["preferences"] == found["preferences"]


def test_the_tool_writes_the_evaluation_and_says_what_is_wrong(world: TinyWorld, tmp_path: Path) -> None:
    folder = shutil.copytree(world.student, tmp_path / "export")
    arguments = [f"folder={folder}", "tasks.names=[]", f"pairs.file={world.test}", "pairs.max_new_tokens=4"]
    status, stdout, stderr = run_tool("evaluate.py", arguments, tmp_path)
    assert status == 0, stderr
    assert "| held-out pairs | preference_accuracy |" in stdout
    assert json.loads((folder / "evaluation.json").read_text())["preferences"]["n"] == 4
    (folder / "evaluation.json").write_text("[]")
    status, _, stderr = run_tool("evaluate.py", arguments, tmp_path)
    assert status == 2
    assert "evaluation.json: found a JSON list; expected a JSON object" in stderr


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EvaluateConfig(batch_size=0), "batch_size: found 0; expected 1 or more"),
        (EvaluateConfig(tasks=TasksConfig(limit=0)), r"tasks\.limit: found 0; expected 1 or more"),
        (EvaluateConfig(tasks=TasksConfig(max_length=1)), r"tasks\.max_length: found 1; expected 2 or more"),
        (EvaluateConfig(pairs=PairsConfig(limit=-1)), r"pairs\.limit: found -1; expected 1 or more"),
        (EvaluateConfig(pairs=PairsConfig(max_new_tokens=0)), r"pairs\.max_new_tokens: found 0; expected 1 or more"),
        (EvaluateConfig(pairs=PairsConfig(beta=float("nan"))), r"pairs\.beta: found nan; expected a positive number"),
        (EvaluateConfig(seed=-1), "seed: found -1; expected 0 to"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(config: EvaluateConfig, message: str, tmp_path: Path) -> None:
    config.folder = str(tmp_path)
    with pytest.raises(InputError, match=message):
        evaluate(config)


def test_two_evaluations_side_by_side_keep_each_others_results(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(world.student, tmp_path / "export")
    task = {"metric": "acc", "value": 0.5, "standard_error": None, "n": 4}

    def meanwhile(*_: Any, **__: Any) -> Any:
        (folder / "evaluation.json").write_text(json.dumps({"tasks": {"winogrande": task}}))
        return evaluate_folder(world.student, world.test, max_new_tokens=1, generations=2)

    monkeypatch.setattr("ctpd_nemo.evaluation.evaluate.evaluate_folder", meanwhile)
    evaluate(EvaluateConfig(str(folder), TasksConfig([]), PairsConfig(str(world.test))))
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["tasks"] == {"winogrande": task}
    assert found["preferences"]["n"] == 4
    # Two of the four prompts were answered.
    rows = {row["metric"]: row["n"] for row in evaluation_rows(found)}
    assert (rows["answer_accuracy"], rows["preference_accuracy"], rows["acc"]) == (2, 4, 4)


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_row_of_another_form_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.jsonl"
    path.write_text(json.dumps(MADE[name][0]) + '\n{"question": 1}\n')
    with pytest.raises(InputError, match=rf"{name}\.jsonl:2: found .*; expected a row of {name}"):
        read_local_rows(tmp_path, name)


@pytest.mark.parametrize("name", ["hellaswag", "mmlu", "truthfulqa_mc", "gsm8k"])
def test_real_samples_are_read(name: str, shared_dir: Path) -> None:
    asked, _ = read_local_rows(shared_dir / "eval", name)
    assert len(asked) == len((shared_dir / "eval" / f"{name}.jsonl").read_text().splitlines())


def test_what_cannot_be_run_is_named(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(InputError, match=r"tasks\.names: found 'humaneval'"):
        run_harness(tmp_path, ["humaneval"])
    with pytest.raises(InputError, match=r"winogrande\.jsonl: found no such file"):
        run_harness(tmp_path, ["winogrande"], data=tmp_path)
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MADE["gsm8k"]))
    with pytest.raises(InputError, match=r"found 2 rows for examples; expected 5"):
        run_harness(tmp_path, ["gsm8k"], data=tmp_path)


def test_datasets_out_of_reach_are_told(world: TinyWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")

    def unreachable(**_: Any) -> None:
        raise ConnectionError("Couldn't reach\n'Rowan/hellaswag' on the Hub")

    monkeypatch.setattr("lm_eval.tasks.get_task_dict", lambda _: {})
    monkeypatch.setattr("lm_eval.simple_evaluate", unreachable)
    with pytest.raises(InputError, match=r"tasks\.data: found null, and no data of hellaswag \(Couldn't reach 'R"):
        run_harness(world.student, ["hellaswag"])
