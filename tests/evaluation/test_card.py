"""The model card, read back by ``huggingface_hub``."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.card import BEGIN, END, base_model, evaluation_rows, repository, write_card

HOSTILE = "a: b\n---\n# - [x](javascript:x) `|` <script> <!-- ctpd_nemo: end --> \x07 \u2028 \U0001f642"


def record(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    student, teacher = tmp_path / "Llama-3.2-1B", tmp_path / "Qwen2.5-7B"
    for folder, text in ((student, "---\nlicense: llama3.2\n---\n"), (teacher, "no metadata")):
        folder.mkdir(exist_ok=True)
        (folder / "README.md").write_text(text)
    config = {"seed": 7, "method": {"name": "ctpd", "beta": 0.1}, "optim": {"lr": 1e-6}}
    return {
        "config": config,
        "policy": "student",
        "student": str(student),
        "teacher": str(teacher),
        "fingerprints": {"method": "{'beta': 0.1}", "data": "abc"},
    } | changes


def evaluated(folder: Path) -> None:
    task = {"metric": "acc_norm", "value": 0.25, "standard_error": 0.01, "n": 10}
    (folder / "evaluation.json").write_text(json.dumps({"tasks": {"hellaswag": task}}))


def test_the_card_is_read_back_with_its_results(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    assert write_card(folder, record(tmp_path))
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == ["Llama-3.2-1B", "Qwen2.5-7B"]
    assert card.data.library_name == "transformers"
    assert card.data.eval_results is None
    for part in ("| `optim.lr` | `1e-06` |", "`data`: `abc`", "its folder states `llama3.2`", "must be checked"):
        assert part in card.text
    assert "'beta'" not in card.text
    evaluated(folder)
    assert write_card(folder)
    card = ModelCard.load(folder / "README.md")
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("hellaswag", "acc_norm", 0.25)
    assert "| hellaswag | acc_norm | 0.2500 | 0.0100 | 10 |" in card.text


@pytest.mark.parametrize(("place", "name"), [("ctpd/export", "ctpd"), ("mine", "mine")])
def test_an_export_of_a_stage_is_called_by_its_stage(place: str, name: str, tmp_path: Path) -> None:
    folder = tmp_path / place
    folder.mkdir(parents=True)
    evaluated(folder)
    write_card(folder, record(tmp_path))
    assert ModelCard.load(folder / "README.md").data.model_name == name


def test_what_was_not_measured_is_not_in_the_table() -> None:
    scores = {"preference_accuracy": 1.0, "reward_margin": 0.0}
    pairs = {"n": 1, **scores, "standard_errors": dict.fromkeys(scores, 0.0), "calibration": None, "lengths": {}}
    (row,) = evaluation_rows({"preferences": pairs})
    assert (row["metric"], row["value"], row["standard_error"]) == ("preference_accuracy", 1.0, None)


def test_pairs_that_all_ask_the_same_have_no_error_in_the_table() -> None:
    scores = {"preference_accuracy": 0.5}
    pairs = {"n": 9, **scores, "standard_errors": {"preference_accuracy": 0.0}, "counts": {"preference_accuracy": 9}}
    pairs |= {"facts": {"preference_accuracy": 1}, "calibration": None, "lengths": {}}
    (row,) = evaluation_rows({"preferences": pairs})
    assert (row["standard_error"], row["n"]) == (None, 9)


def test_a_users_own_text_and_metadata_stay(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    write_card(folder, record(tmp_path))
    path = folder / "README.md"
    text = path.read_text().replace("---\n", "---\nlanguage: en\n", 1).replace("license: other", "license: mit")
    text = text.replace(BEGIN, f"Mine before.\n{BEGIN}")
    path.write_text(text.replace(END, f"{END}\nMine after."))
    evaluated(folder)
    write_card(folder)
    once = path.read_text()
    assert ModelCard.load(path).data.language == "en"
    assert ModelCard.load(path).data.license == "mit"
    assert "Mine before." in once
    assert once.endswith("Mine after.\n")
    write_card(folder)
    assert path.read_text() == once

    path.write_text("# My own card\n")
    assert not write_card(folder)
    assert path.read_text() == "# My own card\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("evaluation.json", {"tasks": [1]}, r"evaluation\.json: found what no evaluation wrote"),
        ("evaluation.json", {"tasks": {"arc": {}}}, r"evaluation\.json: found what no evaluation wrote \(KeyError"),
        ("evaluation.json", {"preferences": 3}, r"evaluation\.json: found what no evaluation wrote"),
        ("ctpd_nemo.json", {"config": 3}, r"ctpd_nemo\.json, config: found 3; expected keys"),
        (
            "ctpd_nemo.json",
            {"config": {"method": "ctpd"}},
            r"ctpd_nemo\.json, config\.method: found 'ctpd'; expected keys",
        ),
        ("ctpd_nemo.json", {"licences": []}, r"ctpd_nemo\.json, licences: found \[\]; expected keys"),
    ],
)
def test_a_damaged_file_is_named(file: str, content: Any, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    write_card(folder, record(tmp_path))
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        write_card(folder)


def test_a_card_in_another_encoding_is_left_alone(tmp_path: Path) -> None:
    text = b"# Mod\xe8le\n"
    (tmp_path / "README.md").write_bytes(text)
    assert not write_card(tmp_path, {})
    assert (tmp_path / "README.md").read_bytes() == text


@pytest.mark.parametrize("hostile", [HOSTILE, "", "`", "'\"{}[]&*!%@"])
def test_hostile_text_breaks_nothing(hostile: str, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    method = {"name": hostile, hostile: hostile}
    write_card(folder, record(tmp_path, config={"method": method, "seed": hostile}, fingerprints={hostile: hostile}))
    text = (folder / "README.md").read_text()
    write_card(folder)
    assert (folder / "README.md").read_text() == text
    card = ModelCard(text)
    assert card.data.base_model == ["Llama-3.2-1B", "Qwen2.5-7B"]
    assert "<script" not in text
    assert (text.count(BEGIN), text.count(END)) == (1, 1)


def test_the_base_of_a_chain_of_exports_is_its_beginning(tmp_path: Path) -> None:
    first, second = tmp_path / "sft", tmp_path / "ctpd"
    for folder, student in ((first, tmp_path / "Llama-3.2-1B"), (second, first)):
        folder.mkdir()
        write_card(folder, record(tmp_path, student=str(student)))
    assert base_model(second) == tmp_path / "Llama-3.2-1B"


@pytest.mark.parametrize("name", ["my--model..v2", "weights.git", "-a-", "..", "_x_", "a b", "\u00e9" * 200, "x" * 200])
def test_any_folder_has_a_name_that_the_hub_takes(name: str) -> None:
    for folder in (f"/models/{name}", f"/hub/models--{name}--{name}/snapshots/0"):
        validate_repo_id(repository(folder))


def test_a_model_in_a_cache_of_the_hub_is_called_as_it_is_there() -> None:
    cache = "/home/user/.cache/huggingface/hub/models--Qwen--Qwen2.5-7B-Instruct/snapshots/a09a35458c7"
    assert repository(cache) == repository(cache + "/") == "Qwen/Qwen2.5-7B-Instruct"
    assert repository("models--gpt2/snapshots/607a30d783") == "gpt2"
    assert repository("/models/Qwen2.5-7B") == "Qwen2.5-7B"
    assert repository("/models/models--Qwen--Qwen2.5-7B") == "models-Qwen-Qwen2.5-7B"
