"""The model card, read back by ``huggingface_hub``."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.base_models import base_of, repository, without_places
from ctpd_nemo.evaluation.card import BEGIN, END, evaluation_rows, write_card

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
        ("ctpd_nemo.json", {"bases": []}, r"ctpd_nemo\.json, bases: found \[\]; expected keys"),
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
    first, second, older = tmp_path / "sft", tmp_path / "ctpd", tmp_path / "older"
    for folder, student in ((first, tmp_path / "Llama-3.2-1B"), (second, first)):
        folder.mkdir()
        write_card(folder, record(tmp_path, student=str(student)))
    older.mkdir()
    (older / "ctpd_nemo.json").write_text(json.dumps({"policy": "student", "student": str(second)}))
    for folder in (first, second, older):
        assert (base_of(folder).name, base_of(folder).license) == ("Llama-3.2-1B", "llama3.2")


def test_no_card_and_no_record_names_a_place_of_the_machine(tmp_path: Path) -> None:
    """Of every value of a run's config, whatever key it stands under."""
    home = str(tmp_path)
    places = [f"{home}/a folder/{n}" for n in range(9)]
    config = {
        "run_dir": places[0],
        "from_run": places[1],
        "model": {
            "student": {"path": places[2], "tokenizer": places[3], "chat_template": places[4] + ".jinja"},
            "teacher": {"path": f"{home}/hub/models--Qwen--Qwen2.5-7B/snapshots/0a1b/", "chat_template": "{# a/b #}"},
        },
        "data": {"train": [places[5], {"deeper": places[6]}], "encoded": "C:\\Users\\somebody\\encoded"},
        "method": {"name": "ctpd", "scores": places[7], "positive": places[8] + "/"},
    }
    published = without_places(config)
    assert published["model"]["student"] == {"path": "2", "tokenizer": "3", "chat_template": "4.jinja"}
    assert published["model"]["teacher"] == {"path": "Qwen/Qwen2.5-7B", "chat_template": "{# a/b #}"}
    assert published["data"] == {"train": ["5", {"deeper": "6"}], "encoded": "encoded"}
    assert published["method"] == {"name": "ctpd", "scores": "7", "positive": "8"}
    assert published.keys() == {"model", "data", "method"}
    folder = tmp_path / "export"
    folder.mkdir()
    write_card(folder, record(tmp_path, config=config))
    card = (folder / "README.md").read_text()
    assert home not in card
    assert "somebody" not in card
    assert "| `data.encoded` | `encoded` |" in card


@pytest.mark.parametrize(
    ("front", "config", "name"),
    [
        ("base_model: Qwen/Qwen2.5-7B", {}, "Qwen/Qwen2.5-7B"),
        ("base_model: [meta-llama/Llama-3.1-8B, other/one]", {}, "meta-llama/Llama-3.1-8B"),
        ("base_model: Qwen/Qwen2.5-7B", {"_name_or_path": "Qwen/Qwen2.5-7B-Instruct"}, "Qwen/Qwen2.5-7B-Instruct"),
        ("license: mit", {"_name_or_path": "/home/somebody/models/x"}, "My-Model"),
        ("license: mit", {"_name_or_path": "../x"}, "My-Model"),
        ("base_model: /home/somebody/x", {"_name_or_path": 7}, "My-Model"),
        ("base_model: {a: b}", {"_name_or_path": ["a/b"]}, "My-Model"),
        ("base_model: '`x`/<b>'", {}, "My-Model"),
    ],
)
def test_a_base_model_is_called_as_its_own_card_or_config_does(
    front: str, config: dict[str, Any], name: str, tmp_path: Path
) -> None:
    base = tmp_path / "My Model"
    base.mkdir()
    (base / "README.md").write_text(f"---\n{front}\n---\n")
    (base / "config.json").write_text(json.dumps(config))
    folder = tmp_path / "export"
    folder.mkdir()
    write_card(folder, record(tmp_path, student=str(base), teacher=None))
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == [name]
    assert f"student `{name}`" in card.text


MIT, OTHER = "license: mit", "license: other\nlicense_name: llama3.2\nlicense_link: https://example.com/terms"


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (MIT, MIT, ("mit", None, None)),
        (OTHER, OTHER, ("other", "llama3.2", "https://example.com/terms")),
        (MIT, OTHER, ("other", "see-license-of-the-base-models", None)),
        (MIT, "tags: [a]", ("other", "see-license-of-the-base-models", None)),
        ("tags: [a]", "tags: [a]", ("other", "see-license-of-the-base-models", None)),
        ("license: other", "license: other", ("other", "see-license-of-the-base-models", None)),
        (MIT, None, ("mit", None, None)),
        (OTHER, None, ("other", "llama3.2", "https://example.com/terms")),
    ],
)
def test_the_licence_is_that_of_all_models_it_was_made_of_where_it_is_one(
    student: str, teacher: str | None, expected: tuple[str | None, ...], tmp_path: Path
) -> None:
    folders = {"student": student, "teacher": teacher}
    for side, front in folders.items():
        if front is not None:
            (tmp_path / side).mkdir()
            (tmp_path / side / "README.md").write_text(f"---\n{front}\n---\n")
    folder = tmp_path / "export"
    folder.mkdir()
    given = {side: str(tmp_path / side) if front is not None else None for side, front in folders.items()}
    write_card(folder, record(tmp_path, **given))
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.license_name, data.license_link) == expected
    if student == OTHER:
        assert "its folder states `llama3.2` (`https://example.com/terms`)" in (folder / "README.md").read_text()


def test_the_variables_of_a_chat_template_are_in_the_card(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    folder.mkdir()
    side = {"path": "x", "chat_template_kwargs": {"enable_thinking": False}}
    write_card(folder, record(tmp_path, config={"model": {"student": side}, "method": {"name": "sft"}}))
    assert (
        '| `model.student.chat_template_kwargs` | `{"enable_thinking": false}` |' in (folder / "README.md").read_text()
    )


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
