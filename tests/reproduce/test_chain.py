"""A table as jobs of a cluster: which, at what cost, in which order, and what Slurm is told."""

import json
from pathlib import Path

import pytest

from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline.recipe import needed_stages
from ctpd_nemo.pipeline.stage_status import StageStatus, write_status
from ctpd_nemo.pipeline.stages import settings_of_stages
from ctpd_nemo.planner.plan import plan
from ctpd_nemo.reproduce.config import read_table
from ctpd_nemo.reproduce.job import reproduce
from tests.docker.stubs import Stubs
from tests.pipeline.recipe import composed

EXPERIMENT = "paper_qwen2.5-7b_to_llama3.2-1b"


def jobs(run_dir: Path, table: int, *overrides: str) -> list[dict[str, object]]:
    config = composed("reproduce", [f"experiment={EXPERIMENT}", f"table={table}", f"run_dir={run_dir}", *overrides])
    reproduce(config, EXPERIMENT, ["table=1", "data.num_workers=7", "experiment=x", "run_dir=y", *overrides])
    found: list[dict[str, object]] = json.loads((run_dir / f"table-{table}.json").read_text())["jobs"]
    return found


def test_jobs_cost_what_the_planner_says(tmp_path: Path) -> None:
    found = {str(job["name"]): job for job in jobs(tmp_path, 1) if not job["evaluates"]}
    planned = plan(composed("plan", [f"experiment={EXPERIMENT}", "gpus=8"])).values["stages"]
    costs = {stage["stage"]: stage["gpu_hours"] for stage in planned}
    for name, one in found.items():
        assert one["gpu_hours"] == pytest.approx(costs[name]), name
    assert {"dpo_student", "tis_dpo", "ctpd", "uld", "dskd", "multilevel_ot"} <= found.keys()


def test_commands_are_those_of_the_pipeline_and_of_evaluate(tmp_path: Path) -> None:
    found = jobs(tmp_path, 3, "seeds=[5]")
    (stage,) = [job for job in found if job["name"] == "ctpd-student_reference" and not job["evaluates"]]
    assert stage["command"] == [
        *("torchrun", "--nproc-per-node=8", "tools/pipeline.py", f"experiment={EXPERIMENT}", "data.num_workers=7"),
        *(f"run_dir={tmp_path}/seed-5", "seed=5", "only=[ctpd-student_reference]"),
    ]
    (evaluation,) = [job for job in found if job["name"] == "ctpd" and job["evaluates"]]
    assert evaluation["command"] == [
        *("python", "tools/evaluate.py", f"folder={tmp_path}/seed-5/ctpd/export", "device=cuda")
    ]


def test_one_seed_is_asked_for_as_several_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"seed: found 5; expected seeds=\[\.\.\.\]"):
        reproduce(composed("reproduce", [f"run_dir={tmp_path}", "seed=5"]), "tiny", ["table=2", "seed=5"])


def test_commands_hold_for_any_name_of_a_folder(tmp_path: Path) -> None:
    run_dir = tmp_path / "my runs, {all}=1's"
    config = composed("reproduce", [f"experiment={EXPERIMENT}", "table=3"])
    config.run_dir = str(run_dir)
    reproduce(config, EXPERIMENT)
    commands = [job["command"] for job in json.loads((run_dir / "table-3.json").read_text())["jobs"]]
    (given,) = {word for command in commands for word in command if word.startswith("run_dir=")}
    assert composed("pipeline", [given]).run_dir == f"{run_dir}/seed-0"
    folder = next(word for word in commands[-1] if word.startswith("folder="))
    assert composed("evaluate", [folder]).folder == f"{run_dir}/seed-0/ctpd-student_reference/export"


def test_jobs_of_several_nodes_are_brought_up_on_each(tmp_path: Path) -> None:
    (command,) = [job["command"] for job in jobs(tmp_path, 3, "gpus=16") if job["name"] == "sft_teacher"]
    assert isinstance(command, list)
    assert command[1:3] == ["--nnodes=2", "--nproc-per-node=8"]


