"""The page of a run: what jobs left, whole or damaged, and what was changed."""

import json
import logging
from pathlib import Path

import pytest

from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline.tiny_world.build import TinyWorld
from ctpd_nemo.report.charts import number
from ctpd_nemo.report.run_page import RunPageConfig, add_run_page, write_run_page
from tests.pipeline.recipe import recipe
from tests.pipeline.tool import run_tool
from tests.report.conftest import HOSTILE
from tests.report.reading import Element, read_page


def table(page: Element, heading: str) -> list[list[str]]:
    """The cells of the first table behind a heading."""
    body = page.find(tag="body")[0].children
    at = next(place for place, element in enumerate(body) if element.text.startswith(heading))
    rows = next(found for element in body[at:] if (found := element.find(tag="tr")))
    return [[cell.text for cell in row.children] for row in rows]


def of_run(folder: Path) -> Element:
    return read_page(write_run_page(RunPageConfig(str(folder))))


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """The folder of a small job, written by hand."""
    folder = tmp_path / "job"
    folder.mkdir()
    rows = [{"step": step, "loss": 1 / step, "tokens_per_second": 1000.0, "skipped": 1.0} for step in range(1, 6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"method": {"name": "sft"}, "policy": "teacher", "seed": 3}))
    return folder


def test_a_job_by_hand(job: Path) -> None:
    page = of_run(job)
    assert dict(zip(*table(page, "Jobs"), strict=True)) == {
        "job": "job",
        "method": "sft",
        "trained": "teacher",
        "status": "unknown",
        "steps": "5",
        "seconds": "",
        "last loss": "0.2",
        "tokens/s, median": "1,000",
        "pairs skipped": "5",
    }
    # Nothing to compare with is not "changed: 0 values".
    summaries = [summary.text for summary in page.find(tag="summary")]
    assert [text for text in summaries if "Changed" in text] == []
    assert "Not compared with the config files: not known: the job was not started by one of the tools" in page.text
    loss = page.find(tag="svg")[0].attributes["data-curves"]
    assert [(steps, value) for _, steps, value in json.loads(loss)[0][1]] == [
        (f"step {step}", number(1 / step)) for step in range(1, 6)
    ]
    assert ["seed", "3"] in [[cell.text for cell in row.children] for row in page.find(tag="tr")]


def test_hostile_names_and_values_stay_text(job: Path) -> None:
    hostile = job.with_name("<script><img src=x onerror=alert(1)>&'")
    job.rename(hostile)
    config = {"method": {"name": HOSTILE}, "policy": HOSTILE, HOSTILE: {"<b>'\"": HOSTILE}}
    (hostile / "config.json").write_text(json.dumps(config))
    (hostile / "origin.json").write_text(
        json.dumps({"config": "pipeline", "experiment": HOSTILE, "method": None, "overrides": []})
    )
    with (hostile / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 1, HOSTILE: 1.0, "'><script>x": 2.0}) + "\n")
    evaluation = {"tasks": {HOSTILE: {"metric": HOSTILE, "value": 0.5, "standard_error": 0.1, "n": 10}}}
    (hostile / "export").mkdir()
    (hostile / "export" / "evaluation.json").write_text(json.dumps(evaluation))
    page = of_run(hostile)
    assert "<script>alert" not in (hostile / "report.html").read_text()
    assert "<script><img src=x onerror=alert(1)>&'" in page.find(tag="h1")[0].text
    names = [json.loads(svg.attributes["data-curves"])[0][0] for svg in page.find(tag="svg")]
    assert HOSTILE in names
    assert "'><script>x" in names


@pytest.mark.parametrize("key", ["run_dir", "experiment", "method"])
def test_a_page_fills_nothing_in_that_its_folder_asks_for(job: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "s3cr3t")
    asked = "${oc.env:SOME_SECRET}/x"
    config = {"method": {"name": "sft"}, "run_dir": asked if key == "run_dir" else "runs/x"}
    (job / "config.json").write_text(json.dumps(config))
    origin = {"config": "pipeline", "experiment": None, "method": None, "overrides": [f"seed={asked}"]}
    (job / "origin.json").write_text(json.dumps({**origin, **({} if key == "run_dir" else {key: asked})}))
    of_run(job)
    assert "s3cr3t" not in (job / "report.html").read_text()


@pytest.mark.parametrize(
    "name", ["config.json", "stage.json", "origin.json", "export/evaluation.json", "metrics.jsonl"]
)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff\xfe\x00", b'{"complete": [], "tasks": 3, "preferences": 1}']
)
def test_damage_is_told_and_the_rest_is_shown(job: Path, name: str, content: bytes) -> None:
    (job / name).parent.mkdir(exist_ok=True)
    (job / name).write_bytes(content)
    page = of_run(job)
    assert table(page, "Jobs")[1][0] == "job"
    if name != "metrics.jsonl":
        assert page.find(tag="svg")
    if content == b"{":
        assert ("cut off" if name == "metrics.jsonl" else name) in page.text


def test_a_comparison_is_read_from_evaluations(job: Path) -> None:
    task = {"metric": "acc_norm", "value": 0.25, "standard_error": 0.01, "n": 10}
    (job / "export").mkdir()
    (job / "export" / "evaluation.json").write_text(json.dumps({"tasks": {"hellaswag": task}}))
    assert table(of_run(job), "Comparison")[1] == ["hellaswag", "acc_norm", "10", "0.250 \u00b1 0.010"]


