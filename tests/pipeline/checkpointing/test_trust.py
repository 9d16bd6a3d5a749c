"""Checkpoints that can be trusted: what is damaged is found and not taken, and what stays is what was asked for."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel import checkpoint_files
from ctpd_nemo.pipeline.export import ExportConfig, export
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from tests.pipeline.checkpointing.runs import STEPS, cut_back, names, rows, run, same_tensors, sft, step, tensor_files

pytestmark = pytest.mark.usefixtures("one_quiet_thread")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


# Kills


def test_what_a_kill_left_undone_is_done_where_no_step_is_left(whole: Path, world: TinyWorld, tmp_path: Path) -> None:
    """Between the name of the last checkpoint and ``latest``, and what was to go for it."""
    run_dir = Path(shutil.copytree(whole, tmp_path / "run"))
    latest = run_dir / "checkpoints/latest"
    latest.write_text(step(STEPS - 1) + "\n")
    assert run([*sft(world, run_dir), "trainer.keep_last=2"]).name == step(STEPS)
    assert latest.read_text() == step(STEPS) + "\n"
    assert names(run_dir) == [step(STEPS - 1), step(STEPS)]
    assert rows(run_dir) == rows(whole)


# Damage


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=["flipped", "truncated", "missing"])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_not_exported(
    whole: Path, world: TinyWorld, tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    folder = Path(shutil.copytree(whole / "checkpoints" / step(STEPS), tmp_path / step(STEPS)))
    damage(folder / name)
    with pytest.raises(InputError) as error:
        export(ExportConfig(str(folder), str(world.student), str(tmp_path / "export")))
    missing_manifest = name == "manifest.json" and damage is Path.unlink
    assert error.value.place == str(folder if missing_manifest else folder / name)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "export").exists()


def test_every_byte_of_a_checkpoint_is_watched(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole / "checkpoints" / step(STEPS), tmp_path / step(STEPS)))
    assert checkpoint_files.find_damage(folder) is None
    manifest = folder / "manifest.json"
    good = manifest.read_bytes()
    for at in range(len(good)):
        manifest.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        changed = json.loads(good) != loaded(manifest)
        assert (checkpoint_files.find_damage(folder) is not None) == changed, f"byte {at} of the manifest"
    manifest.write_bytes(good)
    files = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert json.loads(good)["files"].keys() == files


def loaded(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def test_a_run_goes_on_from_the_newest_good_checkpoint(
    whole: Path, world: TinyWorld, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of four checkpoints the last three are damaged; the steps that are done again are the same."""
    run_dir = Path(shutil.copytree(whole, tmp_path / "run"))
    checkpoints = run_dir / "checkpoints"
    flip(checkpoints / step(4) / "__0_0.distcp")
    truncate(checkpoints / step(3) / "metadata.json")
    (checkpoints / step(2) / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING, "ctpd_nemo"):
        assert run(sft(world, run_dir)) == checkpoints / step(4)
    told = [record.getMessage() for record in caplog.records if "damaged checkpoint" in record.getMessage()]
    assert len(told) == 3
    assert f"{checkpoints / step(4) / '__0_0.distcp'}: found other bytes" in told[0]
    assert f"{checkpoints / step(3) / 'metadata.json'}" in told[1]
    assert "without manifest.json" in told[2]
    assert names(run_dir) == [step(number) for number in range(1, 5)]
    assert {path.name for path in checkpoints.glob("*.damaged")} == {f"{step(number)}.damaged" for number in (2, 3, 4)}
    assert rows(run_dir) == rows(whole)
    assert same_tensors(checkpoints / step(4), whole / "checkpoints" / step(4))


def test_a_run_with_damaged_checkpoints_alone_does_not_begin_anew(
    whole: Path, world: TinyWorld, tmp_path: Path
) -> None:
    run_dir = cut_back(whole, tmp_path / "run", 2)
    for path in (run_dir / "checkpoints").glob("step-*"):
        truncate(path / "manifest.json")
    with pytest.raises(InputError, match="found 2 damaged checkpoints"):
        run(sft(world, run_dir))


def test_a_checkpoint_of_the_other_kind_of_optimizer_is_refused(whole: Path, world: TinyWorld, tmp_path: Path) -> None:
    run_dir = cut_back(whole, tmp_path / "run", 2)
    with pytest.raises(InputError) as error:
        run([*sft(world, run_dir), "parallel.distributed_optimizer=false"])
    assert (error.value.place, error.value.found) == ("parallel.distributed_optimizer", "false")
    assert names(run_dir) == [step(1), step(2)]


def test_what_was_half_written_replaced_or_removed_is_cleared_away(
    whole: Path, world: TinyWorld, tmp_path: Path
) -> None:
    run_dir = cut_back(whole, tmp_path / "run", 2)
    checkpoints = run_dir / "checkpoints"
    # Killed between the two renames of a checkpoint that takes the place of another.
    (checkpoints / step(2)).rename(checkpoints / f"{step(2)}.replaced")
    shutil.copytree(checkpoints / step(1), checkpoints / f"{step(3)}.writing-0123abcd")
    (checkpoints / step(1)).rename(checkpoints / f"{step(1)}.removing")
    run(sft(world, run_dir))
    left = {path.name for path in checkpoints.iterdir()}
    assert left == {"latest", step(2), step(3), step(4)}
    assert rows(run_dir) == rows(whole)


