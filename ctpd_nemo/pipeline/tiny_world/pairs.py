"""Preference pairs about the tasks: a right answer against a wrong or an evasive one.

Training and test prompts never meet: the hash of a prompt says which side it is on, in worlds of every seed. A test
prompt can still ask a fact of training in other words; the rules (copy, sort, colours, ...) are asked on new input.
"""

import hashlib
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, Literal

from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline.tiny_world.tasks import KINDS, Task

Split = Literal["train", "test"]

_TEST_SHARE = 0.2
_WRONG_SHARE = 0.6
"""Of the rejected responses; the others are evasive."""

_OPENINGS = ("", "", "", "Hi! ", "Please: ", "Zoë asks: ", "José asks: ", "At the café: ", "🙂 ", "Next: ", "Quiz: ")
_RESPONSE_OPENINGS = ("", "", "Sure, ", "Well, ", "I think ", "Hmm… ", "Voilà: ", "Oh 🙂 ")
_RESPONSE_ENDINGS = (".", ".", "!", ", of course.", ", ça va?")
_EVASIONS = (
    "the answer is hard to say",
    "it is not for me to tell",
    "it is a matter of taste",
    "the best is to ask a friend",
    "you have to look it up",
)


def answer_of(response: str) -> str | None:
    """The answer that a response gives: the text between its two ``**``.

    A response with no ``**``, with one, or with more than two gives no answer: listing several answers, or naming the
    right one in passing, does not count. A response is right when its answer equals the task's, character for
    character.
    """
    parts = response.split("**")
    return parts[1] if len(parts) == 3 else None


def generate_pairs(
    split: Split, n_pairs: int, seed: int, flip: float = 0.0, kinds: Sequence[str] = tuple(KINDS)
) -> list[dict[str, Any]]:
    """Rows of preference pairs in TRL's conversational form, kinds in turn.

    Args:
        split: Which prompts to draw from. Test prompts are all different; training prompts may repeat.
        n_pairs: Rows.
        seed: The same arguments give the same rows, on every machine.
        flip: Share of pairs whose chosen and rejected are exchanged. Only that differs from the rows of ``flip=0``;
            ``fault`` and ``answer`` still speak of the pair as it was.
        kinds: Which kinds of questions are asked.

    Returns:
        Rows with ``id``, ``kind`` (a key of ``KINDS``), ``fault`` of the rejected response ("wrong" or "evasive"),
        ``prompt``, ``chosen``, ``rejected`` (lists of one message) and ``answer`` (see ``answer_of``).

    Raises:
        InputError: More test pairs than there are test prompts of each kind.
    """
    rng, flip_rng = Random(f"{seed}/{split}"), Random(f"{seed}/{split}/flip")
    prompts = _prompts(split, rng, kinds)
    return [_row(f"{split}-{index:05d}", *next(prompts), rng, flip_rng.random() < flip) for index in range(n_pairs)]


def _prompts(split: Split, rng: Random, kinds: Sequence[str]) -> Iterator[tuple[str, str, Task]]:
    """Kind, prompt and task, without end."""
    seen: set[str] = set()
    while True:
        for kind in kinds:
            draw = KINDS[kind]
            for _ in range(1000):
                task = draw(rng)
                prompt = rng.choice(_OPENINGS) + task.question
                if _split_of(prompt) == split and prompt not in seen:
                    break
            else:
                found = f"more than there are different {split} prompts of kind {kind!r} ({len(seen)} pairs drawn)"
                raise InputError(f"n_{split}", found, "a smaller number of pairs")
            if split == "test":
                seen.add(prompt)
            yield kind, prompt, task


def _split_of(prompt: str) -> Split:
    digest = hashlib.blake2b(prompt.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") < _TEST_SHARE * 2**64 else "train"


def _row(row_id: str, kind: str, prompt: str, task: Task, rng: Random, flipped: bool) -> dict[str, Any]:
    statement = rng.choice(("the answer is {}", task.statement, task.statement))
    fault = "wrong" if rng.random() < _WRONG_SHARE else "evasive"
    evasion = rng.choice(_EVASIONS)
    chosen, wrong = (statement.format(f"**{answer}**") for answer in (task.right, task.wrong))
    opening, ending = rng.choice(_RESPONSE_OPENINGS), rng.choice(_RESPONSE_ENDINGS)
    chosen, rejected = (_sentence(opening, text, ending) for text in (chosen, wrong if fault == "wrong" else evasion))
    if flipped:
        chosen, rejected = rejected, chosen
    return {
        "id": row_id,
        "kind": kind,
        "fault": fault,
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "answer": task.right,
    }


def _sentence(opening: str, statement: str, ending: str) -> str:
    return opening + (statement if opening else statement[0].upper() + statement[1:]) + ending
