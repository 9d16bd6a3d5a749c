"""The distillation baselines as stages of the recipe: from the cache, beside the teacher, and what is refused."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline.recipe import STAGES
from ctpd_nemo.pipeline.stages import StageResult, run_pipeline
from tests.pipeline.recipe import composed, recipe, small_world

LEFT_OUT = ("dpo_positive", "dpo_negative", "dpo_student", "ctpd")
CACHED = {
    "uld": "{method:{name:uld,reference:cache},optim:{lr:5e-4}}",
    "multilevel_ot": "{method:{name:multilevel_ot,reference:cache,top_k:12},optim:{lr:5e-4}}",
}
ONLINE = {"dskd": "{method:{name:dskd},optim:{lr:5e-4}}"}


def overrides(home: Path, stages: dict[str, str], top_k: int | None = 16) -> list[str]:
    world = small_world(home / "world")
    return [
        *recipe(world, home / "run"),
        *(f"stages.{name}=null" for name in LEFT_OUT),
        f"stages.score.method.top_k={top_k or 'null'}",
        *(f"stages.{name}={values}" for name, values in stages.items()),
    ]


def run(values: list[str]) -> dict[str, StageResult]:
    return run_pipeline(composed("pipeline", values))


def test_stages_train_from_the_cache_and_beside_the_teacher(tmp_path: Path) -> None:
    values = overrides(tmp_path, CACHED | ONLINE)
    results = run(values)
    assert list(results) == ["sft_teacher", "sft_student", "score", "uld", "dskd", "multilevel_ot"]
    for name in (*CACHED, *ONLINE):
        _, report = AutoModelForCausalLM.from_pretrained(results[name].output, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    # A cache that has lost some of its log-probs is completed, and what was trained from it still holds.
    shards = sorted(results["score"].output.glob("top_k-*.parquet"))
    before = [shard.read_bytes() for shard in shards]
    shards[1].unlink()
    assert [name for name, result in run(values).items() if not result.skipped] == ["score"]
    assert [shard.read_bytes() for shard in shards] == before
    # More of them are another cache, and only what is trained from it is done again.
    again = run([*values, "stages.score.method.top_k=18"])
    assert [name for name, result in again.items() if not result.skipped] == ["score", "uld", "multilevel_ot"]


def test_the_cache_is_an_input_of_stages_that_read_it(tmp_path: Path) -> None:
    config = composed("pipeline", overrides(tmp_path, CACHED | ONLINE))
    inputs = {stage.name: set(stage.builds_on(config).values()) for stage in STAGES}
    assert inputs["uld"] == inputs["multilevel_ot"] == {"sft_student", "sft_teacher", "score"}
    assert inputs["dskd"] == {"sft_student", "sft_teacher"}
    config.stages.uld.method.reference = "online"
    uld = next(stage for stage in STAGES if stage.name == "uld")
    assert set(uld.builds_on(config).values()) == {"sft_student", "sft_teacher"}


@pytest.mark.parametrize(("top_k", "found"), [(None, "None"), (11, "11")])
def test_a_cache_with_too_few_log_probs_stops_before_the_first_stage(
    tmp_path: Path, top_k: int | None, found: str
) -> None:
    values = overrides(tmp_path, {"multilevel_ot": CACHED["multilevel_ot"]}, top_k)
    with pytest.raises(InputError) as caught:
        run(values)
    assert (caught.value.place, caught.value.found) == ("stages.score.method.top_k", found)
    assert caught.value.expected.startswith("12 or more")
    assert not (tmp_path / "run").exists()
