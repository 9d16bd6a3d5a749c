"""What jobs make of rows that cannot be used, of ids that several have, and of files that change under them."""

import itertools
import json
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback

from ctpd_nemo.data.encoded_pair import FAULTS, Skipped
from ctpd_nemo.data.loader import StepStats
from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.preferences import evaluate_folder
from ctpd_nemo.models.data import RunData
from ctpd_nemo.models.methods import METHODS
from ctpd_nemo.parallel.checkpoint_files import find_checkpoints
from ctpd_nemo.pipeline import quiet
from ctpd_nemo.pipeline import train as train_module
from ctpd_nemo.pipeline.callbacks import SkipWarning
from ctpd_nemo.pipeline.config import run_config
from ctpd_nemo.pipeline.score import score
from ctpd_nemo.pipeline.score_sums import with_sums
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.pipeline.train import train
from tests.faults.jobs import tensors
from tests.pipeline.recipe import SMALL_BATCHES, composed, small_job, small_world

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyWorld:
    quiet.after_imports()
    return small_world(tmp_path_factory.mktemp("rows") / "world")


@pytest.fixture(scope="module")
def rows(world: TinyWorld) -> Rows:
    return [json.loads(line) for line in world.train.read_text(encoding="utf-8").splitlines()]


def save(rows: Rows, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def spoiled(rows: Rows) -> tuple[Rows, Counter[str]]:
    """The rows with one in three of them spoiled for some reason, and how many for which."""
    turns: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = [
        ("unread_field", lambda row: {**row, "tools": [{"type": "function"}]}),
        ("unknown_role", lambda row: {**row, "prompt": [{"role": "developer", "content": "x"}, *row["prompt"]]}),
        ("refused_by_template", lambda row: {**row, "prompt": [{"role": "user", "content": "rain"}]}),
        ("too_long", lambda row: {**row, "prompt": [{"role": "user", "content": "what is " * 200}]}),
        ("too_many_bytes", lambda row: {**row, "prompt": " " * 2_000_000 + "x"}),
        ("malformed", lambda row: {**row, "chosen": 3}),
        # Of every row alike, whatever its messages say.
        ("refused_by_template", lambda row: {**row, "system": "Be brief."}),
    ]
    spoilt = list(zip(range(0, len(rows), 3), itertools.cycle(turns), strict=False))
    bad = {number: spoil(rows[number]) for number, (_, spoil) in spoilt}
    return [bad.get(number, row) for number, row in enumerate(rows)], Counter(reason for _, (reason, _) in spoilt)


@pytest.fixture(scope="module")
def no_rain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A template that refuses what a message says, and the role of system."""
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(
        "{% for message in messages %}{% if 'rain' in message.content %}{{ raise_exception('wet') }}{% endif %}"
        "{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return path


def run(overrides: list[str], *callbacks: Any) -> Path:
    return train(run_config(composed("train", overrides)), callbacks)


def metrics(run_dir: Path, name: str) -> list[float]:
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in found if name in row]


@pytest.mark.parametrize(
    "more", [[], ["data.num_workers=2"], ["data.encoded=auto"]], ids=["here", "workers", "encoded"]
)
def test_skipped_rows_are_counted_and_counts_add_up(
    more: list[str],
    world: TinyWorld,
    rows: Rows,
    no_rain: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    written, reasons = spoiled(rows)
    data = save(written, tmp_path / "pairs.jsonl")
    values = [f"data.train={data}", "data.on_bad=skip", f"model.student.chat_template={no_rain}", "trainer.epochs=1"]
    with caplog.at_level(logging.INFO, "ctpd_nemo"):
        run([*small_job(world, tmp_path / "run", "sft"), *values, f"data.validation=[{data}]", *more])
    at_opening = reasons["malformed"] + reasons["too_many_bytes"]
    on_the_way = reasons.total() - at_opening
    assert f"Skipped {at_opening} of {len(rows)} rows" in caplog.text
    assert f"trained on {len(rows) - reasons.total()} pairs, {on_the_way} skipped" in caplog.text
    for reason in ("unread_field", "unknown_role", "refused_by_template", "too_long"):
        assert re.search(rf"trained on .*{reason} {reasons[reason]}\b", caplog.text)
    assert sum(metrics(tmp_path / "run", "skipped")) == on_the_way
    assert metrics(tmp_path / "run", "val_skipped") == [on_the_way]
    # More than a tenth is said as soon as it is seen, on the way or of the encoded dataset.
    if "data.encoded=auto" in more:
        assert f"train: {on_the_way} of {len(rows) - at_opening} pairs are skipped" in caplog.text
    else:
        assert len(re.findall(r"run: \d+ of the first \d+ pairs are skipped: ", caplog.text)) == 1
        for reason in ("unread_field", "unknown_role", "refused_by_template"):
            assert re.search(rf"skipped a pair \({reason}\): \S*pairs\.jsonl:\d+", caplog.text)


@pytest.mark.parametrize(
    "number",
    [0, 1, 2, 4, 5, 6],
    ids=["unread_field", "unknown_role", "refused_content", "too_many_bytes", "malformed", "refused_role"],
)
def test_a_bad_row_stops_a_run_by_file_and_row(
    number: int, world: TinyWorld, rows: Rows, no_rain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is built where its kind shows so early."""
    monkeypatch.setattr("ctpd_nemo.pipeline.train.build_trainer", lambda *_, **__: pytest.fail("the job began to work"))
    written, _ = spoiled(rows)
    data = save([*rows[:2], written[3 * number], *rows[3:]], tmp_path / "pairs.jsonl")
    values = [f"data.train=[{data}]", f"model.student.chat_template={no_rain}", "data.global_batch_size=24"]
    with pytest.raises(InputError, match=rf"^{re.escape(str(data))}:3[,:]") as stopped:
        run([*small_job(world, tmp_path / "run", "sft"), *values])
    assert "\n" not in str(stopped.value)


def test_a_run_that_goes_on_over_bad_rows_ends_as_one_that_was_never_cut_off(
    world: TinyWorld, rows: Rows, no_rain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights, moments, metrics and counts: a row that is skipped is skipped again, and ends no restart."""
    data = save(spoiled(rows)[0], tmp_path / "pairs.jsonl")
    values = [f"data.train={data}", "data.on_bad=skip", f"model.student.chat_template={no_rain}"]
    values += ["trainer.epochs=1", "trainer.checkpoint_every=1", "optim.lr=1e-3"]

    def cut_off() -> None:
        raise RuntimeError("cut off")

    with caplog.at_level(logging.INFO, "ctpd_nemo"):
        whole = run([*small_job(world, tmp_path / "whole", "sft"), *values])
        with pytest.raises(RuntimeError, match="cut off"):
            run([*small_job(world, tmp_path / "cut", "sft"), *values], after_step(2, cut_off))
        assert all(metrics(tmp_path / "whole", "skipped")), "also in the step that is done again"
        last = run([*small_job(world, tmp_path / "cut", "sft"), *values])
    assert last.name == whole.name == "step-00000003"
    found, expected = tensors(last), tensors(whole)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    for name in ("step", "loss", "grad_norm", "skipped"):
        assert metrics(tmp_path / "cut", name) == metrics(tmp_path / "whole", name)
    told = re.findall(r"trained on (\d+ pairs, \d+ skipped .*); ", caplog.text)
    assert len(told) == 2
    assert told[0] == told[1]


@pytest.mark.parametrize("method", ["sft", "encoded", "score"])
def test_a_run_whose_first_pairs_are_all_unusable_stops_before_it_begins(
    method: str, world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("train", "score"):
        monkeypatch.setattr(f"ctpd_nemo.pipeline.{module}.build_trainer", lambda *_, **__: pytest.fail("it began"))
    told = r"train\.jsonl: found 0 pairs, 24 skipped \(prompt_too_long 24\), of those that come first; expected pairs"
    sft = [*small_job(world, tmp_path / "run", "sft"), "data.max_prompt_length=2"]
    jobs: dict[str, Callable[[], Any]] = {
        "sft": lambda: run(sft),
        "encoded": lambda: run([*sft, "data.encoded=auto"]),
        "score": lambda: scored(world, [world.train], tmp_path / "cache", "data.max_prompt_length=2"),
    }
    with pytest.raises(InputError, match=told):
        jobs[method]()


def test_a_share_of_skipped_pairs_warns_once_and_at_once(caplog: pytest.LogCaptureFixture) -> None:
    pair = Skipped(3, "x", "unread_field", "pairs.jsonl:4: found ...")
    with caplog.at_level(logging.WARNING, "ctpd_nemo"):
        skips, stats = SkipWarning("run", 0.1), StepStats()
        for step in range(10):
            stats += StepStats(pairs=14, skipped=Counter({"unread_field": 1, "too_long": 1}))
            skips.look(stats, [pair])
            warned = [record.getMessage() for record in caplog.records if "are skipped" in record.getMessage()]
            # 2 of 16 are more than a tenth, but chance may be at work; 4 of 32 are enough to say so.
            assert len(warned) == (step >= 1)
        assert warned[0].startswith("run: 4 of the first 32 pairs are skipped: 28 pairs, 4 skipped (")
        assert caplog.text.count("skipped a pair (unread_field): pairs.jsonl:4") == 1
        caplog.clear()
        SkipWarning("run", 0.2).look(stats, [])
        assert not caplog.records


# Ids


def scored(world: TinyWorld, data: list[Path], cache: Path, *more: str) -> Path:
    overrides = [
        f"model.student.path={world.student}",
        f"model.teacher.path={world.teacher}",
        f"data.train=[{','.join(map(str, data))}]",
        f"run_dir={cache.parent / 'score'}",
        f"method.cache={cache}",
        "method.pairs_per_shard=10",
        *(f"method.{role}={world.teacher}" for role in ("reference", "positive", "negative")),
        "method.top_k=5",
        *SMALL_BATCHES,
        *more,
    ]
    return score(run_config(composed("score", overrides)))


def job(world: TinyWorld, data: list[Path], cache: Path, method: str, run_dir: Path, *more: str) -> list[str]:
    """A run of three steps on cached scores."""
    values = [f"data.train=[{','.join(map(str, data))}]", f"model.teacher.path={world.teacher}", "optim.lr=1e-3"]
    values += [f"method.scores={cache}", "method.reference=cache", "trainer.max_steps=3"]
    return [*small_job(world, run_dir, method), *values, *more]


def looked_up(overrides: list[str], dataset: str = "train") -> list[list[Any]]:
    """What the cache of a run says of every pair of a dataset, as its loaders look it up."""
    config = run_config(composed("train", overrides))
    data = RunData(config, METHODS[config.method.name].responses, two_sided=True)
    if config.method.name == "uld":
        data.top_k = train_module._open_top_k(config, data)
    else:
        data.scores = train_module._open_scores(config, data)
    source = data.scores_of(dataset) or data.top_k_of(dataset)
    assert source is not None
    pairs = data.source(dataset).pairs(range(len(data.datasets()[dataset])))
    return [[part.tolist() for part in source.lookup(pair)] for pair in pairs]


@pytest.fixture(scope="module")
def halves(world: TinyWorld, rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The same pairs in two files: with ids of their own, with ids that count from 0 in both, and one for all."""
    home = tmp_path_factory.mktemp("halves")
    labels: dict[str, Callable[[int, int], Any]] = {
        "own": lambda half, number: f"{half}-{number}",
        "counted": lambda half, number: number,
        "shared": lambda half, number: 1.0,
    }
    return {
        name: [
            save(
                [{**row, "id": label(half, n)} for n, row in enumerate(rows[12 * half : 12 * half + 12])],
                home / name / f"{half}.jsonl",
            )
            for half in range(2)
        ]
        for name, label in labels.items()
    }


@pytest.fixture(scope="module")
def caches(
    world: TinyWorld, halves: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("caches")
    return {name: scored(world, data, home / name / "cache") for name, data in halves.items()}


@pytest.mark.parametrize("method", ["ctpd", "uld"])
def test_scores_do_not_depend_on_what_pairs_are_called(
    method: str, world: TinyWorld, halves: dict[str, list[Path]], caches: dict[str, Path], tmp_path: Path
) -> None:
    """Scoring and weights of pairs that share ids are those of pairs with ids of their own."""
    found = [looked_up(job(world, halves[name], caches[name], method, tmp_path)) for name in halves]
    assert len(found[0]) == 24
    assert len({json.dumps(one) for one in found[0]}) == 24
    assert found[1:] == [found[0]] * 2


def test_a_run_on_pairs_that_all_have_one_id_and_held_out_ones_among_them(
    world: TinyWorld, rows: Rows, halves: dict[str, list[Path]], caches: dict[str, Path], tmp_path: Path
) -> None:
    held_out = save([rows[n] for n in (20, 3, 9, 15)], tmp_path / "held_out.jsonl")
    for name in ("own", "shared"):
        run(job(world, halves[name], caches[name], "ctpd", tmp_path / name, f"data.validation={held_out}"))
    for metric in ("loss", "margin", "val_loss"):
        one, other = (metrics(tmp_path / name, metric) for name in ("own", "shared"))
        assert one == other
        assert one


def as_before(cache: Path, folder: Path) -> Path:
    """The cache as earlier versions wrote it, which knew pairs by their ids."""
    shutil.copytree(cache, folder)
    for path in folder.glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(with_sums(table.drop_columns(["row"])), path)
    return folder


@pytest.mark.parametrize("method", ["ctpd", "uld"])
def test_a_cache_of_before_is_read_where_ids_differ(
    method: str, world: TinyWorld, halves: dict[str, list[Path]], caches: dict[str, Path], tmp_path: Path
) -> None:
    old = as_before(caches["own"], tmp_path / "old")
    # One that was begun before and went on since has both.
    mixed = as_before(caches["own"], tmp_path / "mixed")
    for path in caches["own"].glob("*-00001.parquet"):
        shutil.copy(path, mixed / path.name)
    found = [looked_up(job(world, halves["own"], cache, method, tmp_path)) for cache in (caches["own"], old, mixed)]
    assert found[1:] == [found[0]] * 2


def test_scores_of_pairs_that_an_old_cache_cannot_tell_apart_are_refused(
    world: TinyWorld, halves: dict[str, list[Path]], caches: dict[str, Path], tmp_path: Path
) -> None:
    old = as_before(caches["counted"], tmp_path / "old")
    for method in ("ctpd", "uld"):
        with pytest.raises(InputError, match=r"twice; expected .* of each pair once; remove the cache, score again"):
            looked_up(job(world, halves["counted"], old, method, tmp_path))


@pytest.mark.parametrize("method", ["ctpd", "uld"])
def test_held_out_pairs_have_the_scores_of_the_same_pairs_whatever_their_ids(
    method: str, world: TinyWorld, rows: Rows, halves: dict[str, list[Path]], caches: dict[str, Path], tmp_path: Path
) -> None:
    """In another order, and under the ids of others: a row with the number or the id of another pair is not it."""
    numbers = (20, 3, 9, 15)
    held_out = save([{**rows[n], "id": 11 - n % 12} for n in numbers], tmp_path / "held_out.jsonl")
    for name in halves:
        values = job(world, halves[name], caches[name], method, tmp_path, f"data.validation={held_out}")
        of_train = looked_up(values)
        assert looked_up(values, "validation") == [of_train[n] for n in numbers]


def test_held_out_pairs_without_scores_are_named_before_models_are_built(
    world: TinyWorld,
    halves: dict[str, list[Path]],
    caches: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ctpd_nemo.pipeline.train.build_trainer", lambda *_, **__: pytest.fail("it began"))
    for method in ("ctpd", "uld"):
        with pytest.raises(
            InputError, match=r"test\.jsonl:1: found 4 of 4 pairs that are not among those of the cache"
        ):
            run(job(world, halves["own"], caches["own"], method, tmp_path / method, f"data.validation={world.test}"))


# Files that change


def overwrite(path: Path) -> None:
    """In place, with as many bytes."""
    text = path.read_bytes()
    with path.open("r+b") as file:
        file.write(text.replace(b"plus", b"sulp").replace(b"sea", b"see"))


def after_step(step: int, change: Callable[[], None]) -> LambdaCallback:
    return LambdaCallback(on_train_batch_end=lambda trainer, *_: change() if trainer.global_step == step else None)


def test_a_file_that_changes_under_a_run_stops_it_when_the_next_epoch_begins(world: TinyWorld, tmp_path: Path) -> None:
    data = Path(shutil.copy(world.train, tmp_path / "pairs.jsonl"))
    values = [*small_job(world, tmp_path / "run", "sft"), f"data.train=[{data}]"]
    values += ["trainer.epochs=2", "trainer.checkpoint_every=2"]
    with pytest.raises(InputError, match=rf"^{re.escape(str(data))}: found other content .* began"):
        run(values, after_step(3, lambda: overwrite(data)))
    # Three steps are an epoch: the fourth is of the next.
    assert len(metrics(tmp_path / "run", "lr")) == 3
    assert [path.name for path in find_checkpoints(tmp_path / "run/checkpoints")] == ["step-00000002"]
    # With the old content back, it goes on.
    data.write_bytes(world.train.read_bytes())
    run(values)
    assert find_checkpoints(tmp_path / "run/checkpoints")[-1].name == "step-00000006"


def test_a_file_that_changes_in_the_only_epoch_stops_the_run_before_its_checkpoint(
    world: TinyWorld, tmp_path: Path
) -> None:
    held_out = Path(shutil.copy(world.test, tmp_path / "held_out.jsonl"))
    values = [*small_job(world, tmp_path / "run", "sft"), f"data.validation=[{held_out}]"]
    with pytest.raises(InputError, match=r"held_out\.jsonl: found other content"):
        run([*values, "trainer.checkpoint_every=2"], after_step(1, lambda: overwrite(held_out)))
    assert find_checkpoints(tmp_path / "run/checkpoints") == []


def test_no_shard_is_scored_of_a_file_that_changed(
    world: TinyWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ctpd_nemo.pipeline.score_cache import ScoreWriter

    data = Path(shutil.copy(world.train, tmp_path / "pairs.jsonl"))
    write = ScoreWriter.write

    def then_changes(self: ScoreWriter, role: str, shard: int, pairs: Any) -> None:
        write(self, role, shard, pairs)
        overwrite(data)

    monkeypatch.setattr(ScoreWriter, "write", then_changes)
    with pytest.raises(InputError, match=r"pairs\.jsonl: found other content"):
        scored(world, [data], tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.parquet"))) <= 2


# Evaluation


def test_an_evaluation_skips_and_counts_bad_rows_or_names_them(
    world: TinyWorld, rows: Rows, no_rain: Path, tmp_path: Path
) -> None:
    written, reasons = spoiled(rows)
    data = save(written, tmp_path / "pairs.jsonl")
    options: dict[str, Any] = {"max_length": 128, "generations": 1, "max_new_tokens": 2, "chat_template": no_rain}
    found = evaluate_folder(world.student, data, on_bad="skip", **options)
    good = evaluate_folder(
        world.student, save([r for n, r in enumerate(rows) if n % 3], tmp_path / "good.jsonl"), **options
    )
    assert found.n == good.n == len(rows) - reasons.total()
    counted = Counter({{"malformed": "wrong_type"}.get(name, name): count for name, count in reasons.items()})
    assert found.skipped == counted
    for name in ("chosen_logprob", "rejected_logprob", "preference_accuracy"):
        assert np.isclose(getattr(found, name), getattr(good, name), atol=1e-6)
    assert found.samples[0].place == "pairs.jsonl:2"
    for at, reason in enumerate(reasons):
        if reason in (*FAULTS, "too_many_bytes", "malformed"):
            named = save([rows[0], written[3 * at]], tmp_path / "named.jsonl")
            with pytest.raises(InputError, match=r"named\.jsonl:2"):
                evaluate_folder(world.student, named, **options)
