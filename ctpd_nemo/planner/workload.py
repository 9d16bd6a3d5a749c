"""The data of a run, as far as its cost depends on it: how many pairs, and how long they are."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ctpd_nemo.data.config import longest_row
from ctpd_nemo.data.encode import PairEncoder
from ctpd_nemo.data.encoded_pair import EncodedPair
from ctpd_nemo.data.preferences import open_preferences
from ctpd_nemo.data.templates import Side
from ctpd_nemo.errors import InputError
from ctpd_nemo.models.config import RunConfig, SideConfig
from ctpd_nemo.models.data import load_side

Int64Array = NDArray[np.int64]
# Pairs that stand for all of them where only means are stated.
_SAMPLE = 4096


@dataclass
class Workload:
    """What is known of the data without looking at it.

    Attributes:
        pairs: Training pairs.
        mean_prompt_tokens: Of a rendered prompt.
        mean_response_tokens: Of a response.
        spread: Standard deviation of lengths as a share of their mean; they are taken to be log-normal.
        measure: Read and tokenize this many pairs of ``data.train`` instead; 0 takes the numbers above.
    """

    pairs: int = 61135
    mean_prompt_tokens: float = 180.0
    mean_response_tokens: float = 290.0
    spread: float = 0.8
    measure: int = 0

    def check(self) -> None:
        """Stop with an ``InputError`` where a number cannot be one."""
        for name in ("pairs", "mean_prompt_tokens", "mean_response_tokens"):
            if not 1 <= getattr(self, name) < math.inf:
                raise InputError(f"workload.{name}", str(getattr(self, name)), "1 or more")
        if not 0 <= self.spread < math.inf:
            raise InputError("workload.spread", str(self.spread), "0 or more")
        if self.measure < 0:
            raise InputError("workload.measure", str(self.measure), "a number of pairs, or 0")


@dataclass(frozen=True)
class SideLengths:
    """Tokens of pairs on one side, int64 ``[P]`` each."""

    prompt: Int64Array
    chosen: Int64Array
    rejected: Int64Array


# Compared by identity, so that what is made of it can be kept.
@dataclass(frozen=True, eq=False)
class Lengths:
    """A sample of the pairs.

    Attributes:
        pairs: How many pairs there are in all.
        sides: Their tokens by side, "student" and "teacher".
        source: Where the numbers are from, in words.
    """

    pairs: int
    sides: Mapping[str, SideLengths]
    source: str

    def mean(self, side: str) -> float:
        """Tokens of a pair, both sequences."""
        lengths = self.sides[side]
        return float((2 * lengths.prompt + lengths.chosen + lengths.rejected).mean())


def stated_lengths(workload: Workload, max_length: int) -> Lengths:
    """Lengths drawn from what is stated, the same at every call; cut at ``max_length`` as the data would be."""
    workload.check()
    means = workload.mean_prompt_tokens, workload.mean_response_tokens
    return _drawn_lengths(workload.pairs, *means, workload.spread, max_length)


@functools.lru_cache(maxsize=16)
def _drawn_lengths(pairs: int, mean_prompt: float, mean_response: float, spread: float, max_length: int) -> Lengths:
    """One sample of equal values, for what is made of it is kept with it: plan after plan asks for the same."""
    draw = np.random.Generator(np.random.PCG64(0))
    variance = math.log(1 + spread**2)

    def lengths(mean: float) -> Int64Array:
        drawn = draw.lognormal(math.log(mean) - variance / 2, math.sqrt(variance), _SAMPLE)
        return np.maximum(1, drawn.round()).astype(np.int64)

    prompt = np.minimum(lengths(mean_prompt), max(1, max_length - 1))
    chosen, rejected = (np.minimum(lengths(mean_response), max_length - prompt) for _ in range(2))
    side = SideLengths(prompt, chosen, rejected)
    source = (
        f"{pairs} pairs; log-normal lengths of mean {mean_prompt:g} (prompt) and "
        f"{mean_response:g} (response) tokens, spread {spread:g}, stated"
    )
    return Lengths(pairs, {"student": side, "teacher": side}, source)


def measured_lengths(run: RunConfig, count: int) -> Lengths:
    """Lengths of pairs of ``data.train`` under the real tokenizers and templates, spread over the files.

    Raises:
        InputError: Files or tokenizers cannot be used.
    """
    if not run.data.train:
        raise InputError("data.train", "no files", "preference files, as workload.measure asks for their lengths")
    encoder = PairEncoder(
        _side(run.model.student, "model.student"),
        _side(run.model.teacher, "model.teacher"),
        run.data.include_eos,
        run.data.max_length,
        run.data.max_prompt_length,
        run.data.response_text,
        on_bad=run.data.on_bad,
    )
    longest = longest_row(run.data.max_length, run.data.max_row_bytes)
    data = open_preferences(run.data.train, run.data.split, run.data.on_bad, encoder.kept, longest)
    rows = np.linspace(0, len(data) - 1, min(count, len(data)), dtype=np.int64).tolist()
    encoded = [pair for pair in encoder.encode(rows, [data[row] for row in rows]) if isinstance(pair, EncodedPair)]
    if not encoded:
        raise InputError(", ".join(run.data.train), f"{len(rows)} pairs, none of which fits", "longer data.max_length")
    names = ", ".join(Path(path).name for path in run.data.train)
    sides = {"student": _lengths_of(encoded, "policy"), "teacher": _lengths_of(encoded, "reference")}
    pairs = len(data) * len(encoded) // len(rows)
    return Lengths(pairs, sides, f"{pairs} pairs; lengths of {len(encoded)} of them measured in {names}")


def _side(config: SideConfig, key: str) -> Side:
    """See ``load_side``; a plan that measures nothing does without folders of models."""
    try:
        return load_side(config, key)
    except InputError as error:
        raise InputError(error.place, error.found, f"{error.expected}, as workload.measure tokenizes pairs") from error


def _lengths_of(pairs: list[EncodedPair], side: str) -> SideLengths:
    tokens = [(pair.chosen.side(side), pair.rejected.side(side)) for pair in pairs]  # type: ignore[arg-type]
    return SideLengths(
        np.array([len(chosen.prompt_ids) for chosen, _ in tokens]),
        np.array([len(chosen.response_ids) for chosen, _ in tokens]),
        np.array([len(rejected.response_ids) for _, rejected in tokens]),
    )
