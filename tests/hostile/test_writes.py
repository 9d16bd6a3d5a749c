"""Nothing is written outside the run folder and the cache, whatever pairs, stages and tokenizers are called."""

import json
import os
import shutil
from pathlib import Path

import pytest

from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.export import ExportConfig, export
from ctpd_nemo.pipeline.recipe import STAGES
from ctpd_nemo.pipeline.score import score
from ctpd_nemo.pipeline.stages import StageResult, run_pipeline, stage_config
from ctpd_nemo.pipeline.train import train
from tests.hostile.case import Scene
from tests.hostile.watch import watched
from tests.pipeline.recipe import composed, recipe
from tests.tools.refusal import values

NAMES = ["../../evil", "/evil", "..", ".", "a/b", "a\\b", "a\x00b", "con", "a\nb", "$HOME", "~", "*", "-rf", "é" * 400]


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def renamed(scene: Scene) -> Path:
    """The training pairs under ids that would be paths."""
    rows = [json.loads(line) for line in scene.world.train.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["id"] = NAMES[number] if number < len(NAMES) else f"../evil-{number}"
    path = scene.folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_ids_and_names_of_folders_never_become_paths(
    scene: Scene, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding, scoring, CTPD and an export; the teacher's tokenizer lies in a folder of an odd name."""
    monkeypatch.chdir(elsewhere)
    odd = scene.folder / "..evil $(x);#'\""
    shutil.copytree(scene.world.teacher, odd)
    home = tmp_path / "home"
    home.mkdir()
    data = {"train": [str(renamed(scene))], "encoded": str(home / "encoded")}
    model = {"teacher": {"path": str(odd)}}
    roles = dict.fromkeys(("reference", "positive", "negative"), str(odd))
    before = everything(tmp_path)
    with watched() as seen:
        method = {"name": "score", "cache": str(home / "cache"), **roles}
        score(run_config(values(scene.world, home / "score", method=method, data=data, model=model)))
        method = {"name": "ctpd", "scores": str(home / "cache")}
        checkpoint = train(run_config(values(scene.world, home / "run", method=method, data=data, model=model)))
        export(ExportConfig(str(checkpoint), str(scene.world.student), str(home / "export")))
    new = everything(tmp_path) - before
    assert new
    assert {Path(name).parts[0] for name in new} == {"home"}
    assert {path for path in seen.written if home not in path.parents and path != Path(os.devnull)} == set()
    assert not any("evil" in name for name in new)


def test_a_stage_that_is_none_makes_no_folder(
    scene: Scene, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(elsewhere)
    before = everything(tmp_path)
    with pytest.raises(InputError) as error:
        run_pipeline(composed("pipeline", [*recipe(scene.world, tmp_path / "run"), "only=['../evil']"]))
    assert error.value.place == "only"
    assert everything(tmp_path) == before


def test_a_stage_cannot_be_told_to_write_elsewhere(scene: Scene, tmp_path: Path) -> None:
    elsewhere = ["+stages.score.run_dir='../evil'", "+stages.score.method.cache='../evil'"]
    config = composed("pipeline", [*recipe(scene.world, tmp_path / "run"), *elsewhere])
    stage = next(stage for stage in STAGES if stage.name == "score")
    results = {name: StageResult(tmp_path, 0.0, skipped=True) for name in stage.builds_on(config).values()}
    run = stage_config(config, stage, results)
    assert run.run_dir == str(tmp_path / "run" / "score")
    assert run.method.cache == str(tmp_path / "run" / "score" / "cache")
