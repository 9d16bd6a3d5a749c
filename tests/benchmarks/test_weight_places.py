"""What two responses differ in, and which spans hold it."""

import pytest
from weight_places import difference, holds


@pytest.mark.parametrize(
    ("text", "other", "expected"),
    [
        (b"It is 12.", b"It is 15.", (7, 8)),
        (b"It is odd.", b"It is even.", (6, 9)),
        (b"aab", b"ab", (1, 2)),
        (b"ab", b"aab", (1, 1)),
        (b"", b"a", (0, 0)),
        (b"a", b"a", (1, 1)),
    ],
)
def test_the_difference_is_what_neither_end_shares(text, other, expected):
    assert difference(text, other) == expected


def test_spans_hold_the_bytes_that_they_have():
    assert holds([0, 3, 6, 7, 9], 5, 7).tolist() == [False, True, True, False]
    assert not holds([0, 3, 6], 6, 6).any()
    assert not holds([0], 0, 1).any()
