"""From Hydra's files and the command line to typed configs: what is there is right, what is wrong is named."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from ctpd_nemo.conf_folder import in_conf
from ctpd_nemo.data.config import DataConfig
from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.evaluate import EvaluateConfig
from ctpd_nemo.models.config import ResumeConfig, RunConfig
from ctpd_nemo.models.ctpd import CTPDConfig
from ctpd_nemo.models.dpo import DPOConfig
from ctpd_nemo.models.scorer import ScoreConfig
from ctpd_nemo.models.sft import SFTConfig
from ctpd_nemo.models.tis_dpo import TISDPOConfig
from ctpd_nemo.pipeline.config import run_config, typed
from ctpd_nemo.pipeline.export import ExportConfig
from ctpd_nemo.pipeline.recipe import find_stages
from ctpd_nemo.pipeline.stages import StageResult, stage_config
from ctpd_nemo.report.run_page import RunPageConfig
from ctpd_nemo.report.spans_page import SpansPageConfig
from ctpd_nemo.reproduce.config import ReproduceConfig

CONF = Path(__file__).resolve().parents[2] / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
OF_THE_PAPER = [name for name in EXPERIMENTS if name not in ("tiny", "quickstart")]
# World sizes that the experiments say they are for.
GPUS = {
    **{"qwen2.5-72b_to_llama3.1-8b": 64, "qwen2.5-14b_to_llama3.1-8b": 8, "qwen2.5-7b_to_llama3.2-1b": 8},
    **{"paper_qwen2.5-14b_to_llama3.1-8b": 8, "paper_qwen2.5-7b_to_llama3.2-1b": 8, "tiny": 1, "quickstart": 1},
}


def composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(name, overrides=list(overrides))


def train_config(*overrides: str) -> RunConfig:
    return run_config(composed("train", *overrides))


def stage_configs(*overrides: str) -> dict[str, RunConfig]:
    """The typed config of every stage of the recipe, as if the stages before it were done."""
    config = composed("pipeline", *overrides)
    present = find_stages(config)
    done = {stage.name: StageResult(Path("done") / stage.name, 0.0, skipped=True) for stage in present}
    return {stage.name: stage_config(config, stage, done) for stage in present}


def values(**changed: Any) -> DictConfig:
    return OmegaConf.merge({"method": {"name": "sft"}}, changed)  # type: ignore[return-value]


def error_of(config: DictConfig) -> InputError:
    with pytest.raises(InputError) as error:
        run_config(config)
    return error.value


# What is there


@pytest.mark.parametrize(
    ("method", "config"),
    [("sft", SFTConfig), ("dpo", DPOConfig), ("tis_dpo", TISDPOConfig), ("ctpd", CTPDConfig), ("score", ScoreConfig)],
)
def test_the_method_files_hold_the_defaults_of_the_code(method: str, config: type[Any]) -> None:
    written = OmegaConf.to_container(OmegaConf.load(CONF / "method" / f"{method}.yaml"))
    assert written == OmegaConf.to_container(OmegaConf.structured(config))


def test_the_train_config_holds_the_defaults_of_the_code() -> None:
    run = train_config("method=sft")
    run.optim.betas = tuple(run.optim.betas)  # YAML has lists only
    assert run == RunConfig(method=SFTConfig(), run_dir="runs/sft")


def test_the_score_and_export_configs_are_valid() -> None:
    scoring = run_config(composed("score", "method.cache=cache", "method.reference=teacher"))
    assert scoring.method == ScoreConfig(cache="cache", reference="teacher")
    scoring.method.check()
    assert typed(ExportConfig, composed("export", "folder=out")) == ExportConfig(folder="out")


def test_configs_of_what_looks_at_results_are_the_defaults_of_their_classes() -> None:
    classes = {"evaluate": EvaluateConfig, "inspect_spans": SpansPageConfig, "report": RunPageConfig}
    for name, config_class in classes.items():
        assert typed(config_class, composed(name)) == config_class()


def test_every_config_file_is_covered_here() -> None:
    top = {path.stem for path in CONF.glob("*.yaml")}
    # ``encode``, ``plan`` and ``reproduce`` take the keys of the pipeline: tests of their own run them.
    pipelines = {"pipeline", "quickstart", "encode", "plan", "reproduce"}
    assert top == {"train", "score", "export", *pipelines, "evaluate", "inspect_spans", "report"}
    assert set(EXPERIMENTS) == set(GPUS)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_gives_every_stage_a_config_that_is_valid(experiment: str) -> None:
    stages = stage_configs(f"experiment={experiment}")
    assert {"sft_teacher", "sft_student", "dpo_positive", "dpo_negative", "score", "ctpd"} <= stages.keys()
    for run in stages.values():
        run.check(GPUS[experiment])
        run.data.check()
        if hasattr(run.method, "check"):
            run.method.check()


def test_the_quickstart_is_the_pipeline_with_an_experiment_of_its_own() -> None:
    quickstart, pipeline = composed("quickstart"), composed("pipeline", "experiment=quickstart")
    assert set(quickstart.world) == {"n_train", "n_test"}
    for key in set(pipeline) - {"run_dir"}:
        assert quickstart[key] == pipeline[key]
    assert quickstart.stages.dpo_student.method.name == "dpo"


@pytest.mark.parametrize("experiment", [None, *OF_THE_PAPER])
def test_stages_have_the_papers_hyperparameters(experiment: str | None) -> None:
    """Section 4.1: rates, betas, weights, batch, schedule, warm-up, epochs and seed."""
    stages = stage_configs(*([f"experiment={experiment}"] if experiment else []))
    rates = {name: run.optim.lr for name, run in stages.items() if not name.startswith("score")}
    # Of a contrastive pair, whoever's it is, and of whatever trains the student after SFT.
    of_stage = {"sft_teacher": 4e-6, "sft_student": 4e-6, "dpo_positive": 2e-6, "dpo_negative": 2e-6}
    of_stage |= {"dpo_student_positive": 2e-6, "dpo_student_negative": 2e-6}
    assert rates == {name: of_stage.get(name, 1e-6) for name in rates}
    assert {"sft_teacher", "sft_student", "dpo_positive", "dpo_negative", "ctpd"} <= rates.keys()
    assert stages["dpo_positive"].method == DPOConfig(beta=0.3)
    assert stages["dpo_negative"].method == DPOConfig(beta=0.3, reverse=True)
    weights = {"weight_scale": 1.0, "weight_lower": -0.5, "weight_upper": 1.5, "weights": "contrastive_teacher"}
    assert stages["ctpd"].method == CTPDConfig(beta=0.1, scores=str(Path("done/score")), **weights)
    for run in stages.values():
        assert run.data.global_batch_size == 16
        assert (run.optim.schedule, run.optim.warmup_fraction) == ("cosine", 0.05)
        assert (run.trainer.epochs, run.trainer.max_steps) == (1, None)
        assert run.seed == 0
        assert run.precision.dtype == "bf16"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_stages_learn_to_end_turns_and_only_ctpd_s_spans_in_the_papers_runs_leave_the_end_out(experiment: str) -> None:
    without = {name for name, run in stage_configs(f"experiment={experiment}").items() if not run.data.include_eos}
    of_ctpd = {name for name in stage_configs(f"experiment={experiment}") if name.startswith(("score", "ctpd"))}
    assert without == (of_ctpd if experiment.startswith("paper_") else set())
    assert train_config("method=sft").data.include_eos


@pytest.mark.parametrize(
    ("overrides", "place", "expected"),
    [
        (["+stages.ctpd.data={include_eos:false}"], "stages.ctpd.data.include_eos", "True, as in stages.score:"),
        (["+stages.score.data={max_length:64}"], "stages.ctpd.data.max_length", "64, as in stages.score:"),
        (["+stages.score.data={response_text:rendered}"], "stages.ctpd.data.response_text", "rendered, as in"),
        (
            [
                "stages.score.method.top_k=5",
                "stages.uld={method:{name:uld,reference:cache},data:{include_eos:false}}",
            ],
            "stages.uld.data.include_eos",
            "True, as in stages.score:",
        ),
        (
            ["stages.score_student={method:{name:score},data:{include_eos:false}}"],
            "stages.ctpd.data.include_eos",
            "False, as in stages.score_student:",
        ),
    ],
)
def test_a_stage_that_reads_scores_of_other_spans_is_named_before_any_begins(
    overrides: list[str], place: str, expected: str
) -> None:
    with pytest.raises(InputError) as error:
        stage_configs(*overrides)
    assert error.value.place == place
    assert error.value.expected.startswith(expected)


@pytest.mark.parametrize("experiment", OF_THE_PAPER)
def test_experiments_on_base_models_bring_a_chat_template_found_from_any_folder(
    experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for run in stage_configs(f"experiment={experiment}").values():
        given = run.model.student.chat_template
        assert given is not None
        assert in_conf(given) == CONF / given
        assert run.model.teacher.chat_template is None
    (tmp_path / "chat_templates").mkdir()
    (tmp_path / given).write_text("one's own of that name goes first")
    assert in_conf(given) == Path(given)


def test_variables_of_a_template_are_given_on_the_command_line() -> None:
    run = train_config("method=sft", "model.student.chat_template_kwargs={enable_thinking: false, depth: [1, x]}")
    assert run.model.student.chat_template_kwargs == {"enable_thinking": False, "depth": [1, "x"]}
    assert run.model.teacher.chat_template_kwargs is None
    stages = stage_configs("model.teacher.chat_template_kwargs={thinking: true}")
    assert {str(run.model.teacher.chat_template_kwargs) for run in stages.values()} == {"{'thinking': True}"}


def test_the_papers_pairs_are_there_and_one_beyond_them() -> None:
    pairs = {
        (Path(run.model.teacher.path).name, Path(run.model.student.path).name)
        for run in (stage_configs(f"experiment={name}")["sft_teacher"] for name in OF_THE_PAPER)
        if run.model.teacher.path and run.model.student.path
    }
    assert pairs == {
        ("Qwen2.5-14B", "Llama-3.1-8B"),
        ("Qwen2.5-7B", "Llama-3.2-1B"),
        ("Qwen2.5-72B", "Llama-3.1-8B"),
    }


def test_each_stage_starts_from_what_the_stages_before_it_left() -> None:
    stages = stage_configs("model.student.path=student", "model.teacher.path=teacher", "run_dir=run")
    assert stages["sft_teacher"].policy_side().path == "teacher"
    assert stages["sft_student"].policy_side().path == "student"
    for name in ("dpo_positive", "dpo_negative"):
        assert stages[name].policy_side().path == "done/sft_teacher"
    assert stages["score"].method == ScoreConfig(
        cache="run/score/cache",
        reference="done/sft_teacher",
        positive="done/dpo_positive",
        negative="done/dpo_negative",
    )
    assert stages["ctpd"].policy_side().path == "done/sft_student"
    assert stages["ctpd"].model.teacher.path == "done/sft_teacher"
    assert {run.run_dir for run in stages.values()} == {f"run/{name}" for name in stages}


# The command line


def test_the_command_line_changes_one_value_and_leaves_the_others() -> None:
    run = train_config(
        "method=dpo", "method.reverse=true", "parallel.tensor=2", "model.student.path=here", "optim.lr=3e-5"
    )
    assert run.method == DPOConfig(reverse=True)
    assert (run.parallel.tensor, run.parallel.pipeline) == (2, 1)
    assert (run.model.student.path, run.model.teacher.path) == ("here", None)
    assert (run.optim.lr, run.optim.schedule) == (3e-5, "cosine")
    assert run.run_dir == "runs/dpo"


def test_the_command_line_changes_one_stage_or_all() -> None:
    stages = stage_configs("stages.ctpd.optim.lr=5e-6", "+stages.score.parallel.tensor=2", "data.max_length=512")
    assert stages["ctpd"].optim.lr == 5e-6
    assert stages["dpo_positive"].optim.lr == 2e-6
    assert {name for name, run in stages.items() if run.parallel.tensor == 2} == {"score"}
    assert {run.data.max_length for run in stages.values()} == {512}


def test_a_method_takes_its_own_values_and_no_other() -> None:
    with pytest.raises(Exception, match="reverse"):
        composed("train", "method=ctpd", "method.reverse=true")


def lists_of_texts(config_class: type[Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for field in fields(config_class):
        key = (*above, field.name)
        if is_dataclass(field.type):
            yield from lists_of_texts(field.type, key)
        elif field.type in (list[str], list[str] | None):
            yield key


@pytest.mark.parametrize("config_class", [DataConfig, ResumeConfig, EvaluateConfig, SpansPageConfig, ReproduceConfig])
def test_one_path_or_name_is_taken_where_several_may_be(config_class: type[Any]) -> None:
    keys = list(lists_of_texts(config_class))
    assert keys
    for key in keys:
        one, several = (OmegaConf.create({}) for _ in range(2))
        OmegaConf.update(one, ".".join(key), "a, b.jsonl")
        OmegaConf.update(several, ".".join(key), ["a, b.jsonl"])
        assert typed(config_class, one) == typed(config_class, several) != config_class()


def test_one_file_of_pairs_is_given_without_brackets() -> None:
    run = train_config("method=sft", "data.train=pairs/train.jsonl", "data.validation='held out=1.jsonl'")
    assert (run.data.train, run.data.validation) == (["pairs/train.jsonl"], ["held out=1.jsonl"])
    stages = stage_configs("data.train=train.jsonl", "+stages.ctpd.data.train=own.jsonl")
    assert stages["ctpd"].data.train == ["own.jsonl"]
    assert stages["score"].data.train == stages["sft_teacher"].data.train == ["train.jsonl"]


# What is wrong


@pytest.mark.parametrize(
    ("config", "place", "expected"),
    [
        (values(optim={"lrr": 1}), "optim.lrr", "'lr'?"),
        (values(parallel={"tensr": 2}), "parallel.tensr", "'tensor'?"),
        (values(model={"student": {"pth": "x"}}), "model.student.pth", "'path'?"),
        (values(dat={}), "dat", "'data'?"),
        (values(method={"name": "dpo", "revers": True}), "method.revers", "'reverse'?"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(config: DictConfig, place: str, expected: str) -> None:
    error = error_of(config)
    assert (error.place, error.found, error.expected) == (place, "a key that is not known", expected)


def test_an_unknown_key_that_is_like_no_other_is_answered_with_those_there_are() -> None:
    error = error_of(values(model={"zzz": 1}))
    assert (error.place, error.expected) == ("model.zzz", "one of student, teacher")


@pytest.mark.parametrize(
    ("config", "place", "found", "expected"),
    [
        (values(parallel={"tensor": "two"}), "parallel.tensor", "'two'", "a value of type int"),
        (values(optim={"lr": "fast"}), "optim.lr", "'fast'", "a value of type float"),
        (values(data={"train": ""}), "data.train", "''", "a value of type list[str]"),
        (values(data={"train": {"a": "b"}}), "data.train", "{'a': 'b'}", "a value of type list[str]"),
        (values(data={"include_eos": 3.5}), "data.include_eos", "3.5", "a value of type bool"),
        (values(trainer={"epochs": None}), "trainer.epochs", "None", "a value of type int"),
        (values(trainer={"max_steps": "all"}), "trainer.max_steps", "'all'", "a value of type int | None"),
        (values(method={"name": "dpo", "beta": [1]}), "method.beta", "[1]", "a value of type float"),
        (values(model={"student": 7}), "model.student", "7", "keys and their values"),
        (values(optim=[1]), "optim", "[1]", "keys and their values"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_value_of_the_wrong_type_is_named(config: DictConfig, place: str, found: str, expected: str) -> None:
    error = error_of(config)
    assert (error.place, error.found, error.expected) == (place, found, expected)


def test_a_value_that_points_nowhere_is_named() -> None:
    error = error_of(values(run_dir="${home}/run"))
    assert error.place == "run_dir"
    assert "home" in error.found


@pytest.mark.parametrize("method", [None, {}, {"name": "ppo"}, "sft", {"name": ["sft"]}])
def test_an_unknown_method_is_answered_with_those_there_are(method: Any) -> None:
    error = error_of(OmegaConf.create({"method": method}))
    expected = "one of sft, dpo, tis_dpo, ctpd, uld, dskd, multilevel_ot, score"
    assert (error.place, error.expected) == ("method.name", expected)


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"name": "ctpd"}, "method.scores"),
        ({"name": "dpo", "reference": "cache"}, "method.scores"),
        ({"name": "dpo", "reference": "teacher"}, "method.reference"),
        ({"name": "ctpd", "scores": "x", "weight_lower": 2.0}, "method.weight_lower"),
        ({"name": "ctpd", "scores": "x", "weights": "contrastive"}, "method.weights"),
        ({"name": "ctpd", "scores": "x", "reference_model": "policy"}, "method.reference_model"),
        ({"name": "ctpd", "reference": "online", "weights": "contrastive_student"}, "method.student_positive"),
        ({"name": "tis_dpo"}, "method.positive"),
        ({"name": "tis_dpo", "reference": "cache"}, "method.scores"),
        ({"name": "score", "cache": "x", "student": "y", "margin": True}, "method.margin"),
        ({"name": "score", "cache": "x", "student": "y", "spans": "some"}, "method.spans"),
        ({"name": "ctpd", "reference": "online"}, "method.positive"),
        ({"name": "ctpd", "reference": "online", "positive": "x"}, "method.negative"),
        ({"name": "score"}, "method.cache"),
        ({"name": "score", "cache": "x"}, "method"),
        ({"name": "score", "cache": "x", "reference": "y", "pairs_per_shard": 0}, "method.pairs_per_shard"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_method_values_that_contradict_each_other_are_named(config: dict[str, Any], place: str) -> None:
    assert error_of(OmegaConf.create({"method": config})).place == place


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"parallel": {"tensor": 0}}, "parallel.tensor"),
        ({"parallel": {"tensor": 3}}, "parallel"),
        ({"parallel": {"sequence": True}}, "parallel.sequence"),
        ({"parallel": {"virtual_pipeline": 2}}, "parallel.virtual_pipeline"),
        ({"parallel": {"recompute": "some"}}, "parallel.recompute"),
        ({"parallel": {"overlap_param_gather": True}}, "parallel.overlap_param_gather"),
        ({"optim": {"schedule": "cosin"}}, "optim.schedule"),
        ({"optim": {"min_lr": 1.0}}, "optim.lr"),
        ({"optim": {"warmup_fraction": 1.0}}, "optim.warmup_fraction"),
        ({"optim": {"betas": [0.9]}}, "optim.betas"),
        ({"precision": {"dtype": "fp8"}}, "precision.dtype"),
        ({"trainer": {"epochs": 0}}, "trainer.epochs"),
        ({"trainer": {"max_steps": -1}}, "trainer.max_steps"),
        ({"trainer": {"keep_last": 0}}, "trainer.keep_last"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_run_values_that_make_no_run_of_two_processes_are_named(config: dict[str, Any], place: str) -> None:
    run = run_config(values(**config))
    with pytest.raises(InputError) as error:
        run.check(world_size=2)
    assert error.value.place == place


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"on_bad": "ignore"}, "data.on_bad"),
        ({"packing": "dense"}, "data.packing"),
        ({"max_length": 4096}, "data.microbatch_tokens"),
        ({"global_batch_size": 0}, "data.global_batch_size"),
        ({"num_workers": -1}, "data.num_workers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_data_values_that_cannot_be_used_are_named(config: dict[str, Any], place: str) -> None:
    run = run_config(values(data=config))
    with pytest.raises(InputError) as error:
        run.data.check()
    assert error.value.place == place
