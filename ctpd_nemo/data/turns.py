"""What a chat template makes of a response, compared with what is trained: prompt, response, end of turn.

Texts alone: a prompt as it is rendered for generation, a finished conversation, and the places where the two differ.
White space around a response, and reasoning between tags, are a user's to choose. Anything else that a template changes
means that training and inference would see different turns.
"""

from collections.abc import Iterator
from dataclasses import dataclass

# Where reasoning begins and ends, as models write it: Qwen and DeepSeek, Magistral, Command.
REASONING_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>"))
WHITE_SPACE, REASONING = "white_space", "reasoning"
_SHOWN = 60


class MismatchError(Exception):
    """A template that writes something else than prompt, response and end of turn, with both texts."""

    def __init__(self, trained: str, written: str) -> None:
        super().__init__()
        self.trained, self.written = around(trained, written)


@dataclass(frozen=True, slots=True)
class Opening:
    """What stands before a response, as a change to the end of the prompt that is rendered for generation.

    Attributes:
        removed: Text that the prompt loses.
        added: Text that it gets instead.
    """

    removed: str = ""
    added: str = ""

    def of(self, prompt: str) -> str | None:
        """The prompt with this opening; ``None`` where it does not end so."""
        return prompt.removesuffix(self.removed) + self.added if prompt.endswith(self.removed) else None


AS_RENDERED = Opening()


@dataclass(frozen=True, slots=True)
class TurnStyle:
    """How a template writes an assistant's turn.

    Attributes:
        found: What a finished conversation has before a response.
        trained: What training has there: the same, but for white space, which tokenizers put before a word themselves.
        closing: What a finished conversation has behind its last response.
        end: The part of it that ends the turn; empty where it is white space, or nothing.
    """

    found: Opening = AS_RENDERED
    trained: Opening = AS_RENDERED
    closing: str = ""
    end: str = ""


@dataclass(frozen=True, slots=True)
class Reading:
    """A response in its place.

    Attributes:
        opening: Of the prompt where the response is trained as it is.
        text: The response as the template writes it.
        difference: Why that is not the response itself, ``WHITE_SPACE`` or ``REASONING``; empty where it is.
    """

    opening: Opening
    text: str
    difference: str


def turn_opening(prompt: str, written: str) -> tuple[Opening, Opening]:
    """The ``found`` and ``trained`` of a :class:`TurnStyle`.

    Args:
        prompt: Rendered for generation.
        written: What a finished conversation has before the response to it.

    Raises:
        MismatchError: They differ in more than white space and a block of reasoning.
    """
    if written == prompt:
        return AS_RENDERED, AS_RENDERED
    at = shared_length(prompt, written)
    found = Opening(prompt[at:], written[at:])
    bare_prompt, bare_written = without_block(prompt), without_block(written)
    if bare_prompt.rstrip() != bare_written.rstrip():
        raise MismatchError(prompt, written)
    has_block = bare_prompt != prompt or bare_written != written
    return found, found if has_block else AS_RENDERED


def read_response(style: TurnStyle, prompt: str, conversation: str, response: str) -> Reading:
    """Find a response in the conversation that ends with it.

    Args:
        style: Of the template.
        prompt: Rendered for generation.
        conversation: The same with the response, rendered as a finished conversation.
        response: Its text.

    Raises:
        MismatchError: It does not stand there as it is, nor changed in white space and reasoning alone.
    """
    places = [
        (before, trained)
        for found, trained in _openings(style, prompt, conversation)
        if (before := found.of(prompt)) is not None
    ]
    for before, trained in places:
        if conversation.startswith(before) and conversation.startswith(response, len(before)):
            behind = conversation[len(before) + len(response) :]
            if behind == style.closing or (style.end and behind.lstrip().startswith(style.end)):
                return Reading(trained, response, "")
    for before, trained in sorted(places, key=lambda place: -len(place[0])):
        if conversation.startswith(before) and conversation.endswith(style.closing):
            text = conversation[len(before) : len(conversation) - len(style.closing)]
            difference = _difference(response, text)
            if difference:
                opening = _own_opening(prompt, response) if difference == REASONING else trained
                return Reading(opening, text, difference)
    raise MismatchError(prompt + response + style.closing, conversation)


def without_block(text: str) -> str:
    """A text without the reasoning that it opens, closes, or opens and closes at its end."""
    for opened, closed in REASONING_TAGS:
        end = text.rstrip()
        if end.endswith(closed):
            before = end.removesuffix(closed)
            inner = before.rstrip()
            return inner.removesuffix(opened) if inner.endswith(opened) else before
        if end.endswith(opened):
            return end.removesuffix(opened)
    return text


def around(first: str, second: str) -> tuple[str, str]:
    """Two texts where they begin to differ, short enough to be read side by side."""
    at = shared_length(first, second)
    begin = max(0, at - _SHOWN)

    def cut(text: str) -> str:
        middle = text[begin : at + _SHOWN]
        return f"{'...' if begin else ''}{middle}{'...' if at + _SHOWN < len(text) else ''}"

    return cut(first), cut(second)


def shared_length(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first.startswith(second[:middle]) else (low, middle - 1)
    return low


def _openings(style: TurnStyle, prompt: str, conversation: str) -> Iterator[tuple[Opening, Opening]]:
    """What may stand before a response, and what is trained there; the usual first."""
    yield AS_RENDERED, AS_RENDERED
    if style.found != AS_RENDERED:
        yield style.found, style.trained
    bare = _bare(prompt)
    if bare != AS_RENDERED:
        # A response with reasoning of its own.
        yield bare, bare
    rest = conversation.removeprefix(prompt.removesuffix(bare.removed))
    for opened, _ in REASONING_TAGS:
        if rest.startswith(opened):
            # A response that only closes it.
            behind = rest.removeprefix(opened)
            space = behind[: len(behind) - len(behind.lstrip())]
            yield (Opening(bare.removed, opened + space),) * 2


def _bare(prompt: str) -> Opening:
    return Opening(prompt[len(without_block(prompt)) :])


def _own_opening(prompt: str, response: str) -> Opening:
    """Where a response with reasoning begins: no tag stands twice, and one that it only closes is open."""
    begins = response.lstrip().startswith(tuple(opened for opened, _ in REASONING_TAGS))
    is_open = prompt.rstrip().endswith(tuple(opened for opened, _ in REASONING_TAGS))
    return AS_RENDERED if is_open and not begins else _bare(prompt)


def _difference(response: str, text: str) -> str:
    """What kind of change makes ``text`` of a response; empty where it is another."""
    if not text.strip():
        return ""
    if text.strip() == response.strip():
        return WHITE_SPACE
    for tags in REASONING_TAGS:
        if any(tag in response for tag in tags):
            answers = (response.partition(tags[1])[2], response.rpartition(tags[1])[2])
            same_words = "".join(text.split()) == "".join(response.split())
            if same_words or any(text.strip() == answer.strip() for answer in answers):
                return REASONING
    return ""