def test_what_is_done_is_not_asked_for_again_and_stands_in_the_table(tmp_path: Path) -> None:
    folder = tmp_path / "seed-0" / "ctpd"
    (folder / "export").mkdir(parents=True)
    (folder / "stage.json").write_text(json.dumps({"fingerprint": "", "complete": True, "seconds": 1.0}))
    task = {"metric": "acc", "value": 0.5, "standard_error": 0.01, "n": 10}
    names = ("hellaswag", "arc_challenge", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k")
    (folder / "export" / "evaluation.json").write_text(json.dumps({"tasks": dict.fromkeys(names, task)}))
    done = {(job["name"], job["evaluates"]) for job in jobs(tmp_path, 1) if job["done"]}
    assert done == {("ctpd", False), ("ctpd", True)}
    (row,) = [line for line in (tmp_path / "table-1.md").read_text().splitlines() if line.startswith("| CTPD |")]
    assert row.startswith("| CTPD | 50.00 ± 1.00 (67.30 ± 0.46) |")
    assert row.endswith("| 50.00 (43.26) |")


def test_what_was_made_with_other_settings_is_asked_for_again(tmp_path: Path) -> None:
    def mark(name: str) -> None:
        config = composed("pipeline", [f"experiment={EXPERIMENT}", f"run_dir={tmp_path}/seed-0"])
        settings = settings_of_stages(config, needed_stages(config, [name]))[name]
        status = StageStatus("of its content", settings, complete=True, seconds=1.0)
        write_status(tmp_path / "seed-0" / name, status)

    for name in ("sft_teacher", "sft_student", "uld", "dskd"):
        mark(name)
    task = {"metric": "acc", "value": 0.5, "standard_error": 0.01, "n": 10}
    names = ("hellaswag", "arc_challenge", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k")
    for name in ("uld", "dskd"):
        (tmp_path / "seed-0" / name / "export").mkdir()
        evaluation = json.dumps({"tasks": dict.fromkeys(names, task)})
        (tmp_path / "seed-0" / name / "export/evaluation.json").write_text(evaluation)

    def states(*overrides: str) -> dict[str, str]:
        found = jobs(tmp_path, 1, *overrides)
        return {
            f"{job['evaluates']} {job['name']}": "outdated" if job["outdated"] else "done"
            for job in found
            if job["done"] or job["outdated"]
        }

    everything = ["False sft_teacher", "False sft_student", "False uld", "False dskd", "True dskd", "True uld"]
    assert states() == dict.fromkeys(everything, "done")
    # Other numbers, of one stage; what is cut up otherwise has the same.
    changed = states("stages.uld.optim.lr=3e-6", "data.microbatch_tokens=6144")
    assert changed == dict.fromkeys(everything, "done") | {"False uld": "outdated", "True uld": "outdated"}
    rows = (tmp_path / "table-1.md").read_text().splitlines()
    assert [row.split("|")[2].split("(")[0].strip() for row in rows if row.startswith(("| ULD", "| DSKD"))] == [
        *("50.00 ± 1.00", "-")
    ]
    # What all that follows builds on.
    changed = states("+stages.sft_student.trainer.epochs=2")
    assert set(changed.values()) == {"done", "outdated"}
    assert changed["False dskd"] == "outdated"


def test_gpus_that_do_not_fill_nodes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gpus: found 12; expected a node's 8 or fewer, or whole nodes"):
        jobs(tmp_path, 3, "gpus=12")


@pytest.mark.parametrize("trial", [{"limit": 5}, {"num_fewshot": 0}])
def test_a_trial_is_no_evaluation(trial: dict[str, int], tmp_path: Path) -> None:
    export = tmp_path / "seed-0" / "ctpd" / "export"
    export.mkdir(parents=True)
    whole = {"metric": "acc", "value": 0.5, "standard_error": 0.01, "n": 10}
    names = ("arc_challenge", "mmlu", "truthfulqa_mc2", "winogrande", "gsm8k")
    tasks = {**dict.fromkeys(names, whole), "hellaswag": whole | trial}
    (export / "evaluation.json").write_text(json.dumps({"tasks": tasks}))
    assert not [job["name"] for job in jobs(tmp_path, 1) if job["done"]]
    (row,) = [line for line in (tmp_path / "table-1.md").read_text().splitlines() if line.startswith("| CTPD |")]
    assert row.startswith("| CTPD | - (67.30 ± 0.46) | 50.00 ± 1.00 (40.61")


def test_slurm_gets_stages_and_evaluations_behind_them(
    stubs: Stubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubs.add("sbatch", 'echo $((1000 + $(grep -c "^sbatch" "$CALLS")))')
    for name, value in stubs.environment.items():
        monkeypatch.setenv(name, value)
    found = jobs(tmp_path / "run", 3, "launch=slurm", "gpus=16")
    calls = stubs.calls()
    assert len(calls) == len(found)
    number = {call[-1].removeprefix("only=[").removesuffix("]"): 1001 + at for at, call in enumerate(calls)}
    for job, call in zip(found, calls, strict=True):
        assert job["submitted"] == f"Slurm job {1001 + calls.index(call)}"
        after = {int(one) for option in call if "afterok" in option for one in option.split(":")[1:]}
        if job["evaluates"]:
            assert after == {number[str(job["name"])]}
            assert call[-1] == "device=cuda"
        else:
            assert "--nodes=2" in call
    call = calls[[job["name"] for job in found].index("ctpd-student_reference")]
    (waits,) = [option for option in call if option.startswith("--dependency=afterok:")]
    waited = {int(one) for one in waits.split(":")[1:]}
    assert waited == {number[name] for name in ("sft_teacher", "sft_student", "score", "score_student")}


@pytest.mark.parametrize("experiment", ["paper_qwen2.5-14b_to_llama3.1-8b", EXPERIMENT])
def test_the_paper_reports_every_row_of_its_first_table(experiment: str) -> None:
    table = read_table(1)
    assert table.paper[experiment].keys() == {"Teacher", "Student", *table.rows}
