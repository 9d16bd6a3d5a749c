"""Scores of shown spans, from a score cache that is proved to belong to them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ctpd_nemo.errors import InputError
from ctpd_nemo.losses.weights import exponential_weights
from ctpd_nemo.models.ctpd import CTPDConfig
from ctpd_nemo.pipeline.score_cache import ScoreReader, read_manifest

Float32Array = NDArray[np.float32]

# What is drawn as heat, and the value at which its colour is full.
WEIGHT, RATIO, REFERENCE = "weight", "log-prob ratio", "reference log-prob"
_FULL_NATS = 1.5
_FULL_REFERENCE = -12.0


@dataclass(frozen=True, slots=True)
class ResponseScores:
    """Numbers of the spans of a response, f32 ``[n_spans]`` each, by the name they are shown with.

    A last one may be that of the end of turn; a response that was cut has fewer than spans.
    """

    numbers: dict[str, Float32Array]

    def __len__(self) -> int:
        return min(map(len, self.numbers.values()))

    def of_span(self, number: int) -> dict[str, Any]:
        """``numbers`` and ``heat`` of a span."""
        numbers = {name: float(values[number]) for name, values in self.numbers.items()}
        heat = {}
        if WEIGHT in numbers:
            # A weight is the exponential of a ratio; colours of both then mean the same.
            heat["w"] = _scale(float(np.log(numbers[WEIGHT])), _FULL_NATS)
            heat["r"] = _scale(numbers[RATIO], _FULL_NATS)
        heat["p"] = _scale(numbers[REFERENCE], _FULL_REFERENCE)
        return {"numbers": numbers, "heat": heat}


class CachedScores:
    """The scores of a dataset's responses under teachers; of the pairs that were left out there are none."""

    def __init__(self, folder: str, data: str, teacher: str, student: str, method: CTPDConfig) -> None:
        """Open a cache.

        Args:
            folder: The cache.
            data: Fingerprint of the pairs.
            teacher: Fingerprint of the teacher's tokenizer.
            student: Fingerprint of the student's.
            method: How weights are made of scores.

        Raises:
            InputError: No cache, or one of other pairs or tokenizers.
        """
        self._folder = folder
        manifest = read_manifest(folder)
        # Spans do not depend on the rest: templates, limits and precision are what the cache says they are.
        shown = {"data": data, "teacher_tokenizer": teacher, "student_tokenizer": student}
        weighs = {"positive", "negative"} <= set(manifest["teacher_weights"])
        self._reader = ScoreReader(folder, manifest["fingerprints"] | shown, {}, method if weighs else None)
        self._method = method

    def of_pair(self, pair_id: str, row: int, n_spans: tuple[int, int]) -> tuple[ResponseScores, ResponseScores] | None:
        """Scores of chosen and rejected; ``None`` for a pair that was not scored.

        Args:
            pair_id: What the user calls the pair.
            row: Its number in the data.
            n_spans: Spans of chosen and rejected, without ends of turns.

        Raises:
            InputError: More scores than spans.
        """
        if not self._reader.holds(pair_id, row):
            return None
        scored, found = self._reader.pair_scores(pair_id, row), []
        for name, sign, most in zip(("chosen", "rejected"), (1.0, -1.0), n_spans, strict=True):
            by_role = {role: getattr(scores, name) for role, scores in scored.items()}
            numbers: dict[str, Float32Array] = {}
            if "positive" in by_role:
                ratio = by_role["positive"] - by_role["negative"]
                numbers = {WEIGHT: self._weights(ratio, sign), RATIO: ratio}
            numbers |= {f"{role} log-prob": values for role, values in by_role.items()}
            own = ResponseScores(numbers)
            if len(own) > most + 1:
                place = f"{Path(self._folder)}, pair {pair_id!r}, {name}"
                raise InputError(place, f"{len(own)} scores", f"at most {most} spans and an end of turn")
            found.append(own)
        return found[0], found[1]

    def _weights(self, ratio: Float32Array, sign: float) -> Float32Array:
        bounds = self._method.weight_lower, self._method.weight_upper
        return exponential_weights(torch.from_numpy(ratio), sign, self._method.weight_scale, *bounds).numpy()


def _scale(value: float, full: float) -> float:
    return round(float(np.clip(value / full, -1.0, 1.0)), 3)
