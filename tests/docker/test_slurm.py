"""The pipeline as Slurm jobs: which wait for which, what each runs, and how one goes back into the queue."""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from ctpd_nemo.pipeline.recipe import STAGES
from tests.docker.stubs import ROOT, Stubs

SUBMIT, JOB = "docker/slurm/submit.sh", "docker/slurm/stages.sbatch"
SBATCH = 'echo $((1000 + $(grep -c "^sbatch" "$CALLS")))";cluster"'
JOB_VARIABLES = {"CTPD_ROOT": str(ROOT), "SLURM_JOB_ID": "77"}


def submitted(stubs: Stubs, *arguments: str) -> list[list[str]]:
    """The calls of ``sbatch``; the first job is number 1001."""
    stubs.add("sbatch", SBATCH)
    done = stubs.run(SUBMIT, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return stubs.calls()


def dependencies(call: list[str]) -> set[str]:
    (jobs,) = [re.findall(r":(\d+)", option) for option in call if option.startswith("--dependency=afterok:")] or [[]]
    return set(jobs)


def test_a_job_is_submitted_with_its_nodes_stages_and_configuration(stubs: Stubs) -> None:
    (call,) = submitted(stubs, "score,ctpd:3", "--", "experiment=tiny", "data.train=[a b.jsonl]")
    assert call == [
        "sbatch",
        "--parsable",
        "--nodes=3",
        "--job-name=ctpd-score",
        "--export=ALL",
        str(ROOT / JOB),
        "experiment=tiny",
        "data.train=[a b.jsonl]",
        "only=[score,ctpd]",
    ]


def test_jobs_are_told_of_the_checkout_whatever_its_path(stubs: Stubs, tmp_path: Path) -> None:
    checkout = tmp_path / "a, b=c é"
    shutil.copytree(ROOT / "docker", checkout / "docker")
    stubs.add("sbatch", 'printf "%s" "$CTPD_ROOT" > "${0%/*}/told"; echo 7')
    done = stubs.run(str(checkout / SUBMIT), "score:1")
    assert (done.returncode, done.stderr) == (0, "")
    assert (stubs.folder / "told").read_text() == str(checkout)


def test_each_job_waits_for_those_that_make_its_inputs_and_no_others(stubs: Stubs) -> None:
    calls = submitted(stubs, *(f"{stage.name}:1" for stage in STAGES))
    number = {stage.name: str(1001 + index) for index, stage in enumerate(STAGES)}
    for stage, call in zip(STAGES, calls, strict=True):
        sources = {**stage.inputs, **stage.optional, **stage.cached}.values()
        assert dependencies(call) == {number[source] for source in sources}, stage.name
        assert ("--kill-on-invalid-dep=yes" in call) == bool(stage.inputs)


def test_stages_of_one_job_wait_together_and_those_done_before_are_not_waited_for(stubs: Stubs) -> None:
    calls = submitted(stubs, "sft_student:1", "dpo_positive,dpo_negative:8", "score:2", "ctpd:1")
    assert [dependencies(call) for call in calls] == [set(), set(), {"1001", "1002"}, {"1001", "1003"}]
    assert [call[-1] for call in calls] == [
        "only=[sft_student]",
        "only=[dpo_positive,dpo_negative]",
        "only=[score]",
        "only=[ctpd]",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "command line: found no stages; expected STAGE"),
        (["--", "experiment=tiny"], "command line: found no stages; expected STAGE"),
        (["score"], "score: found no such form; expected STAGE"),
        (["score:0"], "score:0: found no such form; expected STAGE"),
        ([",:1"], ",:1: found no such form; expected STAGE"),
        (["score,:1"], "score,:1: found no such form; expected STAGE"),
        (["score,,ctpd:1"], "score,,ctpd:1: found no such form; expected STAGE"),
        (["scores:1"], "scores:1: found stage 'scores'; expected sft_teacher, "),
        (["score:1", "score:2"], "score:2: found score a second time; expected each stage once"),
        (["sft_student:1", "ctpd:1", "score:1"], "ctpd: found before score; expected the stages in the order"),
    ],
)
def test_a_chain_that_cannot_be_is_refused_before_anything_is_submitted(
    stubs: Stubs, arguments: list[str], said: str
) -> None:
    stubs.add("sbatch", SBATCH)
    done = stubs.run(SUBMIT, *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {said}")
    assert stubs.calls() == []


@pytest.mark.parametrize("retries", ["-1", "03", "a[$(touch made)]"])
def test_a_number_of_retries_that_is_none_is_refused(stubs: Stubs, retries: str) -> None:
    stubs.add("sbatch", SBATCH)
    done = stubs.run(SUBMIT, "score:1", CTPD_RETRIES=retries)
    assert done.returncode == 2
    assert done.stderr == f"error: CTPD_RETRIES: found {retries}; expected a number of times\n"
    assert stubs.calls() == []
    assert not (stubs.folder / "made").exists()


def test_a_submission_that_slurm_refuses_ends_the_chain(stubs: Stubs) -> None:
    stubs.add("sbatch", "exit 1")
    assert stubs.run(SUBMIT, "score:1", "ctpd:1").returncode == 1
    assert len(stubs.calls()) == 1


@pytest.mark.parametrize("status", [0, 3])
def test_a_job_runs_the_entry_point_once_a_node_and_ends_as_it_ends(stubs: Stubs, status: int) -> None:
    stubs.add("srun", f"exit {status}")
    with stubs.start(JOB, "experiment=tiny", "only=[score]", **JOB_VARIABLES) as job:
        assert job.wait(600) == status
    (call,) = stubs.calls()
    entrypoint = str(ROOT / "docker/entrypoint.sh")
    assert call[call.index(entrypoint) :] == [entrypoint, "pipeline", "experiment=tiny", "only=[score]"]
    assert "--ntasks-per-node=1" in call


def test_with_an_image_the_entry_point_is_the_containers(stubs: Stubs) -> None:
    stubs.add("srun")
    image = {"CTPD_IMAGE": "/images/ctpd.sqsh", "CTPD_MOUNTS": "/lustre:/lustre"}
    with stubs.start(JOB, "only=[score]", **JOB_VARIABLES, **image) as job:
        assert job.wait(600) == 0
    (call,) = stubs.calls()
    assert {"--container-image=/images/ctpd.sqsh", "--container-mounts=/lustre:/lustre"} <= set(call)
    assert call[-3:] == ["/opt/ctpd_nemo/docker/entrypoint.sh", "pipeline", "only=[score]"]


@pytest.mark.parametrize(("status", "requeued"), [(1, True), (0, False)])
def test_before_its_time_is_up_a_job_stops_its_tools_and_goes_back_into_the_queue(
    stubs: Stubs, status: int, requeued: bool
) -> None:
    """Unless the tools were done all the same."""
    stop = f"sleep 0.2; touch stopped; exit {status}"
    stubs.add("srun", f'trap "{stop}" TERM; echo $$ > pid; mv pid runs; while :; do sleep 0.05; done')
    stubs.add("scancel", "kill -TERM $(cat runs)")
    stubs.add("scontrol", "[[ -e stopped ]] || exit 5")
    with stubs.start(JOB, "only=[score]", **JOB_VARIABLES) as job:
        while not (stubs.folder / "runs").exists():
            assert job.poll() is None
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        assert job.wait(600) == (143 if requeued else 0)
    assert (stubs.folder / "stopped").exists()
    asked = ["scancel", "--signal=TERM", "77"]
    assert stubs.calls()[1:] == ([asked, ["scontrol", "requeue", "77"]] if requeued else [asked])


LATEST, SHARD = "runs/a/score/checkpoints/latest", "runs/a/score/cache/reference-00001.parquet"
OF_RUN_A = ("run_dir=runs/a", "only=[sft_student,score]")


def fails(stubs: Stubs, *arguments: str, writes: str = "", status: int = 7, **environment: str) -> int:
    """What a job ends with whose step fails, after writing a file; ``scontrol`` and ``squeue`` note their calls."""
    if not (stubs.folder / "squeue").exists():
        stubs.add("squeue", "echo RUNNING")
    stubs.add("srun", f'[[ ! "{writes}" ]] || {{ mkdir -p "$(dirname "{writes}")"; : > "{writes}"; }}; exit {status}')
    stubs.add("scontrol")
    with stubs.start(JOB, *arguments, **JOB_VARIABLES, **environment) as job:
        return job.wait(600)


def requeues(stubs: Stubs) -> int:
    return stubs.calls().count(["scontrol", "requeue", "77"])


@pytest.mark.parametrize("written", [LATEST, SHARD])
def test_a_job_that_fails_after_it_got_on_goes_back_into_the_queue(stubs: Stubs, written: str) -> None:
    assert fails(stubs, *OF_RUN_A, writes=written) == 143
    assert requeues(stubs) == 1


@pytest.mark.parametrize(
    ("written", "status"),
    [
        ("", 7),
        (LATEST, 0),
        # Of another stage; of another run; no sign of work that need not be done again.
        ("runs/a/sft_teacher/checkpoints/latest", 7),
        ("runs/b/score/checkpoints/latest", 7),
        ("runs/a/score/stage.json", 7),
        ("runs/a/score/logs/error-rank-0.txt", 7),
    ],
)
def test_a_job_that_did_not_get_on_ends_as_its_step(stubs: Stubs, written: str, status: int) -> None:
    assert fails(stubs, *OF_RUN_A, writes=written, status=status) == status
    assert requeues(stubs) == 0


def test_what_an_earlier_turn_wrote_does_not_count(stubs: Stubs) -> None:
    for name in (LATEST, SHARD):
        path = stubs.folder / name
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (time.time() - 60,) * 2)
    assert fails(stubs, *OF_RUN_A) == 7
    assert requeues(stubs) == 0


