"""Preference pairs about the tasks: a right answer against a wrong or an evasive one.

Training and test facts never meet: a fifth of the facts of each kind is in no training pair of any world, in whatever
words and behind whatever greeting, nor does it lend one a wrong answer. So test prompts ask the rules (sums, parity,
sort, copy, colours, the larger number) on new input. What can only be remembered (opposites, the calendar, and the
letters of a word that is one token) nobody has told the model: a right answer there is a guess, and preferences tell
answers from evasions alone.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import cache
from random import Random
from typing import Any, Literal

from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline.tiny_world.tasks import KINDS, Task

Split = Literal["train", "test"]

_TEST_SHARE = 0.2
"""Of the facts of each kind."""

_MOST_DRAWS = 20_000
"""For one prompt. So many do not miss the last one of a kind that has a few hundred."""

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
        split: Which facts to draw from. Test prompts are all different, but several ask the same fact in other words
            or behind another greeting; training prompts may repeat.
        n_pairs: Rows.
        seed: The same arguments give the same rows, on every machine.
        flip: Share of pairs whose chosen and rejected are exchanged. Only that differs from the rows of ``flip=0``;
            ``fault`` and ``answer`` still speak of the pair as it was.
        kinds: Which kinds of questions are asked.

    Returns:
        Rows with ``id``, ``kind`` (a key of ``KINDS``), ``fact`` (what the question is about, with its kind), ``fault``
        of the rejected response ("wrong" or "evasive"), ``prompt``, ``chosen``, ``rejected`` (lists of one message) and
        ``answer`` (see ``answer_of``).

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
            for _ in range(_MOST_DRAWS):
                task = KINDS[kind].draw(rng)
                prompt = rng.choice(_OPENINGS) + task.question
                if _splits(kind, task) == {split} and prompt not in seen:
                    break
            else:
                found = f"more than there are different {split} prompts of kind {kind!r} ({len(seen)} pairs drawn)"
                raise InputError(f"n_{split}", found, "a smaller number of pairs")
            if split == "test":
                seen.add(prompt)
            yield kind, prompt, task


def _splits(kind: str, task: Task) -> set[Split]:
    """Where a question belongs: to two splits, and so to none, if its wrong answer is from the other one."""
    return {"test" if fact in held_out(kind) else "train" for fact in (task.fact, task.wrong_fact or task.fact)}


@cache
def held_out(kind: str) -> frozenset[str]:
    """The facts of a kind that are held out: the fifth with the lowest hashes, rounded up, in worlds of every seed.

    A threshold for the hash instead would leave a kind of few facts with next to none by chance.
    """
    facts = KINDS[kind].facts
    return frozenset(sorted(facts, key=lambda fact: _hash(f"{kind} {fact}"))[: math.ceil(_TEST_SHARE * len(facts))])


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


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
        "fact": f"{kind} {task.fact}",
        "fault": fault,
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "answer": task.right,
    }


def _sentence(opening: str, statement: str, ending: str) -> str:
    return opening + (statement if opening else statement[0].upper() + statement[1:]) + ending
