"""A score cache that is not this run's stops the job; one that is needs no teacher beside it."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.score import score
from ctpd_nemo.pipeline.score_sums import with_sums
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from tests.tools.refusal import content, edited, refused, values


@pytest.fixture(scope="module")
def cache(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of every role by the untrained teacher, ready for CTPD."""
    home = tmp_path_factory.mktemp("scored")
    roles = dict.fromkeys(("reference", "positive", "negative"), str(world.teacher))
    config = values(world, home / "run", method={"name": "score", "cache": str(home / "cache"), **roles})
    return score(run_config(config))


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"data": {"max_length": 48}}, "truncation"),
        ({"data": {"include_eos": False}}, "truncation"),
        ({"precision": {"dtype": "bf16"}}, "precision"),
        (
            {"model": {"student": {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}}},
            "student_template",
        ),
        (
            {"model": {"teacher": {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}}},
            "teacher_template",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_cache_that_belongs_to_another_run_is_refused_with_what_differs(
    world: TinyWorld, cache: Path, run_dir: Path, changed: dict[str, Any], field: str
) -> None:
    before = content(cache)
    config = values(world, run_dir, method={"name": "ctpd", "scores": str(cache)}, **changed)
    error = refused(train, config, run_dir)
    assert error.place == f"{cache}/manifest.json, {field}"
    assert error.found != error.expected
    assert content(cache) == before


def test_a_cache_of_other_pairs_is_refused(world: TinyWorld, cache: Path, tmp_path: Path, run_dir: Path) -> None:
    path = edited(world, tmp_path, lambda rows: rows.pop())
    config = values(world, run_dir, method={"name": "ctpd", "scores": str(cache)}, data={"train": [str(path)]})
    assert refused(train, config, run_dir).place == f"{cache}/manifest.json, data"


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_cache_of_another_tokenizer_is_refused(
    world: TinyWorld, cache: Path, tmp_path: Path, run_dir: Path, side: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(getattr(world, side))
    # One of its tokens is matched as a whole from now on; there are no more of them than the weights have rows.
    added = set(tokenizer.get_added_vocab().values())
    tokenizer.add_tokens([tokenizer.convert_ids_to_tokens(max(set(tokenizer.get_vocab().values()) - added))])
    tokenizer.save_pretrained(tmp_path / "other")
    model = {side: {"tokenizer": str(tmp_path / "other")}}
    config = values(world, run_dir, method={"name": "ctpd", "scores": str(cache)}, model=model)
    assert refused(train, config, run_dir).place == f"{cache}/manifest.json, {side}_tokenizer"


def test_a_cache_of_another_teacher_is_refused(world: TinyWorld, cache: Path, tmp_path: Path, run_dir: Path) -> None:
    folder = Path(shutil.copytree(world.teacher, tmp_path / "teacher"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    method = {"name": "ctpd", "scores": str(cache)}
    config = values(world, run_dir, method=method, model={"teacher": {"path": str(folder)}})
    assert refused(train, config, run_dir).place == f"{cache}/manifest.json, teacher_weights.reference"
    for role in ("positive", "negative"):
        config = values(world, run_dir, method={**method, role: str(folder)})
        assert refused(train, config, run_dir).place == f"{cache}/manifest.json, teacher_weights.{role}"


def test_the_cache_is_all_that_is_left_of_the_teacher_but_its_tokenizer(
    world: TinyWorld, cache: Path, tmp_path: Path
) -> None:
    AutoTokenizer.from_pretrained(world.teacher).save_pretrained(tmp_path / "tokenizer")
    model = {"teacher": {"path": None, "tokenizer": str(tmp_path / "tokenizer")}}
    method = {"name": "ctpd", "scores": str(cache)}
    assert train(run_config(values(world, tmp_path / "run", method=method, model=model))).is_dir()


def test_a_pair_that_the_cache_does_not_hold_is_named(world: TinyWorld, cache: Path, tmp_path: Path) -> None:
    """Found when the pair's turn comes."""
    holed = Path(shutil.copytree(cache, tmp_path / "cache"))
    (shard,) = holed.glob("negative-*.parquet")
    table = pq.read_table(shard)
    pq.write_table(with_sums(table.slice(0, len(table) - 1)), shard)
    config = values(world, tmp_path / "run", method={"name": "ctpd", "scores": str(holed)})
    missing = table["pair_id"][-1].as_py()
    with pytest.raises(InputError, match=rf"{holed}, negative: found no pair '{missing}'"):
        train(run_config(config))