@pytest.mark.parametrize(("environment", "turns"), [({}, 3), ({"CTPD_RETRIES": "1"}, 1), ({"CTPD_RETRIES": "0"}, 0)])
def test_failures_send_a_job_back_so_many_times_whatever_its_other_turns(
    stubs: Stubs, environment: dict[str, str], turns: int
) -> None:
    again = environment | {"SLURM_RESTART_COUNT": "40"}
    ends = [fails(stubs, *OF_RUN_A, writes=LATEST, **again) for _ in range(turns + 1)]
    assert ends == [143] * turns + [7]
    assert requeues(stubs) == turns


def test_a_job_that_was_cancelled_does_not_come_back(stubs: Stubs) -> None:
    stubs.add("squeue", "echo COMPLETING")
    assert fails(stubs, *OF_RUN_A, writes=LATEST) == 7
    assert requeues(stubs) == 0


def test_a_request_that_slurm_refuses_leaves_the_status_of_the_step(stubs: Stubs) -> None:
    stubs.add("srun", f"mkdir -p $(dirname {LATEST}); : > {LATEST}; exit 7")
    stubs.add("scontrol", "exit 1")
    with stubs.start(JOB, *OF_RUN_A, **JOB_VARIABLES) as job:
        assert job.wait(600) == 7


