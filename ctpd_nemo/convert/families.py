"""The families that are known. A new one is a file beside these and a name in this list."""

from ctpd_nemo.convert.family import Family
from ctpd_nemo.convert.llama import LLAMA
from ctpd_nemo.convert.mistral import MISTRAL
from ctpd_nemo.convert.qwen2 import QWEN2
from ctpd_nemo.convert.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}
