"""The methods by name: the config of each, its model, and the data it asks for."""

from dataclasses import dataclass
from typing import Any

from ctpd_nemo.data.batch import Responses
from ctpd_nemo.models.base import MegatronModel
from ctpd_nemo.models.ctpd import CTPD, CTPDConfig
from ctpd_nemo.models.dpo import DPO, DPOConfig
from ctpd_nemo.models.dskd import DSKD, DSKDConfig
from ctpd_nemo.models.multilevel_ot import MultiLevelOT, MultiLevelOTConfig
from ctpd_nemo.models.scorer import ScoreConfig
from ctpd_nemo.models.sft import SFT, SFTConfig
from ctpd_nemo.models.tis_dpo import TISDPO, TISDPOConfig
from ctpd_nemo.models.uld import ULD, ULDConfig


@dataclass(frozen=True)
class Method:
    """What there is to know about a method before it runs.

    Attributes:
        config: Dataclass of its config; with ``check()`` where values can contradict each other.
        model: Its NeMo model.
        responses: What it trains on.
        two_sided: Whether the reference reads with a tokenizer of its own: the student is trained on the teacher.
    """

    config: type[Any]
    model: type[MegatronModel]
    responses: Responses
    two_sided: bool


METHODS = {
    "sft": Method(SFTConfig, SFT, ("chosen",), two_sided=False),
    "dpo": Method(DPOConfig, DPO, ("chosen", "rejected"), two_sided=False),
    "tis_dpo": Method(TISDPOConfig, TISDPO, ("chosen", "rejected"), two_sided=False),
    "ctpd": Method(CTPDConfig, CTPD, ("chosen", "rejected"), two_sided=True),
    "uld": Method(ULDConfig, ULD, ("chosen",), two_sided=True),
    "dskd": Method(DSKDConfig, DSKD, ("chosen",), two_sided=True),
    "multilevel_ot": Method(MultiLevelOTConfig, MultiLevelOT, ("chosen",), two_sided=True),
}

# Every value of ``method.name``: what is trained, and scoring.
METHOD_CONFIGS: dict[str, type[Any]] = {name: method.config for name, method in METHODS.items()} | {
    "score": ScoreConfig
}
