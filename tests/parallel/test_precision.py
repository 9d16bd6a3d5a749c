"""FP8 recipes as configuration: what they mean to Megatron-Core, and what is refused before a GPU is asked."""

import contextlib
import re
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from megatron.core.enums import Fp8Recipe
from transformers import LlamaConfig

from ctpd_nemo.convert.architecture import read_architecture
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.gpt import build_gpt, transformer_config
from ctpd_nemo.parallel import precision as precisions
from ctpd_nemo.parallel.layout import ParallelConfig, initialize
from ctpd_nemo.parallel.precision import PrecisionConfig
from ctpd_nemo.parallel.userbuffers import check_userbuffers
from ctpd_nemo.pipeline.config import typed

CONF = Path(__file__).resolve().parents[2] / "conf"
RECIPES = {
    "fp8_delayed": ("hybrid", Fp8Recipe.delayed, 16),
    "fp8_current": ("hybrid", Fp8Recipe.tensorwise, 16),
    "fp8_blockwise": ("e4m3", Fp8Recipe.blockwise, 128),
    "mxfp8": ("e4m3", Fp8Recipe.mxfp8, 32),
}


def chosen(name: str, *overrides: str) -> PrecisionConfig:
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("train", overrides=[f"precision={name}", *overrides])
    precision = typed(PrecisionConfig, config.precision, "precision")
    precision.check()
    return precision


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    LlamaConfig(
        num_hidden_layers=4,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=32,
    ).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_what_megatron_core_calls_it(name: str, folder: Path) -> None:
    scaling, recipe, multiple = RECIPES[name]
    precision = chosen(name)
    config = transformer_config(read_architecture(folder), ParallelConfig(tensor=2), precision, False)
    assert (config.fp8, config.fp8_recipe, config.bf16, config.fp8_param) == (scaling, recipe.value, True, False)
    assert not config.first_last_layers_bf16
    assert precision.token_multiple == multiple
    assert precision.name.startswith(name)


def test_first_and_last_layers_stay_in_bf16_where_asked(folder: Path) -> None:
    precision = chosen("fp8_current", "precision.bf16_first_layers=1", "precision.bf16_last_layers=2")
    config = transformer_config(read_architecture(folder), ParallelConfig(), precision, False)
    found = config.first_last_layers_bf16, config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16
    assert found == (True, 1, 2)
    assert precision.name == "fp8_current bf16 layers 1+2"


def test_frozen_models_take_no_scales_of_past_steps() -> None:
    """Without gradients there is no step that would change them."""
    delayed = chosen("fp8_delayed", "precision.fp8_frozen_weights=true")
    frozen = delayed.of_frozen()
    assert (frozen.fp8, frozen.fp8_frozen_weights, frozen.name) == ("current", True, "fp8_current")
    assert all(chosen(name).of_frozen() == chosen(name) for name in RECIPES if name != "fp8_delayed")


def test_only_frozen_models_hold_fp8_weights(folder: Path) -> None:
    precision = chosen("fp8_current", "precision.fp8_frozen_weights=true")
    architecture = read_architecture(folder)
    found = [
        transformer_config(architecture, ParallelConfig(), precision, False, frozen).fp8_param
        for frozen in (True, False)
    ]
    assert found == [True, False]


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({"dtype": "fp16"}, "precision.dtype"),
        ({"fp8": "tensorwise"}, "precision.fp8"),
        ({"fp8": "current", "dtype": "fp32"}, "precision.dtype"),
        ({"fp8": "current", "fp8_format": "e5m2"}, "precision.fp8_format"),
        ({"fp8": "delayed", "bf16_first_layers": 1}, "precision.bf16_first_layers"),
        ({"fp8": "delayed", "amax_history": 0}, "precision.amax_history"),
        ({"fp8": "current", "bf16_last_layers": -1}, "precision.bf16_last_layers"),
        ({"fp8_frozen_weights": True}, "precision.fp8_frozen_weights"),
        ({"bf16_first_layers": 1}, "precision.bf16_first_layers"),
    ],
)
def test_values_that_do_not_go_together_are_named(values: dict, place: str) -> None:
    with pytest.raises(InputError) as caught:
        PrecisionConfig(**values).check()
    assert caught.value.place == place


def test_widths_that_a_recipe_cannot_have_are_named(folder: Path) -> None:
    architecture = read_architecture(folder)
    with pytest.raises(InputError, match="ffn_hidden_size 512 in 8 shares"):
        PrecisionConfig(fp8="blockwise").check_width("ffn_hidden_size", architecture.ffn_hidden_size, 8)
    with pytest.raises(InputError, match="blockwise for the width of all query heads 256 in 4 shares"):
        transformer_config(architecture, ParallelConfig(tensor=4), PrecisionConfig(fp8="blockwise"), False)


def test_fp8_without_a_gpu_stops_before_a_model_is_built(folder: Path) -> None:
    initialize(ParallelConfig())
    with pytest.raises(InputError, match="a GPU and Transformer Engine"):
        build_gpt(read_architecture(folder), ParallelConfig(), PrecisionConfig(fp8="current"))


OVERLAPPED = ParallelConfig(tensor=2, sequence=True, context=2, overlap_tensor=True)


def test_userbuffers_are_refused_with_recipes_that_they_cannot_gather() -> None:
    with pytest.raises(InputError) as blockwise:
        check_userbuffers(OVERLAPPED, chosen("fp8_blockwise"), 4096)
    assert (blockwise.value.place, blockwise.value.found) == (
        "parallel.overlap_tensor",
        "true with precision.fp8 blockwise",
    )
    with pytest.raises(InputError) as uneven:
        check_userbuffers(OVERLAPPED, chosen("mxfp8"), 4096 + 256)
    assert (uneven.value.place, uneven.value.expected) == ("data.microbatch_tokens", "a multiple of 512")


def test_fp32_on_a_gpu_is_refused_with_context_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen("fp32").check_device(context=2)
    monkeypatch.setattr(precisions, "transformer_engine_available", lambda: True)
    chosen("fp32").check_device(context=1)
    with pytest.raises(InputError, match=re.escape("fp32 with parallel.context 2 on a GPU")):
        chosen("fp32").check_device(context=2)


@pytest.mark.parametrize(("cuda", "refused"), [("12.8", True), ("12.9", False), ("13.0", False)])
def test_block_scaling_asks_for_its_cuda(monkeypatch: pytest.MonkeyPatch, cuda: str, refused: bool) -> None:
    monkeypatch.setattr(precisions, "transformer_engine_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    context = pytest.raises(InputError, match=re.escape("12.9 or later")) if refused else contextlib.nullcontext()
    with context:
        chosen("fp8_blockwise").check_device()
