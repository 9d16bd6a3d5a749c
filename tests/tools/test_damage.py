"""What is damaged, taken or cut off stops a job with one line, and the same command goes on once that is put right."""

import errno
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file

from ctpd_nemo.data.preferences import open_preferences
from ctpd_nemo.data.tokenizer_folder import load_tokenizer
from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline import entry
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.export import ExportConfig, export
from ctpd_nemo.pipeline.score import score
from ctpd_nemo.pipeline.score_sums import with_sums
from ctpd_nemo.pipeline.stages import run_pipeline
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from tests.pipeline.recipe import composed, recipe
from tests.pipeline.tool import run_tool, started

Edit = Callable[[Path], object]
ROLES = ("reference", "positive", "negative")


@pytest.fixture(scope="module")
def cache(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of every role by the untrained teacher."""
    home = tmp_path_factory.mktemp("scored")
    return score(run_config(composed("score", scoring(world, home / "run", home / "cache"))))


@pytest.fixture(scope="module")
def trained(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with checkpoints of two steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(run_config(composed("train", [*sft(world, folder), "trainer.checkpoint_every=1", "trainer.max_steps=2"])))
    return folder


def job(world: TinyWorld, run_dir: Path) -> list[str]:
    return [value for value in recipe(world, run_dir) if "stages" not in value]


def sft(world: TinyWorld, run_dir: Path) -> list[str]:
    return [*job(world, run_dir), "method=sft"]


def scoring(world: TinyWorld, run_dir: Path, cache: Path) -> list[str]:
    roles = [f"method.{role}={world.teacher}" for role in ROLES]
    return [*job(world, run_dir), f"method.cache={cache}", "method.pairs_per_shard=10", *roles]


def half(path: Path) -> None:
    cut(path, 0.5)


def cut(path: Path, share: float) -> None:
    """Leave no more than the first part of a file."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


# Data


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: half(folder / "data-00000-of-00001.arrow"),
        lambda folder: (folder / "data-00000-of-00001.arrow").unlink(),
        lambda folder: (folder / "dataset_info.json").unlink(),
    ],
    ids=["half", "no rows", "info"],
)
def test_a_damaged_datasets_folder_is_named(tmp_path: Path, damage: Edit) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "pairs")
    damage(tmp_path / "pairs")
    with pytest.raises(InputError, match="a folder that cannot be read") as error:
        open_preferences(tmp_path / "pairs")
    assert error.value.place == str(tmp_path / "pairs")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pairs.jsonl")
    with pytest.raises(InputError, match="a pipe or a device"):
        open_preferences(tmp_path / "pairs.jsonl")


def test_an_error_is_one_line_whatever_a_library_says(tmp_path: Path) -> None:
    names = ["prompt", "chosen", "rejected", "chosen"]
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 4, names=names), tmp_path / "twice.parquet")
    with pytest.raises(InputError, match="a file Arrow cannot read") as error:
        open_preferences(tmp_path / "twice.parquet")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_when_a_job_begins_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    """A file that is open cannot grow: the error does not say which."""

    def task(config: DictConfig) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(SystemExit) as ended:
        entry.run(task, OmegaConf.create({"run_dir": str(tmp_path)}))
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: found {os.strerror(number)}; expected room to write\n"


# Values


@pytest.mark.parametrize(
    ("overrides", "place"),
    [
        ("seed=-1", "seed"),
        ("optim.lr=inf", "optim.lr"),
        ("optim.eps=-1", "optim.eps"),
        ("optim.weight_decay=nan", "optim.weight_decay"),
        ("optim.clip_grad=-1", "optim.clip_grad"),
        ("parallel.timeout_minutes=0", "parallel.timeout_minutes"),
        ("method=dpo method.beta=-0.1", "method.beta"),
        ("method=dpo method.beta=nan", "method.beta"),
        ("method.scores=x method.beta=0", "method.beta"),
        ("method.scores=x method.weight_scale=nan", "method.weight_scale"),
        ("method.scores=x method.weight_upper=nan", "method.weight_lower"),
    ],
)
def test_a_number_that_makes_no_sense_is_named(world: TinyWorld, tmp_path: Path, overrides: str, place: str) -> None:
    method = [] if "method" in overrides else ["method=sft"]
    config = composed("train", [*job(world, tmp_path), *method, *overrides.split()])
    with pytest.raises(InputError) as error:
        train(run_config(config))
    assert error.value.place == place
    assert list(tmp_path.iterdir()) == []


