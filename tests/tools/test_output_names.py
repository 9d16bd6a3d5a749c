"""Every key of every tool that names what is written, with every name that cannot be: one line, before any work."""

import os
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from ctpd_nemo import output_paths
from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.evaluate import EvaluateConfig, evaluate
from ctpd_nemo.output_paths import ADDED, output_file, output_folder
from ctpd_nemo.parallel.checkpoint_files import being_written
from ctpd_nemo.pipeline.claim import claim
from ctpd_nemo.pipeline.config import run_config, typed
from ctpd_nemo.pipeline.encode import encode
from ctpd_nemo.pipeline.export import ExportConfig, export
from ctpd_nemo.pipeline.quickstart import quickstart
from ctpd_nemo.pipeline.score import score
from ctpd_nemo.pipeline.stages import run_pipeline
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from ctpd_nemo.planner.plan import plan
from ctpd_nemo.report.run_page import RunPageConfig, write_run_page
from ctpd_nemo.report.spans_page import SpansPageConfig, write_spans_page
from ctpd_nemo.reproduce.job import reproduce
from ctpd_nemo.text_files import replace_text
from tests.pipeline.recipe import composed, recipe, small_job


@dataclass(frozen=True)
class Tool:
    """What a tool does with a config, and the keys in it that name what it writes."""

    run: Callable[[DictConfig], Any]
    config: Callable[[TinyWorld, Path], DictConfig]
    keys: tuple[str, ...]


def _of_training(world: TinyWorld, folder: Path) -> DictConfig:
    return composed("train", small_job(world, folder / "run", "sft"))


def _of_scoring(world: TinyWorld, folder: Path) -> DictConfig:
    models = [f"model.student.path={world.student}", f"model.teacher.path={world.teacher}"]
    method = [f"method.cache={folder / 'cache'}", f"method.reference={world.teacher}"]
    return composed("score", [*models, *method, f"data.train=[{world.train}]", f"run_dir={folder / 'run'}"])


def _of_recipe(name: str) -> Callable[[TinyWorld, Path], DictConfig]:
    return lambda world, folder: composed(name, [*recipe(world, folder / "run"), "only=[sft_student]"])


def _of_export(world: TinyWorld, folder: Path) -> DictConfig:
    return composed("export", [f"checkpoint={folder / 'step-00000001'}", f"reference={world.student}", "folder=new"])


