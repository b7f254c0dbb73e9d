"""Caches for the draft, one for each text that it has read, of so many bytes together."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from specbranch.core.excerpt import NO_GAP, Excerpt
from specbranch.proposer.recognition import Tokens, common
from specbranch.proposer.text import Text
from specbranch.runtime.kept import LEAST
from specbranch.runtime.model import CachedModel, rows_for
from specbranch.runtime.runner import Runner

GRANULE = 256  # tokens: a cache has room for the next so many, at least
SPARE = 4  # runners that are kept for texts to come, with their caches


class Slots:
    """Runners over one draft, each with a cache of its own.

    most_bytes: of all caches together. Where they would be more, those go first whose text was seen longest ago.
    """

    def __init__(self, first: Runner, most_bytes: int) -> None:
        self._first, self._most_bytes = first, most_bytes
        self._free = [first]
        self._row_bytes = 0.0  # known once there is a cache

    @property
    def model(self) -> CachedModel:
        return self._first.model

    def room_for(self, tokens: int) -> int | None:
        """How many tokens a cache is to hold for a text of so many; None where the draft's context is too small."""
        context = self.model.context
        if context is not None and tokens > context:
            return None
        room = (tokens + tokens // 4) // GRANULE * GRANULE + GRANULE
        return room if context is None else min(room, context)

    def unread(self, tokens: Tokens, excerpt: Excerpt, texts: Sequence[Text]) -> int:
        """How many tokens the draft would have to read, where other texts begin alike."""
        gap = excerpt.gap(len(tokens))
        gap = gap if self.model.may_skip(gap, len(tokens)) else NO_GAP
        source = _most_alike(tokens, texts)
        known = 0 if source is None else common(tokens[:-1], source.tokens)
        return len(tokens) - 1 - len(gap) - (min(known, gap.start) if gap else known)

    def take(self, tokens: Tokens, room: int, texts: Sequence[Text], needed: Collection[Text]) -> Runner | None:
        """A runner for a new text, whose cache begins with what another one holds of it. None where caches would be too
        many bytes and all are needed."""
        if not self.make_room(room, texts, needed):
            return None
        if (source := _most_alike(tokens, texts)) is None or source.runner is None:
            return self._fresh()
        source.keep()
        runner = self._fresh()
        with runner.device.running():
            runner.model.adopt(source.runner.model, tokens[:-1].tolist())
        source.runner.model.kept = None
        return runner

    def forget(self, text: Text, keep_runner: bool = True) -> None:
        """The draft forgets a text. keep_runner: for texts to come, with its cache, which a new one costs time."""
        runner = text.forget()
        if runner is not None and keep_runner and len(self._free) < SPARE:
            runner.model.kept = None
            runner.model.cache.restart(0)
            self._free.append(runner)

    def _fresh(self) -> Runner:
        return self._free.pop() if self._free else self._first.another()

    def make_room(self, room: int, texts: Sequence[Text], needed: Collection[Text]) -> bool:
        """Whether there may be one more cache for `room` tokens beside those of `texts`; those that are not needed may
        go."""
        held = sorted((text for text in texts if text.runner is not None), key=lambda text: text.seen)
        for text in held:
            assert text.runner is not None
            if capacity := text.runner.model.cache.capacity:
                self._row_bytes = sum(each.nbytes for each in text.runner.model.cache.buffers.tensors()) / capacity
        left = self._most_bytes - rows_for(room) * self._row_bytes
        left -= sum(self._bytes(runner) for runner in self._free)
        left -= sum(self._bytes(text.runner) for text in held)
        while left < 0 and self._free:
            left += self._bytes(self._free.pop())
        for text in held:
            if left < 0 and text not in needed:
                left += self._bytes(text.runner)
                self.forget(text, keep_runner=False)
        return left >= 0

    def _bytes(self, runner: Runner | None) -> float:
        return 0.0 if runner is None else runner.model.cache.capacity * self._row_bytes


def _most_alike(tokens: Tokens, texts: Sequence[Text]) -> Text | None:
    """The text with a cache that begins with the most tokens of another; None where they are few."""
    read = [text for text in texts if text.runner is not None and not text.failed]
    best = max(read, key=lambda text: common(tokens, text.tokens), default=None)
    return best if best is not None and common(tokens, best.tokens) >= LEAST else None