def test_weights_that_give_no_number_never_reach_a_checkpoint(world: TinyWorld, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world.student, tmp_path / "student"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    overrides = [*sft(world, tmp_path / "run"), f"model.student.path={folder}", "trainer.checkpoint_every=1"]
    with pytest.raises(
        InputError, match=r"step 3: found no finite loss .* in 3 steps in a row.*there is no checkpoint"
    ):
        train(run_config(composed("train", overrides)))
    assert not (tmp_path / "run/checkpoints").exists()


def test_all_of_what_parsers_say_of_a_model_is_passed_on(world: TinyWorld, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world.student, tmp_path / "student"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": "2"}))
    with pytest.raises(InputError, match="expected int, got str"):
        load_tokenizer(str(folder))


# Score caches


def manifest_without(field: str) -> Edit:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "manifest.json").read_text())
        del content[field]
        (folder / "manifest.json").write_text(json.dumps(content))

    return edit


def shard_with(change: Callable[[pa.Table], pa.Table]) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "positive-00001.parquet"
        pq.write_table(with_sums(change(pq.read_table(path))), path)

    return edit


def shorter(table: pa.Table) -> pa.Table:
    rows = [spans[:-1] for spans in table["chosen"].to_pylist()]
    return table.set_column(1, "chosen", pa.array(rows, table.schema.field("chosen").type))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (manifest_without("fingerprints"), "manifest.json, fingerprints: found None"),
        (manifest_without("teacher_weights"), "manifest.json, teacher_weights: found None"),
        (manifest_without("shards"), "manifest.json, shards: found None"),
        (lambda folder: half(folder / "positive-00001.parquet"), "remove it and score again"),
        (shard_with(lambda table: table.drop_columns(["chosen"])), "rows without chosen"),
        (shard_with(shorter), "as the reference has"),
    ],
    ids=["fingerprints", "weights", "shards", "half", "column", "spans"],
)
def test_a_damaged_cache_is_named(world: TinyWorld, cache: Path, tmp_path: Path, damage: Edit, said: str) -> None:
    folder = Path(shutil.copytree(cache, tmp_path / "cache"))
    damage(folder)
    overrides = [*job(world, tmp_path / "run"), "method=ctpd", f"method.scores={folder}"]
    with pytest.raises(InputError, match=said):
        train(run_config(composed("train", overrides)))


def test_shards_that_nothing_says_the_origin_of_are_not_taken_for_ones_own(
    world: TinyWorld, cache: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(cache, tmp_path / "cache"))
    (folder / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"shards without manifest\.json"):
        score(run_config(composed("score", scoring(world, tmp_path / "run", folder))))
    assert not (folder / "manifest.json").exists()


# Checkpoints and exports


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "metadata.json", "common.pt"])
def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(
    world: TinyWorld, trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    newest = folder / "checkpoints/step-00000002"
    if not (newest / name).exists():
        pytest.skip("newer releases of Megatron-Core keep their common state among the shards")
    cut(newest / name, 0.1)
    with pytest.raises(InputError, match="as were written") as error:
        export(ExportConfig(str(newest), str(world.student), str(tmp_path / "exported")))
    assert error.value.place == str(newest / name)
    assert not (tmp_path / "exported").exists()
    config = composed("train", [*sft(world, folder), "trainer.checkpoint_every=1", "trainer.max_steps=2"])
    with caplog.at_level(logging.WARNING, "ctpd_nemo"):
        assert train(run_config(config)) == newest
    (told,) = [record.getMessage() for record in caplog.records if "a damaged checkpoint" in record.getMessage()]
    assert str(newest / name) in told


def test_an_export_by_another_model_is_refused(world: TinyWorld, trained: Path, tmp_path: Path) -> None:
    """Of other widths, and of more layers than there are in the checkpoint."""
    checkpoint = str(trained / "checkpoints/step-00000002")
    with pytest.raises(InputError, match="a tensor that has shape"):
        export(ExportConfig(checkpoint, str(world.teacher), str(tmp_path / "exported")))
    deeper = tmp_path / "deeper"
    shutil.copytree(world.student, deeper)
    tensors = load_file(deeper / "model.safetensors")
    second = {name: tensor for name, tensor in tensors.items() if ".layers.1." in name}
    tensors |= {name.replace(".layers.1.", ".layers.2."): tensor.clone() for name, tensor in second.items()}
    save_file(tensors, deeper / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"no tensor decoder\.layers\.2"):
        export(ExportConfig(checkpoint, str(deeper), str(tmp_path / "exported")))
    assert not (tmp_path / "exported").exists()


def test_an_export_never_replaces_the_folder_one_stands_in(
    world: TinyWorld, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="by a name of its own"):
        export(ExportConfig(str(trained / "checkpoints/step-00000002"), str(world.student), "."))


# The recipe


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("+stages.ctpd.method.bta=1", "stage ctpd, method.bta"),
        ("stages.ctpd.method.beta=-1", "stage ctpd, method.beta"),
        ("stages.ctpd=1", "stages.ctpd"),
        ("stages=null", "stages"),
        ("+stages.score.parallel.tensor=2", "parallel"),
        ("model.student.path=nowhere", "stage sft_student, nowhere"),
    ],
)
def test_the_recipe_finds_what_is_wrong_with_its_last_stage_before_the_first(
    world: TinyWorld, tmp_path: Path, override: str, place: str
) -> None:
    with pytest.raises(InputError) as error:
        run_pipeline(composed("pipeline", [*recipe(world, tmp_path / "run"), override]))
    assert error.value.place == place
    assert not (tmp_path / "run").exists()


