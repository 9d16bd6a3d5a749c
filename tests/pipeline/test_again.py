"""``--from-run``: which command lines name a run, and which folders have one."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.card import write_card
from ctpd_nemo.pipeline.again import CONFIG_NAME, offer_config, take_flag
from ctpd_nemo.pipeline.config import run_config
from tests.pipeline.recipe import composed


@pytest.mark.parametrize(
    ("arguments", "folder", "rest"),
    [
        ([], None, []),
        (["optim.lr=1"], None, ["optim.lr=1"]),
        (["--from-run", "runs/a"], "runs/a", []),
        (["--from-run=runs/a", "seed=1"], "runs/a", ["seed=1"]),
        (["seed=1", "--from-run", "runs/a", "--cfg", "job"], "runs/a", ["seed=1", "--cfg", "job"]),
        (["--from-run=lr=1"], "lr=1", []),
    ],
)
def test_the_flag_is_taken_and_the_rest_left(arguments: list[str], folder: str | None, rest: list[str]) -> None:
    assert take_flag(arguments) == (folder, rest)


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--from-run"], "nothing"),
        (["--from-run="], "nothing"),
        (["--from-run", "seed=1"], "'seed=1'"),
        (["--from-run", "--help"], "'--help'"),
        (["--from-run", "a", "--from-run=b"], "a and b"),
    ],
)
def test_a_flag_without_one_folder_is_named(arguments: list[str], found: str) -> None:
    with pytest.raises(InputError) as error:
        take_flag(arguments)
    assert (error.value.place, error.value.found) == ("--from-run", found)


def written(folder: Path, *overrides: str, ran_in: str | None = None) -> Path:
    """A run folder with the record of a job."""
    folder.mkdir()
    config = asdict(run_config(composed("train", [f"run_dir={folder}", *overrides])))
    (folder / "config.json").write_text(json.dumps(config))
    if ran_in is not None:
        (folder / "starts.jsonl").write_text(json.dumps({"folder": ran_in}) + "\n")
    return folder


def offered(folder: str) -> dict[str, object]:
    name = offer_config(folder)
    assert name == CONFIG_NAME
    return ConfigStore.instance().load(f"{name}.yaml").node  # type: ignore[no-any-return]


def test_the_config_is_that_of_the_run_in_a_folder_beside_it(tmp_path: Path) -> None:
    run = written(tmp_path / "run", "method=dpo", "optim.lr=3e-5", "seed=4", "model.student.path=/models/student")
    config = run_config(offered(f"{run}/"))  # type: ignore[arg-type]
    assert (config.run_dir, config.from_run) == (f"{run}-again", str(run))
    assert (config.method.name, config.optim.lr, config.seed) == ("dpo", 3e-5, 4)


def test_relative_paths_are_those_of_the_folder_that_the_job_ran_in(tmp_path: Path) -> None:
    overrides = ["method=sft", "model.student.path=student", "data.train=[a.jsonl,/b.jsonl]", "data.encoded=auto"]
    run = written(tmp_path / "run", *overrides, ran_in="/elsewhere")
    config = run_config(offered(str(run)))  # type: ignore[arg-type]
    assert config.model.student.path == "/elsewhere/student"
    assert config.data.train == ["/elsewhere/a.jsonl", "/b.jsonl"]
    assert config.data.encoded == "auto"


@pytest.mark.parametrize(
    ("template", "expected"),
    [("chat.jinja", "/elsewhere/chat.jinja"), ("/chat.jinja", "/chat.jinja"), ("{{ messages }}", "{{ messages }}")],
)
def test_a_template_is_that_file_or_stays_text(template: str, expected: str, tmp_path: Path) -> None:
    run = written(tmp_path / "run", "method=sft", f"model.teacher.chat_template='{template}'", ran_in="/elsewhere")
    config = run_config(offered(str(run)))  # type: ignore[arg-type]
    assert config.model.teacher.chat_template == expected


def test_an_export_has_the_config_of_its_run(tmp_path: Path) -> None:
    config = json.loads((written(tmp_path / "run", "method=sft", "seed=4") / "config.json").read_text())
    export = tmp_path / "export"
    export.mkdir()
    (export / "config.json").write_text('{"model_type": "llama"}')
    write_card(export, {"config": config})
    assert "    python tools/train.py --from-run FOLDER\n" in (export / "README.md").read_text()
    again = run_config(offered(str(export)))  # type: ignore[arg-type]
    assert (again.method.name, again.seed, again.run_dir) == ("sft", 4, f"{export}-again")
    (export / "ctpd_nemo.json").write_text('{"config": {}}')
    with pytest.raises(InputError, match=r"ctpd_nemo\.json, config: found \{\}; expected the config of the run"):
        offer_config(str(export))


def _leaves(values: object, *keys: object) -> Iterator[tuple[object, ...]]:
    if isinstance(values, dict):
        yield keys
        for key, value in values.items():
            yield from _leaves(value, *keys, key)
    else:
        yield keys


def _set(values: dict[str, object], keys: tuple[object, ...], value: object) -> object:
    if not keys:
        return value
    return {**values, keys[0]: _set(values[keys[0]], keys[1:], value)}  # type: ignore[arg-type,index]


@pytest.mark.parametrize("record", ["config.json", "ctpd_nemo.json"])
def test_nothing_that_a_folder_asks_for_is_filled_in(
    record: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any key, in a list, as the name of a key, and in the records beside the config."""
    monkeypatch.setenv("SOME_SECRET", "s3cr3t")
    run = written(tmp_path / "run", "method=dpo")
    config = json.loads((run / "config.json").read_text())
    for keys in _leaves(config):
        for value in ("${oc.env:SOME_SECRET}", ["a", "b/${oc.env:SOME_SECRET}"], {"x${oc.env:SOME_SECRET}": 1}):
            asking = _set(config, keys, value)
            (run / record).write_text(json.dumps({"config": asking} if record == "ctpd_nemo.json" else asking))
            with pytest.raises(InputError) as error:
                offer_config(str(run))
            assert "s3cr3t" not in str(error.value)


@pytest.mark.parametrize("where", ["starts", "name"])
def test_no_folder_is_named_by_what_it_asks_for(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "s3cr3t")
    name, ran_in = ("run", "/${oc.env:SOME_SECRET}") if where == "starts" else ("${oc.env:SOME_SECRET}", None)
    run = written(tmp_path / "run", "method=dpo", "model.student.path=student", ran_in=ran_in).rename(tmp_path / name)
    with pytest.raises(InputError, match=r"expected a value without \$\{\.\.\.\}") as error:
        offer_config(str(run))
    assert "s3cr3t" not in str(error.value)


def test_a_folder_without_a_record_of_training_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty/config\.json: found no such file; expected the config that a job"):
        offer_config(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("config", "place", "found"),
    [
        ({"method": {"name": "score", "cache": "c", "reference": "r"}}, "method.name", "'score'"),
        ({"method": "sft"}, "method.name", "None"),
        ({"method": {"name": "sft"}, "model": []}, "model", "[]"),
        ({"method": {"name": "sft"}, "optim": {"rate": 1}}, "optim.rate", "a key that is not known"),
    ],
)
def test_a_config_of_no_training_is_named(config: dict[str, object], place: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as error:
        offer_config(str(tmp_path))
    assert (error.value.place, error.value.found) == (f"{tmp_path}/config.json, {place}", found)
