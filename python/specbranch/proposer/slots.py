"""Rows of one cache for the draft's texts, as many as fit into so many bytes."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from specbranch.core.excerpt import NO_GAP, Excerpt
from specbranch.proposer.recognition import Tokens, common
from specbranch.proposer.text import Text
from specbranch.runtime.cache import BranchCache, Buffers
from specbranch.runtime.kept import LEAST
from specbranch.runtime.model import CachedModel, rows_for
from specbranch.runtime.runner import Runner

GRANULE = 256  # tokens: a text has room for the next so many, at least


class Slots:
    """Runners over one draft, each for one text, whose rows lie in the same buffers, so that texts share its steps.

    most_bytes: of the buffers. Where they are full, those texts go first that were seen longest ago. Its methods are
    called where the draft may run.
    """

    def __init__(self, first: Runner, most_bytes: int) -> None:
        self._newest, self._most_bytes = first, most_bytes
        self._buffers: Buffers | None = None

    @property
    def model(self) -> CachedModel:
        return self._newest.model

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
        """A runner for a text of at most `room` tokens, whose rows begin with what another one has of it. None where
        there are no rows for it and all texts are needed."""
        source = _most_alike(tokens, texts)
        cache = self._rows(room, [text for text in texts if text is not source], needed)
        if cache is None:
            return None
        self._newest = runner = self._newest.beside(cache)
        if source is not None and source.runner is not None:
            source.keep()
            with runner.device.running():
                runner.model.adopt(source.runner.model, tokens[:-1].tolist())
            source.runner.model.kept = None
        return runner

    def move(self, text: Text, room: int, texts: Sequence[Text], needed: Collection[Text]) -> Runner | None:
        """A runner with more room for a text that has one, and with its rows; None, and it has none any more, where
        there is no room."""
        assert text.runner is not None
        if (cache := self._rows(room, texts, needed)) is None:
            self.forget(text)
            return None
        text.keep()
        self._newest = runner = self._newest.beside(cache)
        with runner.device.running():
            runner.model.adopt(text.runner.model, text.tokens[:-1].tolist())
        self._give_back(text.runner)
        return runner

    def forget(self, text: Text) -> None:
        """The draft forgets a text."""
        if (runner := text.forget()) is not None:
            self._give_back(runner)

    def _give_back(self, runner: Runner) -> None:
        runner.model.cache.buffers.give_back(runner.model.cache)

    def _rows(self, room: int, texts: Sequence[Text], needed: Collection[Text]) -> BranchCache | None:
        """Rows for so many tokens; texts that are not needed may go for them."""
        if self._buffers is None:
            self._buffers = Buffers(self.model.layers, self._capacity(), self.model.device)
        left = sorted((text for text in texts if text.runner is not None and text not in needed), key=_seen)
        while (cache := self._buffers.take(rows_for(room))) is None:
            if not left:
                return None
            self.forget(left.pop(0))
        return cache

    def _capacity(self) -> int:
        """How many rows the bytes are, found out with one."""
        probe = self._newest.another()
        probe.reset(1)
        probe.prefill([0])
        cache = probe.model.cache
        row = sum(each.nbytes for each in cache.buffers.tensors()) / cache.buffers.capacity
        return int(self._most_bytes / row)


def _seen(text: Text) -> int:
    return text.seen


def _most_alike(tokens: Tokens, texts: Sequence[Text]) -> Text | None:
    """The text with a cache that begins with the most tokens of another; None where they are few."""
    read = [text for text in texts if text.runner is not None and not text.failed]
    best = max(read, key=lambda text: common(tokens, text.tokens), default=None)
    return best if best is not None and common(tokens, best.tokens) >= LEAST else None
