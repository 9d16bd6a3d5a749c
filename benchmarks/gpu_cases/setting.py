"""What the cases share, and what each of them is."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Setting:
    """Of all cases.

    Attributes:
        student_tokenizer: Folder.
        teacher_tokenizer: Folder.
        preferences: File of preference pairs.
        pairs: How many of them, from the first.
        batch: Pairs a step.
        max_length: Most tokens of a prompt and a response.
        microbatch_tokens: Tokens a microbatch holds at most, in training.
        scoring_tokens: The same where a teacher scores.
        workers: Dataloader workers.
        steps: Steps of each case, those of the warm-up included.
        warmup: First steps that do not count.
        recompute: "none", "selective" or "full".
        profile: Also profile one step more.
    """

    student_tokenizer: Path
    teacher_tokenizer: Path
    preferences: Path
    pairs: int
    batch: int
    max_length: int
    microbatch_tokens: int
    scoring_tokens: int
    workers: int
    steps: int
    warmup: int
    recompute: str
    profile: bool


@dataclass(frozen=True)
class Case:
    """One process.

    Attributes:
        part: "train" or "score".
        shape: Of the model, by name.
        layers: How many of them; 0 for all.
        precision: Name of a file in ``conf/precision``.
    """

    part: str
    shape: str
    layers: int
    precision: str