def test_latest_names_the_newest_and_can_be_exported(whole: Path, world: TinyWorld, tmp_path: Path) -> None:
    latest = whole / "checkpoints/latest"
    assert latest.read_text() == step(STEPS) + "\n"
    for name, checkpoint in (("latest", latest), ("newest", latest.with_name(step(STEPS)))):
        export(ExportConfig(str(checkpoint), str(world.student), str(tmp_path / name)))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("latest", "newest")]
    assert weights[0] == weights[1]


def test_latest_that_points_out_of_its_folder_is_refused(world: TinyWorld, tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(InputError, match="the name of a checkpoint beside it"):
        export(ExportConfig(str(tmp_path / "latest"), str(world.student), str(tmp_path / "export")))


# What stays


def test_the_newest_and_the_best_stay(world: TinyWorld, whole: Path, tmp_path: Path) -> None:
    """A rate that ruins the model: the first validation is the best, the last checkpoint the newest."""
    ruin = ["optim.lr=1.0", "optim.schedule=constant", "trainer.keep_last=1", "trainer.validate_every=1"]
    run([*sft(world, tmp_path / "run"), *ruin, "trainer.keep_best=1", "trainer.checkpoint_every=0"])
    losses = {row["step"]: row["val_loss"] for row in rows(tmp_path / "run") if "val_loss" in row}
    best = min(losses, key=lambda number: losses[number])
    assert best < STEPS
    assert names(tmp_path / "run") == [step(best), step(STEPS)]
    values = json.loads((tmp_path / "run/checkpoints/validation.json").read_text())
    assert values == {step(number): losses[number] for number in (best, STEPS)}


def test_the_best_of_an_earlier_part_of_the_run_stays(world: TinyWorld, whole: Path, tmp_path: Path) -> None:
    """What earlier validations found is written down; a run that goes on compares with it."""
    run_dir = cut_back(whole, tmp_path / "run", 2)
    (run_dir / "checkpoints/validation.json").write_text(json.dumps({step(1): -1.0}))
    run([*sft(world, run_dir), "trainer.keep_last=1", "trainer.keep_best=1"])
    assert names(run_dir) == [step(1), step(STEPS)]


def test_a_metric_that_no_validation_has_is_named_before_the_first_step(world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trainer\.best_by: found 'val_los'; expected one of val_loss"):
        run([*sft(world, tmp_path / "run"), "trainer.keep_best=1", "trainer.best_by=val_los"])
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_keep_best_without_held_out_pairs_is_refused(world: TinyWorld, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"trainer\.keep_best: found 1 without data\.validation"):
        run([*sft(world, tmp_path / "run"), "trainer.keep_best=1", "data.validation=[]"])


# In the background


def test_async_checkpoints_are_those_of_a_run_that_waits_for_them(
    world: TinyWorld, whole: Path, tmp_path: Path
) -> None:
    run([*sft(world, tmp_path / "run"), "trainer.async_save=true"])
    assert rows(tmp_path / "run") == rows(whole)
    assert names(tmp_path / "run") == names(whole)
    for name in names(whole):
        found, expected = (tensor_files(folder / "checkpoints" / name) for folder in (tmp_path / "run", whole))
        assert found
        assert found == expected


# Other input


def test_what_may_differ_is_named_and_told(
    world: TinyWorld, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = cut_back(whole, tmp_path / "run", 2)
    other = tmp_path / "other.jsonl"
    lines = world.train.read_text().splitlines(keepends=True)
    other.write_text("".join(reversed(lines)))
    changed = [*sft(world, run_dir), f"data.train=[{other}]", "trainer.keep_last=3"]
    with pytest.raises(InputError, match=r"resume, data: found .*; expected what the checkpoint was trained on"):
        run(changed)
    with pytest.raises(InputError, match=r"resume\.allow: found 'dta'; expected names of what may differ: method"):
        run([*changed, "resume.allow=[dta]"])
    with pytest.raises(InputError, match="resume, data"):
        run([*changed, "resume.allow=[template,tokenizer]"])
    with caplog.at_level(logging.WARNING, "ctpd_nemo"):
        run([*changed, "resume.allow=[data]"])
    assert any("resume, data" in record.getMessage() for record in caplog.records)
    after = [row["loss"] for row in rows(run_dir) if "loss" in row]
    assert after[:2] == [row["loss"] for row in rows(whole) if "loss" in row][:2]
    assert len(after) == STEPS


def test_another_template_or_tokenizer_stops_with_its_name(world: TinyWorld, whole: Path, tmp_path: Path) -> None:
    run_dir = cut_back(whole, tmp_path / "run", 2)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match="resume, policy_template"):
        run([*sft(world, run_dir), f'model.student.chat_template="{template}"'])
    tokenizer = Path(shutil.copytree(world.student, tmp_path / "tokenizer"))
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["model"]["vocab"][-1][1] -= 0.5
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="resume, policy_tokenizer"):
        run([*sft(world, run_dir), f"model.student.tokenizer={tokenizer}"])
