"""The families that are known. A new one is a file beside these and a name in this list."""

from collections.abc import Mapping
from typing import Any

from ctpd_nemo.convert.family import Family
from ctpd_nemo.convert.llama import LLAMA
from ctpd_nemo.convert.mistral import MINISTRAL, MISTRAL
from ctpd_nemo.convert.qwen2 import QWEN2
from ctpd_nemo.convert.qwen3 import QWEN3
from ctpd_nemo.errors import InputError, shown

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, MINISTRAL)}


def find_family(raw: Mapping[str, Any], place: str) -> Family:
    """The family whose class ``AutoConfig`` makes of a ``config.json``.

    Raises:
        InputError: It is not known, or ``architectures`` names a class other than its causal language model.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            place, f"model_type = {shown(model_type)}", f"one of the known families: {', '.join(FAMILIES)}"
        )
    found = FAMILIES[model_type]
    # As AutoConfig does: Ministral's first release came under Mistral's name.
    family = MINISTRAL if found is MISTRAL and "layer_types" in raw else found
    # Named as the classes of these families are in all versions of transformers.
    classes = {f"{kind.config_class.__name__.removesuffix('Config')}ForCausalLM" for kind in (found, family)}
    named = raw.get("architectures")
    if named is not None and not (isinstance(named, list) and all(name in classes for name in named)):
        raise InputError(f"{place}, architectures", shown(named), " or ".join(sorted(classes)))
    return family
