"""An exported folder, read back before it has its name: it reads, stops and computes as the run did.

What needs no weights is always compared. Models that are small enough are also run, by ``transformers`` and with the
folder's own defaults: a greedy generation stops at the token that training ended turns with, and the log-probs of a
probe are those that the run wrote down.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ctpd_nemo.convert.companions import stated_stop_ids
from ctpd_nemo.data.forms import Message
from ctpd_nemo.data.templates import Side
from ctpd_nemo.data.tokenizer_folder import load_tokenizer
from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.model import load_model
from ctpd_nemo.models.probe import RUN_BYTES, Probe
from ctpd_nemo.pipeline.trained_side import TrainedSide

logger = logging.getLogger(__name__)

# Tokens of a generation before it is made to end, and of what it may be at most.
_BEFORE, _MOST = 3, 8
# Nats a token, on average, of rounding: where the run computed in fp32 on a CPU, and elsewhere.
_ROUNDING = {"fp32": 1e-3}
_ROUNDING_OF_16_BITS = 0.2


def read_back(partial: Path, name: str, trained: TrainedSide, probe: Probe | None, rounded: bool = False) -> None:
    """Compare an export with the run that it is of.

    Args:
        partial: The folder, complete, under another name.
        name: What it will be called, for messages.
        trained: The side that was trained.
        probe: Log-probs that the run wrote down of these weights, where it did.
        rounded: The user asked for another dtype: what that does to log-probs is told.

    Raises:
        InputError: It is something else.
    """
    side = Side(load_tokenizer(str(partial)), None, trained.side.chat_template_kwargs)
    expected = "that of the run; nothing was exported"
    for what, found, was in (
        ("tokenizer", side.tokenizer_fingerprint, trained.side.tokenizer_fingerprint),
        ("end of turn", side.end_of_turn_ids.tolist(), trained.side.end_of_turn_ids.tolist()),
        ("chat template", side.template_fingerprint, trained.side.template_fingerprint),
    ):
        if found != was:
            raise InputError(f"{name}, {what}", f"read back, {found} where {was} was trained", expected)
    stops = stated_stop_ids(partial)
    if trained.stop_id not in stops:
        raise InputError(
            f"{name}, eos_token_id", f"{stops} without {trained.stop_id}", "the end of turn that was trained"
        )
    size = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    told = f"tokenizer, chat template, end of turn {trained.stop_id} and all tensors are those of the run"
    if size > RUN_BYTES:
        logger.info("%s: read back: %s; %.0f GB of weights are not run here", name, told, size / 2**30)
        return
    ran = _run(partial, name, trained, probe, rounded)
    logger.info("%s: read back: %s; %s", name, told, ran)


def _run(partial: Path, name: str, trained: TrainedSide, probe: Probe | None, rounded: bool) -> str:
    """Generate, and compare log-probs; what was found, for the log."""
    with torch.random.fork_rng(devices=[]):
        model = load_model(partial, "cpu")
        _check_stop(model, name, trained)
        if probe is None:
            return "generation stops there; the run wrote down no log-probs of these weights"
        largest = probe.largest_difference(model)
    if rounded:
        return (
            f"generation stops there; in this dtype log-probs of a probe are {largest:.1e} nats a token off the run's"
        )
    allowed = _ROUNDING.get(probe.precision, _ROUNDING_OF_16_BITS)
    if not largest <= allowed:
        found = f"log-probs of a probe that are off by {largest:.2g} nats a token"
        raise InputError(name, found, f"at most {allowed:g}, the rounding of {probe.precision}")
    return f"generation stops there; log-probs of a probe are within {largest:.1e} nats a token"


class _EndAt(LogitsProcessor):
    """Has a token come at a place, and none that ends a generation before it."""

    def __init__(self, length: int, token: int, stops: list[int]) -> None:
        self._length = length
        self._token = token
        self._stops = stops

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self._stops] = -torch.inf
        if input_ids.shape[1] >= self._length:
            scores[:] = -torch.inf
            scores[:, self._token] = 0.0
        return scores


def _check_stop(model: Any, name: str, trained: TrainedSide) -> None:
    """Have the model write the end of a turn, and look whether generation by the folder's defaults ends there."""
    prompt = torch.from_numpy(trained.side.render_prompt([Message("user", "x")])).long()[None]
    defaults = model.generation_config.eos_token_id
    stops = [trained.stop_id, *(defaults if isinstance(defaults, list) else [defaults] if defaults is not None else [])]
    end = _EndAt(prompt.shape[1] + _BEFORE, trained.stop_id, stops)
    with torch.inference_mode():
        written = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=_MOST,
            logits_processor=LogitsProcessorList([end]),
        )
    tokens = written[0, prompt.shape[1] :].tolist()
    if len(tokens) != _BEFORE + 1 or tokens[-1] != trained.stop_id:
        found = f"a generation of {len(tokens)} tokens that does not stop at {trained.stop_id}"
        raise InputError(f"{name}, generation", found, "one that stops where training ended turns")
