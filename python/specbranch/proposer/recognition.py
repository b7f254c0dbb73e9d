"""Which text a row of an engine's batch goes on with: a row has no name, but it begins with the tokens of its text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]

TAIL = 16  # tokens at the end, by which texts of one length are told apart before all is compared


class Row(NamedTuple):
    """tokens: all that is committed. new: how many of them, at the end, are of the newest step."""

    tokens: Tokens
    new: int


class Known(Protocol):
    @property
    def tokens(self) -> Tokens:
        """Committed when it was seen last."""


T = TypeVar("T", bound=Known)


def recognise(rows: Sequence[Row], texts: Sequence[T]) -> list[T | None]:
    """The text that each row goes on with, if it is known; every text is given to one row at most.

    First come rows that are a known text and their newest tokens, then those that are a known text and any tokens, the
    longest text first: steps may have passed in between, or a text that is over may be how another begins.
    """
    found: list[T | None] = [None] * len(rows)
    by_end: defaultdict[tuple[int, bytes], list[T]] = defaultdict(list)
    for text in texts:
        by_end[_end(text.tokens)].append(text)
    for i, row in enumerate(rows):
        before = row.tokens[: len(row.tokens) - row.new]
        alike = by_end.get(_end(before), [])
        place = next((place for place, text in enumerate(alike) if np.array_equal(text.tokens, before)), None)
        if place is not None:
            found[i] = alike.pop(place)
    left = sorted((text for alike in by_end.values() for text in alike), key=lambda text: -len(text.tokens))
    for i, row in enumerate(rows):
        if found[i] is None:
            found[i] = next((text for text in left if _begins_with(row.tokens, text.tokens)), None)
            left = [text for text in left if text is not found[i]]
    return found


def common(tokens: Tokens, others: Tokens) -> int:
    """How many tokens two texts begin with that are the same."""
    length = min(len(tokens), len(others))
    differ = np.flatnonzero(tokens[:length] != others[:length])
    return int(differ[0]) if len(differ) else length


def _end(tokens: Tokens) -> tuple[int, bytes]:
    return len(tokens), tokens[-TAIL:].tobytes()


def _begins_with(tokens: Tokens, others: Tokens) -> bool:
    return len(others) < len(tokens) and bool(np.array_equal(tokens[: len(others)], others))
