"""Steps whose numbers are no numbers: they are left out of the weights, and counted."""

from dataclasses import dataclass


@dataclass
class BadSteps:
    """Steps with a loss or a norm of the gradient that is NaN or infinite; equal on every rank.

    Attributes:
        total: Since the run began, earlier parts of a resumed run included.
        in_a_row: Up to the last step; 0 where that one was sound.
    """

    total: int = 0
    in_a_row: int = 0

    def add(self, bad: bool) -> None:
        """Count a step."""
        self.total += bad
        self.in_a_row = self.in_a_row + 1 if bad else 0