@pytest.mark.parametrize("experiment", [None, *sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml"))])
def test_the_run_folder_is_the_one_that_the_tools_write(stubs: Stubs, experiment: str | None) -> None:
    values = [f"experiment={experiment}"] if experiment else []
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        folder = compose("pipeline", values).run_dir
    assert fails(stubs, *values, "only=[ctpd-random]", writes=f"{folder}/ctpd-random/checkpoints/latest") == 143


def test_a_run_folder_may_be_quoted_for_hydra(stubs: Stubs) -> None:
    values = [r"run_dir='runs/it\'s, a=b'", "only=[ctpd]"]
    assert fails(stubs, *values, writes="runs/it's, a=b/ctpd/checkpoints/latest") == 143


def test_a_job_that_was_not_submitted_by_the_script_says_so(stubs: Stubs) -> None:
    stubs.add("srun")
    done = stubs.run(JOB)
    assert done.returncode != 0
    assert "CTPD_ROOT: is not set: start this job with docker/slurm/submit.sh" in done.stderr
    assert stubs.calls() == []


def batch_options() -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", (ROOT / JOB).read_text(), re.MULTILINE))


@pytest.mark.parametrize(("environment", "given"), [({}, 780), ({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "200"}, 200)])
def test_slurm_leaves_the_tools_time_to_stop(stubs: Stubs, environment: dict[str, str], given: int) -> None:
    """The batch shell alone is warned, and passes it on; torchrun kills its processes sooner than Slurm the job."""
    stubs.add("srun", 'echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT"')
    done = stubs.run(JOB, "only=[score]", **JOB_VARIABLES, **environment)
    assert (done.returncode, done.stdout) == (0, f"{given}\n")
    options = batch_options()
    shell, seconds = re.fullmatch(r"(B):TERM@(\d+)", options["signal"]).groups()  # type: ignore[union-attr]
    assert shell == "B"
    assert int(seconds) >= given + 60
    assert options["ntasks-per-node"] == "1"
    assert {"requeue", "open-mode"} <= options.keys()


def test_a_job_has_all_of_its_nodes() -> None:
    options = batch_options()
    assert "exclusive" in options
    assert options["mem"] == "0"