def _of_report(world: TinyWorld, folder: Path) -> DictConfig:
    job = folder / "kept" / "jobs" / "job"
    job.mkdir(parents=True)
    (job / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    return composed("report", [f"run_dir={job}", "output=page.html"])


def _of_spans(world: TinyWorld, folder: Path) -> DictConfig:
    return composed("inspect_spans", [f"tokenizers=[{world.teacher},{world.student}]", "text=1", "output=page.html"])


TOOLS = {
    "train": Tool(lambda config: train(run_config(config)), _of_training, ("run_dir", "data.encoded")),
    "score": Tool(lambda config: score(run_config(config)), _of_scoring, ("run_dir", "data.encoded", "method.cache")),
    "pipeline": Tool(run_pipeline, _of_recipe("pipeline"), ("run_dir", "data.encoded")),
    "encode": Tool(encode, _of_recipe("encode"), ("run_dir", "data.encoded")),
    "quickstart": Tool(quickstart, lambda *_: composed("quickstart", []), ("run_dir", "data.encoded")),
    "export_hf": Tool(lambda config: export(typed(ExportConfig, config)), _of_export, ("folder",)),
    "report": Tool(lambda config: write_run_page(typed(RunPageConfig, config)), _of_report, ("output",)),
    "inspect_spans": Tool(lambda config: write_spans_page(typed(SpansPageConfig, config)), _of_spans, ("output",)),
    "plan": Tool(plan, lambda world, folder: composed("plan", [*recipe(world, folder), "write=true"]), ("run_dir",)),
    "reproduce": Tool(lambda config: reproduce(config, "tiny"), lambda *_: composed("reproduce", []), ("run_dir",)),
}

NAMES = {
    "the root": "/",
    "the root, twice": "//",
    "the working folder": ".",
    "the one above": "..",
    "the one above, by another": "there/..",
    "NUL": "a\0b",
    "a line break": "a\nb",
    "a carriage return": "a\rb",
    "an escape of a terminal": "\x1b[31mred",
    "delete": "a\x7fb",
    "a control character of Latin-1": "a\x85b",
    "Unicode's line break": "a\u2028b",
    "no UTF-8": "a\udcffb",
    "a name of 256 bytes": "x" * 256,
    "a name of 256 bytes in 128 characters": "é" * 128,
    "a folder on the way with a name of 256 bytes": f"{'x' * 256}/run",
    "a name that has no room for .lock": "x" * 250,
    "a name that has no room for .writing-": "x" * (255 - ADDED + 1),
    "a path of 4,096 bytes": "/".join(["d" * 200] * 21),
    "a path with no room for what is in it": "/".join(["d" * 200] * 19),
    "below a file": "file/run",
    "below a file, twice": "file/runs/run",
    "a link to nothing": "nothing",
    "below a link to itself": "loop/run",
    "a folder without permission": "locked/run",
}
FOLDERS_ONLY = {"a file": "file"}
FILES_ONLY = {"a folder": "there", "a device": "/dev/null"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what is in the way of others; one in it cannot be written to, whoever runs the tests.

    The one above it holds nothing else: there are no runs of other tests.
    """
    here = tmp_path / "here"
    here.mkdir()
    (here / "file").write_text("precious")
    (here / "there").mkdir()
    (here / "locked").mkdir()
    (here / "nothing").symlink_to("nowhere")
    (here / "loop").symlink_to("loop")
    monkeypatch.chdir(here)
    access = os.access
    monkeypatch.setattr(
        output_paths.os,
        "access",
        lambda path, mode, **more: Path(path) != here / "locked" and access(path, mode),
    )
    return here


def everything(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if stat.S_ISREG(path.lstat().st_mode) else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(("tool", "key"), [(name, key) for name, tool in TOOLS.items() for key in tool.keys])
def test_a_name_that_cannot_be_written_is_refused_in_one_line_before_any_work(
    tool: str, key: str, world: TinyWorld, here: Path
) -> None:
    config = TOOLS[tool].config(world, here)
    before = everything(here)
    for why, name in {**NAMES, **(FILES_ONLY if key == "output" else FOLDERS_ONLY)}.items():
        asked = config.copy()
        OmegaConf.update(asked, key, name)
        with pytest.raises(InputError) as error:
            TOOLS[tool].run(asked)
        assert error.value.place == key, why
        assert str(error.value).isprintable(), why
        assert len(str(error.value)) < 1500, why
        assert everything(here) == before, why


READERS: dict[str, Tool] = {
    "evaluate": Tool(
        lambda config: evaluate(typed(EvaluateConfig, config)),
        lambda world, _: composed("evaluate", [f"pairs.file={world.test}"]),
        ("folder",),
    ),
    "report": Tool(TOOLS["report"].run, _of_report, ("run_dir",)),
    "export_hf": Tool(TOOLS["export_hf"].run, _of_export, ("checkpoint", "reference")),
}


@pytest.mark.parametrize(("tool", "key"), [(name, key) for name, tool in READERS.items() for key in tool.keys])
def test_a_name_that_holds_nothing_to_read_is_one_line(tool: str, key: str, world: TinyWorld, here: Path) -> None:
    """As a tool ends with it: what the system says of a name has the name, or is ours."""
    config = READERS[tool].config(world, here)
    before = everything(here)
    for why, name in {**NAMES, **FOLDERS_ONLY}.items():
        asked = config.copy()
        OmegaConf.update(asked, key, name)
        with pytest.raises((InputError, OSError)) as error:
            READERS[tool].run(asked)
        assert isinstance(error.value, InputError) or error.value.filename, why
        assert everything(here) == before, why


def test_every_tool_is_looked_at() -> None:
    tools = {path.stem for path in (Path(__file__).resolve().parents[2] / "tools").glob("*.py")}
    assert tools == {*TOOLS, *READERS}


@pytest.mark.parametrize("value", [None, "", [], {}, True, 1.5, ["runs/a"], b"runs"])
def test_what_is_no_name_is_refused(value: object) -> None:
    for check in (output_folder, output_file):
        with pytest.raises(InputError, match=r"^run_dir: found .*; expected a (folder|file) to write"):
            check("run_dir", value)


def test_a_reference_that_hydra_has_left_is_no_name() -> None:
    with pytest.raises(InputError, match="which Hydra takes for a reference"):
        output_folder("run_dir", "runs/${oc.env:SECRET}")


@pytest.mark.parametrize(
    "name",
    [
        *("a b", "a=b", "ü", "日本", "-rf", "con", "$HOME", "*", "a,b", "'", '"', "\\", "...", ".hidden"),
        *("a:b", "a::b"),
        *("x" * (255 - ADDED), "日" * ((255 - ADDED) // 3), 2024),
    ],
)
def test_an_odd_name_is_taken_as_it_is_and_has_room_for_all_that_is_added(name: str | int, here: Path) -> None:
    folder = output_folder("run_dir", name)
    assert folder == Path(str(name))
    assert output_file("output", name) == folder
    assert not folder.exists()
    # What is added to a name, as the code does it; export and the tiny world write ``.NAME.partial``.
    claim(folder)
    assert (here / f".{name}.lock").exists()
    being_written(folder, "0" * 8).mkdir()
    for beside in (f".{name}.partial", f"{name}.old-9999", f"{name}.writing-{'0' * 12}"):
        folder.with_name(beside).mkdir()
    replace_text(folder, "whole")
    assert folder.read_text() == "whole"


def test_what_is_there_and_can_be_written_to_is_taken(here: Path) -> None:
    assert output_folder("run_dir", "there") == Path("there")
    assert output_folder("run_dir", here / "there" / "new" / "newer") == here / "there" / "new" / "newer"
    (here / "link").symlink_to("there")
    assert output_folder("run_dir", "link") == Path("link")
    assert output_file("output", "file") == Path("file")
    assert output_file("output", "../x.html") == Path("../x.html")


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's permissions")
def test_permissions_are_those_of_the_user_who_runs_the_job() -> None:
    # Folders of pytest are closed to others.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for own, mode in (("of root", 0o755), ("of all", 0o777)):
            (folder / own).mkdir()
            (folder / own).chmod(mode)
        os.seteuid(65534)
        try:
            for refused in ("of root", "of root/run", "new"):
                with pytest.raises(InputError, match="a folder without permission to write in"):
                    output_folder("run_dir", folder / refused)
            assert output_folder("run_dir", folder / "of all" / "run")
        finally:
            os.seteuid(0)


def test_a_file_system_that_is_read_only_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_paths.os, "access", lambda *_, **__: False)
    monkeypatch.setattr(output_paths.os, "statvfs", lambda _: os.statvfs_result([0] * 8 + [os.ST_RDONLY, 255]))
    with pytest.raises(InputError, match="on a file system that is read-only"):
        output_folder("run_dir", tmp_path / "run")
