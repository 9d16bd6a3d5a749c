"""Preference pairs to token ids, with the responses cut into spans that both sides share."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ctpd_nemo.data.chat_template import RefusedConversationError
from ctpd_nemo.data.encoded_pair import EncodedPair, EncodedResponse, SideName, SideTokens, Skipped
from ctpd_nemo.data.forms import PreferencePair
from ctpd_nemo.data.messages import KeptFields
from ctpd_nemo.data.template_fields import FieldReader, kept_fields
from ctpd_nemo.data.templates import Prompt, Side
from ctpd_nemo.data.turns import Reading
from ctpd_nemo.errors import InputError
from ctpd_nemo.spans import AlignedSpans, align_batch

RESPONSE_TEXTS = ("written", "rendered")
# A template that goes on changing its own text is none to follow.
_MOST_RENDERINGS = 4
# Characters of a text that an error shows.
_SHOWN = 60


class PairEncoder:
    """Renders prompts with each side's template and cuts responses into shared spans.

    A response is tokenized by itself and stands between what the template writes before it and the end of turn. A
    sequence that is too long loses the end of its response, on both sides at the same span bound. Prompts are never
    cut: half a template is no prompt.
    """

    def __init__(
        self,
        policy: Side,
        reference: Side | None,
        include_eos: bool,
        max_length: int,
        max_prompt_length: int | None = None,
        response_text: str = "written",
        on_bad: str = "stop",
    ) -> None:
        """Set up the two sides; limits are in tokens and hold on either side.

        Args:
            policy: The model that is trained (the student).
            reference: The model it is measured against (the teacher); ``None`` where it reads as the policy does.
            include_eos: Whether the end of turn is a last span of every whole response.
            max_length: Longest sequence: a prompt and a response.
            max_prompt_length: Longest prompt; ``None`` for any that leaves room for a response.
            response_text: "written" takes responses as they are in the data, "rendered" as the templates write them.
            on_bad: "stop" raises at a pair with one of ``FAULTS``, "skip" leaves it out like one that is too long.

        Raises:
            InputError: A limit is not positive, or ``response_text`` is something else.
        """
        for key, limit in (("max_length", max_length), ("max_prompt_length", max_prompt_length)):
            if limit is not None and limit < 1:
                raise InputError(f"data.{key}", str(limit), "a positive number of tokens")
        if response_text not in RESPONSE_TEXTS:
            raise InputError("data.response_text", repr(response_text), " or ".join(RESPONSE_TEXTS))
        self.policy = policy
        self.include_eos = include_eos
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.response_text = response_text
        self.on_bad = on_bad
        self._same_tokenizer = reference is None or reference.reads_responses_as(policy)
        self.one_sided = reference is None or (
            self._same_tokenizer and reference.template_fingerprint == policy.template_fingerprint
        )
        self.reference = policy if reference is None or self.one_sided else reference

    @property
    def lengths(self) -> str:
        """What is cut and kept of a sequence, as fingerprints say it."""
        told = (
            f"max_length {self.max_length}, max_prompt_length {self.max_prompt_length}, include_eos {self.include_eos}"
        )
        return told if self.response_text == "written" else f"{told}, response_text {self.response_text}"

    def prepare(self) -> None:
        """Build what alignment keeps for each tokenizer, so that processes forked later share it."""
        self._align([])

    @property
    def kept(self) -> KeptFields:
        """What of a row beside its texts one of the templates may render."""
        return kept_fields(self._readers)

    def encode(self, indices: Sequence[int], pairs: Sequence[PreferencePair]) -> list[EncodedPair | Skipped]:
        """Encode pairs, in order; their rows in the dataset are ``indices``.

        A pair that a template or a tokenizer cannot take is left out, or named, and harms no other of them.

        Raises:
            RefusedConversationError: A pair has a fault, and ``on_bad`` is "stop".
        """
        try:
            return self._encode_all(indices, pairs)
        except BaseException as error:
            if not _is_of_a_row(error):
                raise
        return [self._encode_alone(index, pair) for index, pair in zip(indices, pairs, strict=True)]

    def _encode_alone(self, index: int, pair: PreferencePair) -> EncodedPair | Skipped:
        try:
            return self._encode_all([index], [pair])[0]
        except BaseException as error:
            if not _is_of_a_row(error):
                raise
            fault = error
        if not isinstance(fault, RefusedConversationError):
            found, expected = f"text on which a tokenizer gives up ({fault})", "text that it can read"
            fault = RefusedConversationError(pair.place, found, expected, "refused_by_tokenizer")
        if pair.place not in fault.place:
            place = f"{pair.place}, {fault.place}"
            fault = RefusedConversationError(place, fault.found, fault.expected, fault.reason)
        if self.on_bad == "stop":
            raise fault
        return Skipped(index, pair.id, fault.reason, str(fault))

    def _encode_all(self, indices: Sequence[int], pairs: Sequence[PreferencePair]) -> list[EncodedPair | Skipped]:
        read = [self._read(pair) for pair in pairs]
        policy_prompts = self._prompt_ids(self.policy, [one.prompts["policy"] for one in read])
        reference_prompts = policy_prompts
        if not self.one_sided:
            reference_prompts = self._prompt_ids(self.reference, [one.prompts["reference"] for one in read])
        spans = self._align([one.texts[number] for number in range(2) for one in read])
        encoded = []
        for number, (index, pair, one) in enumerate(zip(indices, pairs, read, strict=True)):
            prompts = zip(policy_prompts[number], reference_prompts[number], strict=True)
            own_spans = spans[number :: len(pairs)]
            self._check_tokens(pair, one.texts, own_spans)
            responses = [
                _Response(*both, own, found)
                for both, own, found in zip(prompts, own_spans, one.differences, strict=True)
            ]
            encoded.append(self._encode_pair(index, pair, responses))
        return encoded

    @cached_property
    def _readers(self) -> list[FieldReader]:
        """Of the policy, and of the reference where that is another."""
        return [FieldReader(side) for side in ([self.policy] if self.one_sided else [self.policy, self.reference])]

    def _texts(self, pair: PreferencePair) -> tuple[str, str]:
        """The responses of a pair; where one is more than its text, as the templates of both sides write it.

        Raises:
            RefusedConversationError: A template leaves out what carries meaning, or the two write it otherwise.
        """
        if pair.is_plain:
            return pair.chosen, pair.rejected
        for reader in self._readers:
            reader.check(pair)
        texts = []
        for name in ("chosen", "rejected"):
            first, *others = [reader.response(pair, name) for reader in self._readers]
            if others and others[0] != first:
                found = f"{name} as {first[:_SHOWN]!r} by the policy's template, {others[0][:_SHOWN]!r} by the other"
                expected = "a response that both write alike: its spans are those of one text"
                raise RefusedConversationError(pair.place, found, expected, "rewritten_by_template")
            texts.append(first)
        return texts[0], texts[1]

    def _check_tokens(self, pair: PreferencePair, texts: tuple[str, str], spans: Sequence[AlignedSpans]) -> None:
        """See ``FieldReader.check_tokens``; of pairs that are more than text."""
        if pair.whole:
            for name, text, own in zip(("chosen", "rejected"), texts, spans, strict=True):
                for reader, ids in zip(self._readers, (own.student_ids, own.teacher_ids), strict=False):
                    reader.check_tokens(pair, name, text, ids)

    def _read(self, pair: PreferencePair) -> "_Read":
        """Find the responses of a pair in the conversations that each side's template writes."""
        sides: dict[SideName, Side] = {"policy": self.policy}
        if not self.one_sided:
            sides["reference"] = self.reference
        texts = self._texts(pair)
        if self.response_text == "rendered":
            texts = self._as_rendered(pair, texts, list(sides.values()))
        prompts: dict[SideName, list[Prompt]] = {}
        differences: list[tuple[str, ...]] = [(), ()]
        for name, side in sides.items():
            rendered, readings = _read_in(side, pair, texts)
            prompts[name] = [Prompt(pair.prompt, rendered, one.opening, pair.place, pair.fields) for one in readings]
            differences = [
                (*known, f"{name}_{one.difference}") if one.difference else known
                for known, one in zip(differences, readings, strict=True)
            ]
        return _Read(texts, prompts, differences)

    def _as_rendered(self, pair: PreferencePair, texts: tuple[str, str], sides: Sequence[Side]) -> tuple[str, str]:
        """The responses as the templates write them: as one does, and so on until no template changes them.

        Raises:
            RefusedConversationError: They go on and on.
        """
        for _ in range(_MOST_RENDERINGS):
            before = texts
            for side in sides:
                chosen, rejected = _read_in(side, pair, texts)[1]
                texts = (chosen.text, rejected.text)
            if texts == before:
                return texts
        found = "a response that the templates write otherwise each time"
        raise RefusedConversationError(pair.place, found, "data.response_text=written", "rewritten_by_template")

    def _prompt_ids(self, side: Side, prompts: Sequence[Sequence[Prompt]]) -> list[list[NDArray[np.int32]]]:
        """Ids of what stands before each response of each pair; where that is alike they are the same array."""
        different = {(number, one.opening): one for number, row in enumerate(prompts) for one in row}
        ids = dict(zip(different, side.encode_prompts(list(different.values())), strict=True))
        return [[ids[number, one.opening] for one in row] for number, row in enumerate(prompts)]

    def _align(self, texts: list[str]) -> list[AlignedSpans]:
        policy = self.policy.reader
        return align_batch(texts, policy if self._same_tokenizer else self.reference.reader, policy)

    def _encode_pair(self, index: int, pair: PreferencePair, responses: Sequence["_Response"]) -> EncodedPair | Skipped:
        longest = max(len(ids) for response in responses for ids in (response.policy_prompt, response.reference_prompt))
        if self.max_prompt_length is not None and longest > self.max_prompt_length:
            return Skipped(index, pair.id, "prompt_too_long")
        chosen, rejected = map(self._encode_response, responses)
        if chosen is None or rejected is None:
            return Skipped(index, pair.id, "too_long")
        if np.array_equal(chosen.policy.response_ids, rejected.policy.response_ids):
            truncated = chosen.truncated or rejected.truncated
            return Skipped(index, pair.id, "equal_after_truncation" if truncated else "equal_tokens")
        return EncodedPair(index, pair.id, chosen, rejected)

    def _encode_response(self, response: "_Response") -> EncodedResponse | None:
        """Cut a response to what fits both sides; ``None`` where no span does."""
        spans = response.spans
        sides = (
            (self.policy, response.policy_prompt, spans.student_ids, spans.student_span),
            (self.reference, response.reference_prompt, spans.teacher_ids, spans.teacher_span),
        )
        end_of_turn = [len(side.end_of_turn_ids) if self.include_eos else 0 for side, *_ in sides]
        room = [self.max_length - len(prompt) for _, prompt, _, _ in sides]
        truncated = any(
            len(ids) + end > space for (_, _, ids, _), end, space in zip(sides, end_of_turn, room, strict=True)
        )
        n_text_spans = spans.n_spans
        if truncated:
            n_text_spans = min(
                _spans_that_fit(span, spans.n_spans, space) for (*_, span), space in zip(sides, room, strict=True)
            )
        if n_text_spans < 1:
            return None
        with_end = self.include_eos and not truncated
        policy, reference = (_tokens(*side, n_text_spans, with_end) for side in sides)
        return EncodedResponse(
            policy,
            policy if self.one_sided else reference,
            spans.bounds[: n_text_spans + 1],
            n_text_spans + with_end,
            truncated,
            response.differences,
        )


