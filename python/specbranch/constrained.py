"""One text under a constraint: what may follow at the nodes of its tree, each asked for once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock

from specbranch.core.errors import SpecBranchError
from specbranch.stages import Matcher

HANDFUL = 4  # tokens that may all stand in a tree without a draft
DEAD_END = "constraint: no token may follow the text; expected a grammar that the tokenizer can spell"


@dataclass(eq=False, slots=True)
class _Place:
    """Behind some tokens.

    can: False behind a token that cannot stand, or that ends the text. few: the tokens that may follow where they are a
    handful, else None, and none at a dead end; `asked` once that is known. mask: once it was wanted.
    """

    can: bool = True
    asked: bool = False
    few: list[int] | None = None
    mask: bytes | None = None
    below: dict[int, _Place] = field(default_factory=dict)


class Constrained:
    """What may follow the committed text, and tokens behind it.

    Masks have a bit for each token of the target's vocabulary: int32 words, as the ops take them. `path`: tokens behind
    the committed text. Behind a token that cannot stand, which no target takes, all are allowed; and so at a dead end,
    which is an error once the text itself comes there.

    The draft and the target ask from threads of their own.
    """

    def __init__(self, matcher: Matcher, vocabulary: int, eos: frozenset[int], forces: bool = True) -> None:
        """vocabulary: the target's. eos: tokens that end the text. forces: whether tokens that must follow are to be
        drafted."""
        self.eos, self.forces = eos, forces
        self._matcher, self._lock = matcher, Lock()
        self._root = _Place()
        self._size = 4 * ((vocabulary + 31) // 32)
        self._all = b"\xff" * self._size
        self._followed: dict[tuple[int, ...], dict[int, int]] = {}  # by a handful: how often each token came

    def allowed(self, path: Sequence[int]) -> bytes:
        """The mask behind a path. Raises SpecBranchError where the text itself is at a dead end."""
        with self._lock:
            place = self._find(path)
            if not place.can:
                return self._all
            if self._few(place, path) != []:
                return self._mask(place, path)
            if path:
                return self._all
            raise self._dead_end()

    def forced(self, path: Sequence[int]) -> list[int]:
        """The tokens that must follow a path, one behind the other; none where there is a choice."""
        with self._lock:
            place, run = self._find(path), list[int]()
            while place.can:
                if not place.asked:
                    self._force(place, self._ask_forced([*path, *run]))
                few = self._few(place, [*path, *run])
                if few is None or len(few) != 1:
                    break
                run += few
                place = _below(place, few[0], self.eos)
            return run

    def possible(
        self, path: Sequence[int], tokens: Sequence[int], parents: Sequence[int], chances: Sequence[float], least: float
    ) -> list[float]:
        """Chances of a trie of tokens behind a path: 0 for one that cannot stand, 1 for one that must. parents: as in
        Continuations. Where a token and those above it have less than `least` together, it is not looked at."""
        with self._lock:
            top = self._find(path)
            places, reaches, found = list[_Place](), list[float](), list[float]()
            behind = list[list[int]]()
            for token, parent, chance in zip(tokens, parents, chances, strict=True):
                place, reach = (top, 1.0) if parent < 0 else (places[parent], reaches[parent])
                above = list(path) if parent < 0 else behind[parent]
                if reach * chance >= least and place.can and self._has(place, above, token):
                    if place.few == [token]:
                        chance = 1.0
                else:
                    chance = 0.0
                places.append(_below(place, token, self.eos) if chance else _Place(can=False))
                reaches.append(reach * chance)
                behind.append([*above, token])
                found.append(chance)
            return found

    def few(self, path: Sequence[int]) -> list[tuple[int, float]]:
        """The tokens that may follow a path, where they are a handful, likeliest first; and the chance of each, by what
        came so far where there was the same choice."""
        with self._lock:
            place = self._find(path)
            few = (place.can and self._few(place, path)) or []
            counts = self._followed.get(tuple(few), {})
            total = sum(counts.values()) + len(few)
            return sorted(((token, (counts.get(token, 0) + 1) / total) for token in few), key=lambda each: -each[1])

    def accept(self, tokens: Sequence[int]) -> None:
        """These are committed; nothing counts behind one that ends the text. Raises SpecBranchError for one that is not
        allowed."""
        with self._lock:
            for token in tokens:
                root = self._root
                if not root.can:
                    break
                if self._few(root, []) == []:
                    raise self._dead_end()
                if not self._has(root, [], token):
                    raise SpecBranchError(f"constraint: the text went on with token {token}, which is not allowed")
                if root.few is not None and len(root.few) > 1:
                    counts = self._followed.setdefault(tuple(root.few), {})
                    counts[token] = counts.get(token, 0) + 1
                self._root = _below(root, token, self.eos)
                self._matcher.accept([token])

    # ---- With the lock held

    def _find(self, path: Sequence[int]) -> _Place:
        place = self._root
        for depth, token in enumerate(path):
            if token not in place.below and place.can and not self._has(place, path[:depth], token):
                place.below[token] = _Place(can=False)
            place = _below(place, token, self.eos)
        return place

    def _has(self, place: _Place, path: Sequence[int], token: int) -> bool:
        few = self._few(place, path)
        return token in few if few is not None else has(self._mask(place, path), token)

    def _few(self, place: _Place, path: Sequence[int]) -> list[int] | None:
        if not place.asked:
            mask = place.mask = self._ask(path)
            place.asked, place.few = True, tokens_of(mask, HANDFUL)
        return place.few

    def _ask(self, path: Sequence[int]) -> bytes:
        """A path may lead to a dead end, as long as the text does not."""
        try:
            mask = self._matcher.allowed(path)
        except SpecBranchError:
            if not path:
                raise
            return b""
        if len(mask) != self._size:
            raise SpecBranchError(f"constraint: a mask has {len(mask)} bytes; expected {self._size}")
        return mask

    def _ask_forced(self, path: Sequence[int]) -> list[int]:
        try:
            return self._matcher.forced(path)
        except SpecBranchError:
            return []

    def _dead_end(self) -> SpecBranchError:
        """In the matcher's words, if it has some."""
        try:
            self._matcher.allowed([])
        except SpecBranchError as error:
            return error
        return SpecBranchError(DEAD_END)

    def _mask(self, place: _Place, path: Sequence[int]) -> bytes:
        few = self._few(place, path)
        if place.mask is None:
            assert few is not None
            place.mask = (1 << few[0]).to_bytes(self._size, "little")
        return place.mask

    def _force(self, place: _Place, tokens: Sequence[int]) -> None:
        """Note that these must follow, so that no masks are asked for."""
        for token in tokens:
            if place.asked or not place.can:
                break
            place.asked, place.few = True, [token]
            place = _below(place, token, self.eos)


def _below(place: _Place, token: int, eos: frozenset[int]) -> _Place:
    found = place.below.get(token)
    if found is None:
        found = place.below[token] = _Place(can=place.can and token not in eos)
    return found


def has(mask: bytes, token: int) -> bool:
    """Whether the token's bit is set."""
    return 0 <= token < 8 * len(mask) and bool(mask[token >> 3] >> (token & 7) & 1)


def tokens_of(mask: bytes, most: int) -> list[int] | None:
    """The tokens whose bits are set, in order; None for more than so many."""
    found: list[int] = []
    rest = mask.lstrip(b"\0")
    while rest:
        first = 8 * (len(mask) - len(rest))
        found += [first + bit for bit in range(8) if rest[0] >> bit & 1]
        if len(found) > most:
            return None
        rest = rest[1:].lstrip(b"\0")
    return found
