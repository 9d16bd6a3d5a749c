"""Weights of spans in plain ``transformers`` and Python, one response at a time; shares no code with the package."""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.distributed.plain import Tokens, shared_ends, span_scores, span_sums, tokens


def margins(model: PreTrainedModel, sequence: Tokens) -> Tensor:
    """Log-prob of each response token less that of the likeliest other one, ``[n_response]``."""
    logits = model(torch.tensor([sequence.prompt + sequence.response])).logits[0]
    found = []
    for position, token in enumerate(sequence.response, start=len(sequence.prompt) - 1):
        every = torch.log_softmax(logits[position], dim=-1).tolist()
        found.append(every[token] - max(value for word, value in enumerate(every) if word != token))
    return torch.tensor(found, dtype=torch.double)


def drawn(seed: int, pair_id: str, name: str, size: int) -> list[float]:
    """Numbers between -1 and 1: the upper 24 bits of the words of a Philox stream whose key names the response."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0{pair_id}".encode(), digest_size=16).digest()
    key = [int.from_bytes(digest[at : at + 8], "little") for at in (0, 8)]
    words = np.random.Philox(key=np.array(key, dtype=np.uint64)).random_raw(size)
    return [(2 * (int(word) >> 40) + 1) / 2**24 - 1 for word in words]


def weights(kind: str, home: Path, row: dict[str, Any], name: str) -> Tensor:
    """The weight of each span that student and teacher of ``home`` share, by the name of the weighting."""
    student, teacher = home / "student", home / "teacher"
    own, other = tokens(student, row, name), tokens(teacher, row, name)
    bounds = shared_ends(own, other)
    if kind == "uniform":
        return torch.ones(len(bounds), dtype=torch.double)
    draws = drawn(0, row["id"], name, len(bounds))
    if kind == "random":
        return torch.tensor(draws, dtype=torch.double)

    def by_teacher(folder: str) -> Tensor:
        return span_scores(home / folder, student, teacher, row, name)

    def by_student(folder: str) -> Tensor:
        return span_scores(home / folder, teacher, student, row, name)

    if kind == "contrastive_student":
        ratios = by_student("student_positive") - by_student("student_negative")
    elif kind == "teacher_student":
        ratios = by_teacher("teacher") - by_student("student")
    elif kind == "single_teacher":
        ratios = span_scores(teacher, student, teacher, row, name, of=margins)
    else:
        ratios = by_teacher("positive") - by_teacher("negative")
    sign = 1 if name == "chosen" else -1
    found = [math.exp(sign * min(max(ratio, -0.5), 1.5)) for ratio in ratios.tolist()]
    if kind == "average":
        lengths = span_sums(torch.ones(len(other.ends)), other.ends, bounds).tolist()
        found = [weight / length for weight, length in zip(found, lengths, strict=True)]
    elif kind == "constant":
        found = [sum(found) / len(found)] * len(found)
    elif kind == "shuffled":
        found = [weight for _, weight in sorted(zip(draws, found, strict=True))]
    return torch.tensor(found, dtype=torch.double)


def token_weights(home: Path, row: dict[str, Any], name: str) -> Tensor:
    """Those of TIS-DPO: of the student's own tokens, by the contrastive pair of its family."""
    student = home / "student"
    pair = [home / "student_positive", home / "student_negative"]
    up, down = (span_scores(folder, student, student, row, name) for folder in pair)
    return torch.exp((1.0 if name == "chosen" else -1.0) * (up - down).clamp(-0.5, 1.5))