@dataclass(frozen=True, slots=True)
class _Read:
    """A pair as the templates write it: both responses, what stands before them, and how they differ from theirs."""

    texts: tuple[str, str]
    prompts: dict[SideName, list[Prompt]]
    differences: list[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class _Response:
    """A response in tokens, before it is cut."""

    policy_prompt: NDArray[np.int32]
    reference_prompt: NDArray[np.int32]
    spans: AlignedSpans
    differences: tuple[str, ...]


def _read_in(side: Side, pair: PreferencePair, texts: Sequence[str]) -> tuple[str, list[Reading]]:
    """Find both responses of a pair in the conversations that a side writes of its messages."""
    turns = {number: pair.whole[name] for number, name in enumerate(("chosen", "rejected")) if name in pair.whole}
    return side.read(pair.prompt, texts, pair.place, pair.fields, turns)


def _is_of_a_row(error: BaseException) -> bool:
    """Whether an error is one of a conversation or of a text, and not of the run.

    Tokenizers are programs in Rust. Where they cannot go on they raise an exception of no class of its own, and where
    their author foresaw nothing a panic, which is no ``Exception``: a regular expression that takes too many steps.
    """
    panics = type(error).__module__ == "pyo3_runtime" and type(error).__name__ == "PanicException"
    return isinstance(error, RefusedConversationError) or panics or type(error) is Exception


def _spans_that_fit(token_span: NDArray[np.int32], n_spans: int, room: int) -> int:
    """How many whole spans the first ``room`` tokens hold."""
    if room < 1:
        return 0
    return n_spans if room >= len(token_span) else int(token_span[room])


def _tokens(
    side: Side,
    prompt_ids: NDArray[np.int32],
    ids: NDArray[np.int64],
    token_span: NDArray[np.int32],
    n_text_spans: int,
    with_end: bool,
) -> SideTokens:
    kept = int(np.searchsorted(token_span, n_text_spans))
    end = side.end_of_turn_ids if with_end else side.end_of_turn_ids[:0]
    return SideTokens(
        prompt_ids,
        np.concatenate([ids[:kept].astype(np.int32), end]),
        np.concatenate([token_span[:kept], np.full(len(end), n_text_spans, dtype=np.int32)]),
    )
