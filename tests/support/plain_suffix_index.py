"""Look-ups in texts in plain Python: what the compiled ones (csrc/retrieval) are defined by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specbranch.core.suffix_index import DEPTH


def backwards(tokens: Sequence[int], position: int) -> list[int]:
    """A prefix as it is compared: from its last token on. Of two lists that are equal so far the shorter is less."""
    return list(tokens[max(0, position + 1 - DEPTH) : position + 1])[::-1]


class PlainSuffixIndex:
    """See SuffixIndex in _planning.pyi."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens = list(tokens)
        self.sorted = len(self.tokens)  # what stands behind it is the tail

    def __len__(self) -> int:
        return len(self.tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        self.tokens += tokens
        if len(self.tokens) - self.sorted >= max(256, len(self.tokens) // 1024):
            self.sorted = len(self.tokens)

    @property
    def order(self) -> list[int]:
        """The tail is merged first."""
        self.sorted = len(self.tokens)
        return self.sorted_positions()

    def sorted_positions(self) -> list[int]:
        return sorted(range(self.sorted), key=lambda position: (backwards(self.tokens, position), position))


@dataclass(frozen=True)
class Occurrence:
    match: int
    index: int
    position: int
    near: bool


@dataclass(frozen=True)
class Node:
    """In the order of the columns of Continuations."""

    token: int
    parent: int
    match: int
    count: int
    total: int
    source: int
    position: int
    near: int


def match_of(here: list[int], there: list[int]) -> int:
    match = 0
    while match < min(len(here), len(there)) and here[match] == there[match]:
        match += 1
    return match


def plain_continuations(
    indexes: Sequence[PlainSuffixIndex],
    context: Sequence[int],
    drafted: int = 0,
    *,
    occurrences: int = 32,
    depth: int = 64,
    least_match: int = 1,
    most_nodes: int = 240,
    near: tuple[int, int, int] | None = None,
) -> list[Node]:
    """See continuations in _planning.pyi."""
    end = backwards(context, len(context) - 1)
    found = []
    for place, index in enumerate(indexes):
        # Those that have a next token.
        following = len(index) if place == 0 and drafted > 0 else len(index) - 1
        order = [position for position in index.sorted_positions() if position < following]
        middle = sum(backwards(index.tokens, position) <= end for position in order)
        looked_at = order[max(0, middle - occurrences) : middle + occurrences]
        looked_at += range(index.sorted, following)
        expected = range(near[1], near[2] + 1) if near is not None and near[0] == place else range(0)
        looked_at += [position for position in range(following) if position in expected and position not in looked_at]
        for position in looked_at:
            match = match_of(backwards(index.tokens, position), end)
            if match >= least_match:
                found.append(Occurrence(match, place, position, position in expected))
    found.sort(key=lambda each: (not each.near, -each.match, each.index, -each.position))
    taken = found[:occurrences]
    runs = [run_of(each, indexes, context, drafted, depth) for each in taken]

    # A node is named by the tokens down to it.
    paths: list[tuple[int, ...]] = []
    for run in runs:
        for length in range(1, len(run) + 1):
            path = tuple(run[:length])
            if path not in paths:
                if len(paths) == most_nodes:
                    break
                paths.append(path)

    def through(path: tuple[int, ...]) -> list[Occurrence]:
        return [each for each, run in zip(taken, runs, strict=True) if tuple(run[: len(path)]) == path]

    def match_at(path: tuple[int, ...]) -> int:
        return min(DEPTH, max(each.match for each in through(path)) + len(path) - 1)

    def is_near(path: tuple[int, ...]) -> bool:
        return any(each.near for each in through(path))

    def place_among_siblings(path: tuple[int, ...]) -> tuple[bool, int, int, int]:
        return not is_near(path), -match_at(path), -len(through(path)), taken.index(through(path)[0])

    level: list[tuple[int, ...]] = [()]
    ordered: list[tuple[int, ...]] = []
    while level:
        below = []
        for parent in level:
            children = [path for path in paths if path[:-1] == parent]
            below += sorted(children, key=place_among_siblings)
        ordered += below
        level = below
    return [
        Node(
            token=path[-1],
            parent=ordered.index(path[:-1]) if path[:-1] else -1,
            match=match_at(path),
            count=len(through(path)),
            total=len(through(path[:-1])),
            source=through(path)[0].index,
            position=through(path)[0].position + len(path),
            near=int(is_near(path)),
        )
        for path in ordered
    ]


def run_of(
    occurrence: Occurrence, indexes: Sequence[PlainSuffixIndex], context: Sequence[int], drafted: int, depth: int
) -> list[int]:
    text = list(indexes[occurrence.index].tokens)
    begin = occurrence.position + 1
    if occurrence.index > 0:
        return text[begin : begin + depth]
    text += context[len(context) - drafted :]
    period = len(text) - begin
    while len(text) < begin + depth:
        text.append(text[-period])
    return text[begin : begin + depth]