def one_stage(world: TinyWorld, run_dir: Path) -> list[str]:
    return [*recipe(world, run_dir), "only=[sft_student]"]


def test_a_status_that_no_stage_wrote_is_named(world: TinyWorld, tmp_path: Path) -> None:
    status = tmp_path / "run/sft_student/stage.json"
    run_pipeline(composed("pipeline", one_stage(world, tmp_path / "run")))
    half(status)
    with pytest.raises(InputError, match="expected a stage's status") as error:
        run_pipeline(composed("pipeline", one_stage(world, tmp_path / "run")))
    assert error.value.place == str(status)


def test_a_shard_that_is_gone_is_scored_again(world: TinyWorld, tmp_path: Path) -> None:
    config = composed("pipeline", recipe(world, tmp_path / "run"))
    run_pipeline(config)
    shard = tmp_path / "run/score/cache/positive-00001.parquet"
    before = pq.read_table(shard)
    shard.unlink()
    results = run_pipeline(config)
    assert [name for name, result in results.items() if not result.skipped] == ["score"]
    assert pq.read_table(shard).equals(before)


# The tools themselves


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data.max_lenght=3"], "Could not override 'data.max_lenght'"),
        (["experiment=nope"], "Could not find 'experiment/nope'"),
        (["method=null"], "Config group override must be a string or a list"),
        (["method=sft", "run_dir=file/run"], "run_dir: found file/run, where "),
    ],
    ids=["key", "experiment", "null", "path"],
)
def test_a_command_line_that_cannot_be_used_is_one_line(
    world: TinyWorld, tmp_path: Path, arguments: list[str], said: str
) -> None:
    (tmp_path / "file").write_text("")
    values = [value for value in job(world, tmp_path / "run") if not value.startswith("run_dir")]
    status, _, stderr = run_tool("train.py", [*values, *arguments], tmp_path)
    assert status == 2
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.slow
def test_two_pipelines_in_one_folder_keep_apart_and_a_stopped_one_goes_on(world: TinyWorld, tmp_path: Path) -> None:
    """The second is refused while the first is at work; stopped by SIGTERM, the first has saved and is not complete."""
    arguments = [*one_stage(world, tmp_path / "run"), "trainer.max_steps=2000", "trainer.epochs=2000"]
    with started("pipeline.py", arguments, tmp_path) as first:
        assert first.stderr is not None
        while "step 1 of" not in first.stderr.readline():
            assert first.poll() is None
        status, _, stderr = run_tool("pipeline.py", arguments, tmp_path)
        assert status == 2
        assert "another job at work in it" in stderr
        first.send_signal(signal.SIGTERM)
        first.communicate()
        assert first.returncode == 0
    assert not json.loads((tmp_path / "run/sft_student/stage.json").read_text())["complete"]
    assert not (tmp_path / "run/sft_student/export").exists()
    done = [*one_stage(world, tmp_path / "run"), "trainer.max_steps=2"]
    assert run_tool("pipeline.py", done, tmp_path)[0] == 0
