"""What a side says of a conversation that it cannot read."""

from typing import Any

from ctpd_nemo.errors import InputError


class RefusedConversationError(InputError):
    """One conversation that a side cannot read: its row's fault, not the run's.

    Attributes:
        reason: Countable.
    """

    def __init__(self, place: str, found: str, expected: str, reason: str = "refused_by_template") -> None:
        super().__init__(place, found, expected)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.place, self.found, self.expected, self.reason)
