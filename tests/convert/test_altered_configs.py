"""Every key of every family's config, altered: the logits are those of ``transformers``, or the import names the key.

``pytest -s tests/convert/test_altered_configs.py`` prints how many are which.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ctpd_nemo.convert.architecture import Architecture, parse_architecture, read_architecture
from ctpd_nemo.convert.families import FAMILIES, find_family
from ctpd_nemo.errors import InputError
from tests.convert.altered import BASES, GENERATION, OTHERS, SIZES, Raw, keys_of, ropes, values_of
from tests.convert.conftest import randomised
from tests.convert.test_load import megatron_logits

Case = tuple[str, Raw]
# Rotary positions are the same code in all families.
_ALIKE = ("qwen3", "mistral", "ministral")


class Comparison:
    """Models of one family whose configs differ; what was computed once for an architecture is not again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: Counter[str] = Counter()
        self.found: dict[str, set[str]] = {}
        self.silent: list[str] = []
        self._ours: dict[Architecture, Tensor] = {}

    def compare(self, key: str, raw: Raw) -> None:
        """Count a config as equal, refused by name, refused by transformers as well, or silently different."""
        outcome = self._outcome(key, raw)
        self.counts[outcome] += 1
        self.found.setdefault(key, set()).add(outcome)
        if outcome in ("silent", "unnamed"):
            self.silent.append(f"{key} ({outcome}): {raw}")

    def _outcome(self, key: str, raw: Raw) -> str:
        (self.folder / "config.json").write_text(json.dumps(raw))
        try:
            architecture = read_architecture(self.folder)
        except InputError as error:
            return "refused" if any(part in str(error) for part in key.split(".")) else "unnamed"
        ids = torch.arange(61) * 7 % min(raw["vocab_size"], 97)
        theirs = self._theirs(ids, architecture not in self._ours)
        if theirs is None:
            return "illegal"
        if architecture not in self._ours:
            self._ours[architecture] = megatron_logits(self.folder, [ids])
        return "equal" if (self._ours[architecture] - theirs).abs().max() < 1e-4 else "silent"

    def _theirs(self, ids: Tensor, save: bool) -> Tensor | None:
        try:
            config = AutoConfig.from_pretrained(self.folder)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        except Exception:  # whatever transformers has against it
            return None
        randomised(model)
        if save:
            state = model.state_dict()
            if model.config.tie_word_embeddings:
                del state["lm_head.weight"]
            save_file(state, self.folder / "model.safetensors")
        try:
            with torch.no_grad():
                return model(ids[None], use_cache=False).logits[0]
        except Exception:  # with these values its model does not run
            return None


def cases(name: str, base: Raw, others: bool) -> Iterator[Case]:
    config_class = CONFIG_MAPPING[name]
    defaults = config_class(**base)
    for key in keys_of(config_class):
        if key == "model_type":
            continue
        for value in values_of(key, base.get(key, getattr(defaults, key))):
            yield key, {**base, key: value}
    for key, values in OTHERS.items() if others else ():
        if key not in keys_of(config_class):
            for value in values:
                yield key, {**base, key: value}
    yield "generation", {**base, **GENERATION}


@pytest.mark.parametrize("name", BASES)
def test_each_altered_key_gives_the_logits_of_transformers_or_is_refused_by_name(name: str, tmp_path: Path) -> None:
    comparison = Comparison(tmp_path)
    for index, own in enumerate(BASES[name]):
        base = {"model_type": name, **SIZES, **own}
        comparison.compare("base", base)
        for key, raw in cases(name, base, others=index == 0):
            comparison.compare(key, raw)
    _report(name, "keys", comparison)
    # What is supported is not refused.
    for key in ("base", "vocab_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "tie_word_embeddings"):
        assert comparison.found[key] == {"equal"}, key
    for key in (
        "rope_parameters",
        "rope_theta",
        "rope_scaling",
        "bos_token_id",
        "use_cache",
        "generation",
        "num_labels",
    ):
        assert comparison.found[key] == {"equal"}, key
    for key in ("is_causal", "logit_scale", "quantization_config", "architectures", "some_note"):
        assert "refused" in comparison.found[key], key


@pytest.mark.parametrize("name", ["llama", "qwen2", *(pytest.param(name, marks=pytest.mark.slow) for name in _ALIKE)])
def test_each_altered_rotary_parameter_gives_the_logits_of_transformers_or_is_refused_by_name(
    name: str, tmp_path: Path
) -> None:
    comparison = Comparison(tmp_path)
    base = {"model_type": name, **SIZES, **BASES[name][-1]}
    head_dim = base.get("head_dim", base["hidden_size"] // base["num_attention_heads"])
    for key, parameters in ropes(head_dim):
        comparison.compare(key, {**base, "rope_parameters": parameters})
    _report(name, "rotary", comparison)
    for key in ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "yarn.factor", "yarn.mscale"):
        assert comparison.found[key] == {"equal"}, key


def test_rotary_parameters_as_transformers_4_wrote_them_read_as_those_of_5() -> None:
    base = {"model_type": "llama", **SIZES}
    for _, parameters in ropes(8)[:-1]:
        scaling = {name: value for name, value in parameters.items() if name not in ("rope_theta", "rope_type")}
        older = {
            **base,
            "rope_scaling": {"type": parameters["rope_type"], **scaling},
            "rope_theta": parameters["rope_theta"],
        }
        assert _parsed(older) == _parsed({**base, "rope_parameters": dict(parameters)})


def _parsed(raw: Raw) -> Architecture | str:
    try:
        return parse_architecture(raw, "config.json")
    except InputError as error:
        return str(error)


def _report(name: str, what: str, comparison: Comparison) -> None:
    columns = ("equal", "refused", "illegal", "unnamed", "silent")
    print(f"\n{name:10} {what:7}", *(f"{column} {comparison.counts[column]:4}" for column in columns))
    assert comparison.silent == []


def test_families_are_those_that_transformers_resolves(tmp_path: Path) -> None:
    for name in BASES:
        for own in [*BASES[name], {"layer_types": ["full_attention"] * 2}]:
            raw = {"model_type": name, **SIZES, **own}
            (tmp_path / "config.json").write_text(json.dumps(raw))
            try:
                theirs: Any = type(AutoConfig.from_pretrained(tmp_path))
            except Exception:
                continue
            family = find_family(raw, "config.json")
            assert family.config_class is theirs
            named = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]
            assert find_family({**raw, "architectures": [named]}, "config.json") is family
    assert set(FAMILIES) == set(BASES)
