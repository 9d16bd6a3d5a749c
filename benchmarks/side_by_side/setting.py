"""What is trained on what. Imports nothing heavy: every side's process has this, and only its own libraries beside."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BETA = 0.1
TEACHERS = ("reference", "positive", "negative")


@dataclass(frozen=True)
class Setting:
    """Models, data and steps of every side.

    Attributes:
        folder: Everything is written here.
        student_tokenizer: Folder of the student's tokenizer; its model is Llama-shaped.
        teacher_tokenizer: Folder of the teachers' tokenizer; their models are Qwen2-shaped.
        student_vocab: Rows of the student's embedding.
        teacher_vocab: Rows of the teachers' embeddings.
        preferences: File of preference pairs.
        pairs: How many of them are trained on.
        batch: Pairs a step.
        max_length: Most tokens of a prompt and a response.
        hidden: Width of all models.
        layers: Layers of all models.
        steps: Optimizer steps.
        learning_rate: Constant; large enough for the losses to show whether two sides do the same.
    """

    folder: Path
    student_tokenizer: Path
    teacher_tokenizer: Path
    student_vocab: int
    teacher_vocab: int
    preferences: Path
    pairs: int
    batch: int
    max_length: int
    hidden: int
    layers: int
    steps: int
    learning_rate: float

    @property
    def student(self) -> Path:
        """Folder of the student."""
        return self.folder / "student"

    def teacher(self, role: str) -> Path:
        """Folder of one of the ``TEACHERS``."""
        return self.folder / role

    @property
    def train(self) -> Path:
        """The pairs as text, for the sides that tokenize as they train."""
        return self.folder / "pairs.jsonl"

    @property
    def encoded(self) -> Path:
        """The same pairs as token ids, for the sides that are given them."""
        return self.folder / "encoded.json"

    @property
    def steps_per_epoch(self) -> int:
        """Steps that go once through the pairs."""
        return -(-self.pairs // self.batch)

    def read_pairs(self) -> list[dict[str, Any]]:
        """The pairs as token ids: ``chosen`` and ``rejected``, each with ``student``, ``teacher`` and ``weights``.

        A side has ``prompt``, ``response`` and ``span``, the span of each response token; ``weights`` has one number a
        span.
        """
        return json.loads(self.encoded.read_text(encoding="utf-8"))

    def batch_of_step(self, pairs: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
        """The pairs of a step; every epoch goes through them in the same order."""
        start = step % self.steps_per_epoch * self.batch
        return pairs[start : start + self.batch]


@dataclass(frozen=True)
class DistillationSetting(Setting):
    """A ``Setting`` whose teacher has a size of its own.

    Attributes:
        teacher_hidden: Width of the teacher.
        teacher_layers: Its layers.
        top_k: Log-probs of each token that are compared, and cached.
    """

    teacher_hidden: int
    teacher_layers: int
    top_k: int

    @property
    def cache(self) -> str:
        """The cache of the teacher's largest log-probs, in half precision."""
        return str(self.folder / "cache")
