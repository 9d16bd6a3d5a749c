"""What an exported model makes of held-out preference pairs, by plain ``transformers``.

Nothing here is shared with the training stack but the reading of pairs and their tokenization, so a mistake in the
model, in its parallel layouts or in its export shows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ctpd_nemo.errors import InputError
from ctpd_nemo.evaluation.calibration import Calibration, calibration
from ctpd_nemo.evaluation.clusters import standard_error
from ctpd_nemo.evaluation.lengths import Lengths, length_statistics
from ctpd_nemo.evaluation.model import FloatArray, Generation, generate, load_model, pair_logprobs, positions
from ctpd_nemo.evaluation.pairs import Row, encode_rows, pair_encoder, read_rows
from ctpd_nemo.pipeline.tiny_world.pairs import answer_of

# torch, transformers and what needs them are imported where they are used: they take seconds to load, and a module that
# only names an Evaluation does not need them.
if TYPE_CHECKING:
    from ctpd_nemo.data.encoded_pair import EncodedPair

_N_SAMPLES = 10


@dataclass(frozen=True, slots=True)
class Sample:
    """One generation: the user's last message, the greedy response, and the right answer where it is known.

    The pair is named by its id and by file and row.
    """

    id: str
    place: str
    prompt: str
    response: str
    answer: str | None
    is_right: bool | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of a model on ``n`` pairs. Log-probs are in nats, summed over a response and its end of turn.

    Attributes:
        n: Pairs that were scored.
        skipped: Pairs that were not, by reason (see ``data.encoded_pair.Skipped``).
        preference_accuracy: Share of pairs with log pi(chosen) > log pi(rejected); a tie counts half.
        preference_accuracy_per_token: The same with each log-prob divided by its number of tokens.
        reward_margin: Mean of [log pi(chosen) - log pi_ref(chosen)] - [log pi(rejected) - log pi_ref(rejected)],
            without a beta. 0 where the reference is the model itself, or where there is none.
        logprob_margin: Mean of log pi(chosen) - log pi(rejected).
        chosen_logprob: Mean of log pi(chosen).
        rejected_logprob: Mean of log pi(rejected).
        answer_accuracy: Share of prompts whose greedy response gives the right answer
            (``tiny_world.pairs.answer_of``); ``None`` where no row has an ``answer``.
        sampled_answer_accuracy: The same for one response a prompt, sampled at temperature 1 from the full
            distribution; ``None`` where it was not asked for.
        preference_accuracy_by_fault: For each value of the rows' ``fault``.
        answer_accuracy_by_kind: For each value of the rows' ``kind``.
        standard_errors: Of each of the numbers above, by its name. Pairs about the same fact, or with the same prompt
            where rows name no ``fact``, are not independent: the error is that of as many observations as there are
            facts (:func:`ctpd_nemo.evaluation.clusters.standard_error`); 0 where there is one.
        counts: Of each of them, from how many pairs it is.
        facts: Of each of them, from how many different facts.
        calibration: Of the reward margins; ``None`` without a reference, or against the model itself.
        lengths: Of the generations, under ``greedy``, and ``sampled`` where that was asked for.
        samples: The first few greedy responses.
    """

    n: int
    skipped: dict[str, int]
    preference_accuracy: float
    preference_accuracy_per_token: float
    reward_margin: float
    logprob_margin: float
    chosen_logprob: float
    rejected_logprob: float
    answer_accuracy: float | None
    sampled_answer_accuracy: float | None
    preference_accuracy_by_fault: dict[str, float]
    answer_accuracy_by_kind: dict[str, float]
    standard_errors: dict[str, float]
    counts: dict[str, int]
    facts: dict[str, int]
    calibration: Calibration | None
    lengths: dict[str, Lengths]
    samples: list[Sample]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain dictionaries, lists, numbers and strings, ready for JSON."""
        return asdict(self)


def evaluate_folder(
    folder: str | Path,
    pairs_file: str | Path,
    *,
    reference: str | Path | None = None,
    batch_size: int = 64,
    max_new_tokens: int = 48,
    max_length: int = 2048,
    include_eos: bool = True,
    chat_template: str | Path | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    device: str | None = "auto",
    limit: int | None = None,
    sample_seed: int | None = None,
    beta: float = 0.1,
    generations: int | None = None,
    dtype: str = "auto",
    on_bad: str = "stop",
    split: str | None = None,
) -> Evaluation:
    """Evaluate a Hugging Face folder on held-out pairs.

    Prompts are rendered with the chat template of the folder's tokenizer and responses tokenized by themselves, as in
    training. Log-softmax is taken in fp32.

    Args:
        folder: Model and tokenizer.
        pairs_file: Preference pairs in any form that training reads. Answers, kinds, faults and facts come from the
            fields ``answer``, ``kind``, ``fault`` and ``fact`` of JSON.
        reference: Folder of the model that ``reward_margin`` is measured against, usually the SFT student. Its
            tokenizer may be another one.
        batch_size: Sequences a forward pass.
        max_new_tokens: Longest generated response.
        max_length: Longest sequence, prompt and response, in tokens, within the positions that the models know; longer
            responses are cut, as in training.
        include_eos: Whether the end of the turn is scored.
        chat_template: A Jinja template or the path of one, for both folders; by default each tokenizer's own.
        chat_template_kwargs: Variables for it, likewise; by default those that each folder was trained with.
        device: As ``torch`` names it; ``auto`` is a GPU where there is one.
        limit: Only the first so many pairs.
        sample_seed: Also answer by sampling, from this seed; ``None`` for greedy answers alone.
        beta: Of the implicit reward whose calibration is measured.
        generations: Prompts that are answered; by default all where a row has an ``answer``, else a few to look at.
        dtype: As ``torch`` names it; ``auto`` keeps that of the stored weights.
        on_bad: "stop" at a row that cannot be used, or "skip" it and count it.
        split: Which split of a folder that has several.

    Raises:
        InputError: The file has no usable pair; an ``answer`` is no string; a folder holds no usable model, or other
            weights than its config describes.
    """
    if generations is not None and generations < 1:
        raise InputError("generations", str(generations), "1 or more")
    folders = [Path(folder)]
    if reference is not None and Path(reference).resolve() != Path(folder).resolve():
        folders.append(Path(reference))
    longest = min(max_length, *(positions(path) or max_length for path in folders))
    encoders = [
        pair_encoder(path, chat_template, longest, include_eos, chat_template_kwargs, on_bad) for path in folders
    ]
    rows, bad = read_rows(pairs_file, limit, encoders, on_bad, split)
    rows, (encoded, *reference_encoded), skipped = encode_rows(rows, encoders)
    skipped += bad
    reference_margin: FloatArray | None = None
    for pairs in reference_encoded:
        # The reference goes first, and has left the memory before the model comes.
        reference_margin = np.subtract(*pair_logprobs(load_model(folders[1], device, dtype), pairs, batch_size))
    model = load_model(folder, device, dtype)
    values = _preference_values(encoded, *pair_logprobs(model, encoded, batch_size), reference_margin)

    # Where no answer is known, a few responses to look at are enough.
    n_asked = len(rows) if any(row.answer is not None for row in rows) else _N_SAMPLES
    asked = rows[: n_asked if generations is None else generations]
    # As whoever asks the model renders them; what was trained before a response may be something else.
    prompts = encoders[0].policy.render_prompts([row.pair.prompt for row in asked])
    responses = {"greedy": generate(model, encoders[0].policy, prompts, batch_size, max_new_tokens)}
    if sample_seed is not None:
        sampled = generate(model, encoders[0].policy, prompts, batch_size, max_new_tokens, sample_seed)
        values["sampled_answer_accuracy"] = _known(_is_right(asked, sampled))
        responses["sampled"] = sampled
    measured = None
    if reference_margin is not None:
        measured = calibration(values["reward_margin"], beta, clusters=[row.cluster for row in rows])
    return _summary(rows, skipped, values, responses, measured)


def _summary(
    rows: Sequence[Row],
    skipped: Counter[str],
    values: dict[str, FloatArray],
    responses: dict[str, list[Generation]],
    measured: Calibration | None,
) -> Evaluation:
    greedy = responses["greedy"]
    asked = rows[: len(greedy)]
    is_right = _is_right(asked, greedy)
    values = values | {"answer_accuracy": _known(is_right)}
    known = {name: value for name, value in values.items() if len(value)}
    clusters = {name: _clusters(name, rows, asked) for name in known}
    means: dict[str, Any] = {name: float(value.mean()) for name, value in known.items()}
    return Evaluation(
        n=len(rows),
        skipped=dict(skipped),
        **{"answer_accuracy": None, "sampled_answer_accuracy": None, **means},
        preference_accuracy_by_fault=_mean_by([row.fault for row in rows], values["preference_accuracy"].tolist()),
        answer_accuracy_by_kind=_mean_by([row.kind for row in asked], is_right),
        standard_errors={name: standard_error(value, clusters[name]) for name, value in known.items()},
        counts={name: len(value) for name, value in known.items()},
        facts={name: len(set(found)) for name, found in clusters.items()},
        calibration=measured,
        lengths={name: length_statistics(found, [row.cluster for row in asked]) for name, found in responses.items()},
        samples=[
            Sample(row.pair.id, row.file_and_row, row.pair.prompt[-1].content, response.text, row.answer, right)
            for row, response, right in zip(rows[:_N_SAMPLES], greedy, is_right, strict=False)
        ],
    )


def _preference_values(
    pairs: Sequence[EncodedPair], chosen: FloatArray, rejected: FloatArray, reference_margin: FloatArray | None
) -> dict[str, FloatArray]:
    """For each metric its value on each pair, float64 ``[n_pairs]``."""
    n_chosen = np.array([len(pair.chosen.policy.response_ids) for pair in pairs])
    n_rejected = np.array([len(pair.rejected.policy.response_ids) for pair in pairs])
    return {
        "preference_accuracy": _wins(chosen, rejected),
        "preference_accuracy_per_token": _wins(chosen / n_chosen, rejected / n_rejected),
        "reward_margin": np.zeros_like(chosen) if reference_margin is None else chosen - rejected - reference_margin,
        "logprob_margin": chosen - rejected,
        "chosen_logprob": chosen,
        "rejected_logprob": rejected,
    }


def _wins(chosen: FloatArray, rejected: FloatArray) -> FloatArray:
    return (np.sign(chosen - rejected) + 1) / 2


def _is_right(rows: Sequence[Row], responses: Sequence[Generation]) -> list[bool | None]:
    return [
        None if row.answer is None else answer_of(response.text) == row.answer
        for row, response in zip(rows, responses, strict=True)
    ]


def _known(is_right: Sequence[bool | None]) -> FloatArray:
    return np.array([right for right in is_right if right is not None], dtype=np.float64)


def _clusters(name: str, rows: Sequence[Row], asked: Sequence[Row]) -> list[str]:
    """What each value of a metric is about: answers are of the rows that were asked and have one."""
    if name.endswith("answer_accuracy"):
        return [row.cluster for row in asked if row.answer is not None]
    return [row.cluster for row in rows]


def _mean_by(groups: Sequence[str | None], values: Sequence[float | None]) -> dict[str, float]:
    """The mean of the known values of each group, groups in order of appearance."""
    members: dict[str, list[float]] = defaultdict(list)
    for group, value in zip(groups, values, strict=True):
        if group is not None and value is not None:
            members[group].append(float(value))
    return {group: float(np.mean(found)) for group, found in members.items()}
