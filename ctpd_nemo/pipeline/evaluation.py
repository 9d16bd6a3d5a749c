"""What an exported model makes of held-out preference pairs, by plain ``transformers``.

Nothing here is shared with the training stack but the reading of pairs and their tokenization, so a mistake in the
model, in its parallel layouts or in its export shows.
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ctpd_nemo.errors import InputError
from ctpd_nemo.pipeline.tiny_world.pairs import answer_of

# torch, transformers and what needs them are imported where they are used: they take seconds to load, and a module that
# only names an Evaluation does not need them.
if TYPE_CHECKING:
    from torch import Tensor

    from ctpd_nemo.data.encode import EncodedPair, PairEncoder, SideTokens
    from ctpd_nemo.data.forms import PreferencePair
    from ctpd_nemo.data.templates import Side

logger = logging.getLogger(__name__)

_N_SAMPLES = 10

FloatArray = NDArray[np.float64]

CausalModel = Any
"""What ``AutoModelForCausalLM`` returns; transformers has no one type that can be called and generates."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One generation: the user's last message, the greedy response, and the right answer where it is known."""

    id: str
    prompt: str
    response: str
    answer: str | None
    is_right: bool | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of a model on ``n`` pairs. Log-probs are in nats, summed over a response and its end of turn.

    Attributes:
        n: Pairs that were scored.
        skipped: Pairs that were not, by reason (see ``data.encode.Skipped``).
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
        standard_errors: Of each of the numbers above, by its name: sample standard deviation over sqrt(n); 0 for a
            single pair.
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
    samples: list[Sample]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain dictionaries, lists, numbers and strings, ready for JSON."""
        return asdict(self)


class _Row(NamedTuple):
    """A pair, and what a generated row says beside it."""

    pair: PreferencePair
    answer: str | None
    kind: str | None
    fault: str | None


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
    device: str = "cpu",
    limit: int | None = None,
    sample_seed: int | None = None,
) -> Evaluation:
    """Evaluate a Hugging Face folder on held-out pairs.

    Prompts are rendered with the chat template of the folder's tokenizer and responses tokenized by themselves, as in
    training. Weights keep the dtype they are stored in; log-softmax is taken in fp32.

    Args:
        folder: Model and tokenizer.
        pairs_file: Preference pairs in any form that training reads. Answers, kinds and faults come from the fields
            ``answer``, ``kind`` and ``fault`` of JSON Lines.
        reference: Folder of the model that ``reward_margin`` is measured against, usually the SFT student. Its
            tokenizer may be another one.
        batch_size: Sequences a forward pass.
        max_new_tokens: Longest generated response.
        max_length: Longest sequence, prompt and response, in tokens; longer responses are cut, as in training.
        include_eos: Whether the end of the turn is scored.
        chat_template: A Jinja template or the path of one, for both folders; by default each tokenizer's own.
        device: As ``torch`` names it.
        limit: Only the first so many pairs.
        sample_seed: Also answer by sampling, from this seed; ``None`` for greedy answers alone.

    Raises:
        InputError: The file has no usable pair; an ``answer`` is no string; a folder holds no usable model, or other
            weights than its config describes.
    """
    rows = _read_rows(Path(pairs_file), limit)
    folders = [Path(folder)]
    if reference is not None and Path(reference).resolve() != Path(folder).resolve():
        folders.append(Path(reference))
    encoders = [_encoder(path, chat_template, max_length, include_eos) for path in folders]
    rows, (encoded, *reference_encoded), skipped = _encode(rows, encoders)
    reference_margin: FloatArray | None = None
    for pairs in reference_encoded:
        # The reference goes first, and has left the memory before the model comes.
        chosen, rejected = _pair_logprobs(_load_model(folders[1], device), pairs, batch_size)
        reference_margin = chosen - rejected
    model = _load_model(folder, device)
    chosen, rejected = _pair_logprobs(model, encoded, batch_size)
    values = _preference_values(encoded, chosen, rejected)
    values["reward_margin"] = np.zeros(len(rows)) if reference_margin is None else chosen - rejected - reference_margin

    # Where no answer is known, a few responses to look at are enough.
    asked = rows if any(row.answer is not None for row in rows) else rows[:_N_SAMPLES]
    prompts = [pair.chosen.policy.prompt_ids for pair in encoded[: len(asked)]]
    responses = _generate(model, encoders[0].policy, prompts, batch_size, max_new_tokens)
    is_right = _is_right(asked, responses)
    values["answer_accuracy"] = _known(is_right)
    if sample_seed is not None:
        sampled = _generate(model, encoders[0].policy, prompts, batch_size, max_new_tokens, sample_seed)
        values["sampled_answer_accuracy"] = _known(_is_right(asked, sampled))
    return _summary(rows, skipped, values, responses, is_right)


def _summary(
    rows: Sequence[_Row],
    skipped: Counter[str],
    values: dict[str, FloatArray],
    responses: Sequence[str],
    is_right: Sequence[bool | None],
) -> Evaluation:
    known = {name: value for name, value in values.items() if len(value)}
    means: dict[str, Any] = {name: float(value.mean()) for name, value in known.items()}
    return Evaluation(
        n=len(rows),
        skipped=dict(skipped),
        **{"answer_accuracy": None, "sampled_answer_accuracy": None, **means},
        preference_accuracy_by_fault=_mean_by([row.fault for row in rows], values["preference_accuracy"].tolist()),
        answer_accuracy_by_kind=_mean_by([row.kind for row in rows[: len(is_right)]], is_right),
        standard_errors={name: _standard_error(value) for name, value in known.items()},
        samples=[
            Sample(row.pair.id, row.pair.prompt[-1].content, response, row.answer, right)
            for row, response, right in zip(rows[:_N_SAMPLES], responses, is_right, strict=False)
        ],
    )


def _read_rows(path: Path, limit: int | None) -> list[_Row]:
    from ctpd_nemo.data.files import open_source
    from ctpd_nemo.data.preferences import open_preferences

    if limit is not None and limit < 1:
        raise InputError("limit", str(limit), "1 or more")
    pairs = open_preferences(path)
    # Every row is a pair, or open_preferences would have stopped: pairs and rows have the same numbers.
    source = open_source(path, None)
    rows = []
    for index in range(len(pairs) if limit is None else min(limit, len(pairs))):
        fields = source.read(index)
        extras = [fields.get(name) for name in ("answer", "kind", "fault")]
        for name, value in zip(("answer", "kind", "fault"), extras, strict=True):
            if not isinstance(value, str | None):
                raise InputError(f"{source.place(index)}, field {name!r}", type(value).__name__, "a string, or none")
        rows.append(_Row(pairs[index], *extras))
    return rows


def _encoder(folder: Path, chat_template: str | Path | None, max_length: int, include_eos: bool) -> PairEncoder:
    from transformers import AutoTokenizer

    from ctpd_nemo.data.encode import PairEncoder
    from ctpd_nemo.data.templates import Side

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise InputError(str(folder), f"no tokenizer ({error})", "a Hugging Face folder with a tokenizer") from error
    return PairEncoder(Side(tokenizer, chat_template), None, include_eos, max_length)


def _encode(
    rows: list[_Row], encoders: Sequence[PairEncoder]
) -> tuple[list[_Row], list[list[EncodedPair]], Counter[str]]:
    """Encode with each encoder the rows that all of them can encode; the others are counted by reason."""
    from ctpd_nemo.data.encode import EncodedPair

    kept: list[_Row] = []
    encoded: list[list[EncodedPair]] = [[] for _ in encoders]
    skipped: Counter[str] = Counter()
    pairs = [row.pair for row in rows]
    results = [encoder.encode(range(len(pairs)), pairs) for encoder in encoders]
    for row, *result in zip(rows, *results, strict=True):
        fits = [pair for pair in result if isinstance(pair, EncodedPair)]
        if len(fits) == len(result):
            kept.append(row)
            for column, pair in zip(encoded, fits, strict=True):
                column.append(pair)
        else:
            skipped[next(pair.reason for pair in result if not isinstance(pair, EncodedPair))] += 1
    if not kept:
        raise InputError("max_length", f"no pair that fits ({dict(skipped)})", "at least one pair to evaluate")
    if skipped:
        logger.warning("Left out %d of %d pairs: %s", skipped.total(), len(rows), dict(skipped))
    return kept, encoded, skipped


def _load_model(folder: str | Path, device: str) -> CausalModel:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype="auto", output_loading_info=True)
    except (OSError, ValueError) as error:
        raise InputError(str(folder), f"no model ({error})", "a Hugging Face folder of a causal model") from error
    model, report = loaded
    # transformers would draw what is missing at random, and leave out what is too much.
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[key]:
            names = ", ".join(sorted(map(str, report[key]))[:3])
            raise InputError(str(folder), f"{key.replace('_', ' ')}: {names}", "the weights that config.json describes")
    return model.to(device).eval()


def _pair_logprobs(model: CausalModel, pairs: Sequence[EncodedPair], batch_size: int) -> tuple[FloatArray, FloatArray]:
    """Summed log-probs of the chosen and of the rejected responses: two float64 ``[n_pairs]``."""
    sequences = [pair.chosen.policy for pair in pairs] + [pair.rejected.policy for pair in pairs]
    logprobs = np.zeros(len(sequences))
    by_length = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    for start in range(0, len(by_length), batch_size):
        batch = by_length[start : start + batch_size]
        logprobs[batch] = _batch_logprobs(model, [sequences[index] for index in batch])
    return logprobs[: len(pairs)], logprobs[len(pairs) :]


def _batch_logprobs(model: CausalModel, sequences: Sequence[SideTokens]) -> FloatArray:
    """Summed log-probs of each response given its prompt: float64 ``[n_sequences]``, of one right-padded batch."""
    import torch

    ids = [np.concatenate([sequence.prompt_ids, sequence.response_ids]) for sequence in sequences]
    input_ids, mask = _padded(ids, "right", model)
    # Logits of no use, those inside every prompt, are not computed.
    shortest_prompt = min(len(sequence.prompt_ids) for sequence in sequences)
    keep = input_ids.shape[1] - shortest_prompt + 1
    with torch.inference_mode():
        logits = model(input_ids, attention_mask=mask, logits_to_keep=keep).logits[:, :-1].float()
        targets = input_ids[:, shortest_prompt:]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    positions = torch.arange(shortest_prompt, input_ids.shape[1], device=input_ids.device)
    starts = torch.tensor([[len(sequence.prompt_ids)] for sequence in sequences], device=input_ids.device)
    ends = torch.tensor([[len(sequence)] for sequence in sequences], device=input_ids.device)
    in_response = (positions >= starts) & (positions < ends)
    return -(losses.double() * in_response).sum(dim=1).cpu().numpy()


def _generate(
    model: CausalModel,
    side: Side,
    prompts: Sequence[NDArray[np.int32]],
    batch_size: int,
    max_new_tokens: int,
    sample_seed: int | None = None,
) -> list[str]:
    """The response to each prompt, up to its end of turn: greedy, or sampled at temperature 1 where there is a seed."""
    import torch
    from transformers import GenerationConfig

    stops = {int(side.end_of_turn_ids[-1]), side.tokenizer.eos_token_id} - {None}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(stops), pad_token_id=side.pad_token_id
    )
    if sample_seed is not None:
        config.update(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    # The folder's own defaults (temperature, penalties) would fill in what is not said here.
    model.generation_config = config
    responses: list[str] = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.inference_mode(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(sample_seed or 0)
        for start in range(0, len(by_length), batch_size):
            batch = by_length[start : start + batch_size]
            input_ids, mask = _padded([prompts[index] for index in batch], "left", model)
            output = model.generate(input_ids, attention_mask=mask)
            for index, ids in zip(batch, output[:, input_ids.shape[1] :].tolist(), strict=True):
                end = next((at for at, token in enumerate(ids) if token in stops), len(ids))
                responses[index] = str(side.tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
    return responses


def _padded(rows: Sequence[NDArray[np.int32]], side: str, model: CausalModel) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 ``[n_rows, longest]``, padded with id 0, which the mask hides."""
    import torch

    longest = max(map(len, rows))
    ids = np.zeros((len(rows), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[index, place] = row
        mask[index, place] = 1
    return torch.from_numpy(ids).to(model.device), torch.from_numpy(mask).to(model.device)


def _preference_values(pairs: Sequence[EncodedPair], chosen: FloatArray, rejected: FloatArray) -> dict[str, FloatArray]:
    """For each metric its value on each pair, float64 ``[n_pairs]``."""
    n_chosen = np.array([len(pair.chosen.policy.response_ids) for pair in pairs])
    n_rejected = np.array([len(pair.rejected.policy.response_ids) for pair in pairs])
    return {
        "preference_accuracy": _wins(chosen, rejected),
        "preference_accuracy_per_token": _wins(chosen / n_chosen, rejected / n_rejected),
        "logprob_margin": chosen - rejected,
        "chosen_logprob": chosen,
        "rejected_logprob": rejected,
    }


def _wins(chosen: FloatArray, rejected: FloatArray) -> FloatArray:
    return (np.sign(chosen - rejected) + 1) / 2


def _is_right(rows: Sequence[_Row], responses: Sequence[str]) -> list[bool | None]:
    return [
        None if row.answer is None else answer_of(response) == row.answer
        for row, response in zip(rows, responses, strict=True)
    ]


def _known(is_right: Sequence[bool | None]) -> FloatArray:
    return np.array([right for right in is_right if right is not None], dtype=np.float64)


def _standard_error(values: FloatArray) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def _mean_by(groups: Sequence[str | None], values: Sequence[float | None]) -> dict[str, float]:
    """The mean of the known values of each group, groups in order of appearance."""
    members: dict[str, list[float]] = defaultdict(list)
    for group, value in zip(groups, values, strict=True):
        if group is not None and value is not None:
            members[group].append(float(value))
    return {group: float(np.mean(found)) for group, found in members.items()}