def test_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError, match="the run_dir of a job or pipeline"):
            write_run_page(RunPageConfig(str(folder)))
    with pytest.raises(InputError, match="run_dir: found nothing"):
        write_run_page(RunPageConfig())


def test_a_run_that_is_done_does_not_fail_over_its_page(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ctpd_nemo"):
        add_run_page(tmp_path / "absent")
    assert "no report.html" in caplog.text


@pytest.fixture(scope="module")
def pipeline(world: TinyWorld, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of three steps a stage, as the tool runs it, with a value changed on the command line."""
    folder = tmp_path_factory.mktemp("pipeline")
    values = [*recipe(world, folder / "run"), "experiment=quickstart", "seed=5"]
    trained = ("sft_teacher", "sft_student", "dpo_positive", "dpo_negative", "dpo_student", "ctpd")
    values += [f"++stages.{name}.trainer.max_steps=3" for name in trained]
    status, _, stderr = run_tool("pipeline.py", values, folder)
    assert status == 0, stderr
    return folder / "run"


def test_a_pipeline_ends_with_its_page(pipeline: Path) -> None:
    page = read_page(pipeline / "report.html")
    jobs = table(page, "Jobs")
    names = ["sft_teacher", "sft_student", "dpo_positive", "dpo_negative", "score", "dpo_student", "ctpd"]
    assert [row[0] for row in jobs[1:]] == names
    for row in jobs[1:]:
        facts = dict(zip(jobs[0], row, strict=True))
        assert facts["status"] == "complete"
        assert facts["steps"] == ("" if facts["job"] == "score" else "3")
    last = json.loads((pipeline / "ctpd" / "metrics.jsonl").read_text().splitlines()[2])
    assert dict(zip(jobs[0], jobs[-1], strict=True))["last margin"] == number(last["margin"])


def test_what_was_changed_from_the_experiment_file_is_shown(pipeline: Path, world: TinyWorld) -> None:
    changed = {key: (before, after) for key, before, after in table(read_page(pipeline / "report.html"), "ctpd")[1:]}
    assert changed["seed"] == ("0", "5")
    assert changed["trainer.max_steps"] == ("75", "3")
    assert changed["data.global_batch_size"] == ("32", "8")
    assert changed["data.train"] == ("[]", f"['{world.train}']")
    # Outputs of earlier stages are where this run has them, and the rest is what the file says.
    assert not {"model.student.path", "method.scores", "method.beta", "data.max_length", "run_dir"} & set(changed)


def test_weights_by_step_are_those_of_the_cache(pipeline: Path) -> None:
    rows = [json.loads(line) for line in (pipeline / "ctpd" / "metrics.jsonl").read_text().splitlines()]
    page = read_page(pipeline / "report.html")
    drawn = [svg for svg in page.find(tag="svg") if "data-columns" in svg.attributes]
    assert [svg.attributes["aria-label"] for svg in drawn] == [
        "span weights, chosen by step",
        "span weights, rejected by step",
    ]
    for svg, side in zip(drawn, ("chosen", "rejected"), strict=True):
        columns = json.loads(svg.attributes["data-columns"])
        for (_, steps, bins), row in zip(columns, rows, strict=True):
            counts = row["weights"][side]
            shares = {
                f"from {number(float(edge))}": f"{count / sum(counts.values()):.1%}" for edge, count in counts.items()
            }
            assert (steps, dict(bins)) == (f"step {row['step']}", shares)


def test_spans_of_the_pairs_show_the_scores_of_the_cache(pipeline: Path, world: TinyWorld, page: Path) -> None:
    import numpy as np
    import pyarrow.parquet as pq

    from ctpd_nemo.report.spans_page import PairsConfig, SpansPageConfig, write_spans_page

    cache = pipeline / "score" / "cache"
    config = SpansPageConfig(
        tokenizers=[str(world.teacher), str(world.student)],
        data=PairsConfig(train=[str(world.train)]),
        scores=str(cache),
        limit=3,
        output=str(page),
    )
    write_spans_page(config)
    roles = {role: pq.read_table(cache / f"{role}-00000.parquet").to_pylist() for role in ("positive", "negative")}
    views = read_page(page).find(class_="view")
    assert len(views) == 6
    for index, view in enumerate(views):
        side, sign = (("chosen", 1.0), ("rejected", -1.0))[index % 2]
        up, down = (np.array(roles[role][index // 2][side]) for role in ("positive", "negative"))
        bands = view.find(class_="band")
        assert len(bands) == len(up)
        assert bands[-1].attributes["data-kind"] == "end"
        for band, ratio in zip(bands, up - down, strict=True):
            shown = dict(item.split("=") for item in band.attributes["data-scores"].split("|"))
            assert float(shown["log-prob ratio"]) == pytest.approx(ratio, abs=1e-4)
            assert float(shown["weight"]) == pytest.approx(np.exp(sign * np.clip(ratio, -0.5, 1.5)), abs=1e-4)
    config.data.train = [str(world.test)]
    with pytest.raises(InputError, match="data: found"):
        write_spans_page(config)
    config.data.train, config.tokenizers = [str(world.train)], config.tokenizers[::-1]
    with pytest.raises(InputError, match="teacher_tokenizer"):
        write_spans_page(config)
