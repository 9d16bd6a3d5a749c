"""What a run leaves."""

import json
import logging
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded_pair import EncodedPair, Skipped
from ctpd_nemo.data.preferences import open_preferences
from ctpd_nemo.data.templates import Side
from ctpd_nemo.errors import InputError
from tests.pipeline.recipe import recipe
from tests.pipeline.stages.recipe_run import (
    ALL,
    STUDENT_ALONE,
    TRAINED,
    Finished,
    done_again,
    metrics,
    run,
    scores,
)

pytestmark = pytest.mark.usefixtures("one_quiet_thread")


def test_every_stage_leaves_its_output(finished: Finished) -> None:
    assert list(finished.results) == ALL
    assert done_again(finished.results) == ALL
    for name, result in finished.results.items():
        folder = finished.run_dir / name
        assert result.output == folder / ("cache" if name == "score" else "export")
        assert json.loads((folder / "stage.json").read_text())["complete"]
    assert len(scores(finished.run_dir)) == 3 * 3


@pytest.mark.parametrize("stage", TRAINED)
def test_every_trained_model_loads_in_transformers_and_has_changed(finished: Finished, stage: str) -> None:
    folder = finished.results[stage].output
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert AutoTokenizer.from_pretrained(folder).chat_template
    run_config = json.loads((finished.run_dir / stage / "config.json").read_text())
    started_from = load_file(Path(run_config["model"][run_config["policy"]]["path"]) / "model.safetensors")
    trained = dict(model.named_parameters())
    assert all(torch.isfinite(parameter).all() for parameter in trained.values())
    assert not any(torch.equal(trained[name], tensor) for name, tensor in started_from.items() if name in trained)


def test_every_export_has_a_card_that_names_the_models_it_began_with(finished: Finished) -> None:
    for stage, bases in (("ctpd", ["student", "teacher"]), ("dpo_student", ["student"]), ("dpo_negative", ["teacher"])):
        card = ModelCard.load(finished.results[stage].output / "README.md")
        assert card.data.base_model == bases, stage
        assert "`optim.lr`" in card.text


def test_the_contrastive_pair_moves_apart_from_the_sft_teacher(finished: Finished) -> None:
    """Its preference margins have opposite signs: DPO raises that of the chosen, reverse DPO that of the rejected."""
    last = {name: metrics(finished.run_dir, name)[-1] for name in ("dpo_positive", "dpo_negative")}
    assert last["dpo_positive"]["margin"] > 0
    assert last["dpo_negative"]["margin"] > 0
    table = scores(finished.run_dir)
    shards = [(table[f"positive-0000{i}.parquet"], table[f"negative-0000{i}.parquet"]) for i in range(3)]
    chosen, rejected = (
        sum(np.sum(up) - np.sum(down) for p, n in shards for up, down in zip(p[side], n[side], strict=True))
        for side in ("chosen", "rejected")
    )
    assert chosen > rejected


def test_what_was_trained_on_and_what_was_left_out_is_told_at_the_end(
    finished: Finished, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    side = Side(AutoTokenizer.from_pretrained(finished.world.student))
    pairs = open_preferences(finished.world.train)
    encoded = PairEncoder(side, None, include_eos=True, max_length=30).encode(range(len(pairs)), pairs[:])
    skipped = Counter(pair.reason for pair in encoded if isinstance(pair, Skipped))
    truncated = sum(pair.chosen.truncated for pair in encoded if isinstance(pair, EncodedPair))
    assert set(skipped) == {"too_long", "equal_after_truncation"}
    with caplog.at_level(logging.INFO, "ctpd_nemo"):
        run([*recipe(finished.world, tmp_path / "run"), *STUDENT_ALONE, "data.max_length=30"])
    (line,) = [record.getMessage() for record in caplog.records if "trained on" in record.getMessage()]
    reasons = ", ".join(f"{reason} {count}" for reason, count in skipped.most_common())
    counts, waited = line.split("; ")
    assert re.fullmatch(r"\d+\.\d\d% of step time spent waiting for data", waited)
    assert counts == (
        f"sft_student   trained on {24 - skipped.total()} pairs, {skipped.total()} skipped ({reasons}), "
        f"{truncated} responses truncated"
    )
    rows = metrics(tmp_path / "run", "sft_student")
    assert sum(row["skipped"] for row in rows) == skipped.total()
    assert sum(row["truncated"] for row in rows) == truncated


def test_a_run_that_can_use_no_pair_at_all_stops(finished: Finished, tmp_path: Path) -> None:
    overrides = [*recipe(finished.world, tmp_path / "run"), *STUDENT_ALONE, "data.max_length=20"]
    # The second time it goes on from its last checkpoint.
    for _ in range(2):
        with pytest.raises(InputError, match=r"train\.jsonl: found 0 pairs, 24 skipped \(too_long 24\)"):
            run(overrides)
    assert not (tmp_path / "run/sft_student/export").exists()
