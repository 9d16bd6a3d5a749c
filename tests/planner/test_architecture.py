"""Sizes of models: those of their folders, and of known names where there is no folder."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from ctpd_nemo.errors import InputError
from ctpd_nemo.parallel.layout import ParallelConfig
from ctpd_nemo.planner.architecture import FOLDER, find_architecture
from ctpd_nemo.planner.parameters import stage_parameters

KNOWN = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_model_has_as_many_parameters_as_transformers_makes(name: str) -> None:
    values = OmegaConf.to_container(OmegaConf.load(FOLDER / f"{name}.yaml"))
    assert isinstance(values, dict)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    assert find_architecture(f"models/{name}", "model.teacher").parameters == model.num_parameters()


@pytest.mark.parametrize(("name", "published"), [("Qwen2.5-72B", 72.7), ("Llama-3.1-8B-Instruct", 8.03)])
def test_a_name_is_found_in_any_case_and_tuning(name: str, published: float) -> None:
    found = find_architecture(f"models/{name}", "model.teacher")
    assert found.name == name
    assert found.parameters / 1e9 == pytest.approx(published, abs=0.05)


def test_a_folder_is_taken_before_a_name(tmp_path: Path) -> None:
    folder = tmp_path / "Qwen2.5-7B"
    folder.mkdir()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {"model_type": "qwen2", **sizes, "num_key_value_heads": 2, "vocab_size": 100, "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(config))
    found = find_architecture(str(folder), "model.teacher")
    assert found.architecture.hidden_size == 64
    assert found.source == str(folder / "config.json")


def test_an_unknown_model_is_refused_with_the_known_names() -> None:
    with pytest.raises(InputError) as error:
        find_architecture("models/Gemma-9B", "model.student")
    assert error.value.place == "model.student.path"
    assert "llama-3.1-8b" in error.value.expected


@pytest.mark.parametrize("name", ["qwen2.5-7b", "qwen3-1.7b"])
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize(("pipeline", "virtual"), [(1, None), (2, None), (2, 2), (4, 7)])
def test_the_shares_of_all_ranks_are_the_model(name: str, tensor: int, pipeline: int, virtual: int | None) -> None:
    model = find_architecture(name, "model.teacher")
    a, parallel = model.architecture, ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual)
    total = 0
    for stage in range(pipeline):
        for parameter in (one for chunk in stage_parameters(a, parallel, stage) for one in chunk):
            total += parameter.numel * (1 if parameter.replicated else tensor)
    # The last stage of a tied model holds the embedding once more.
    twice = a.vocab_size * a.hidden_size if a.tied_embeddings and pipeline > 1 else 0
    assert total == model.parameters + twice
