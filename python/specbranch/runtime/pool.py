"""Slots of texts that are decoded together: their rows lie in shared buffers of a fixed size."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import ref

from specbranch.core.errors import SpecBranchError
from specbranch.runtime.cache import BranchCache, Buffers
from specbranch.runtime.hrad.tap import FeatureTap
from specbranch.runtime.kept import LEAST
from specbranch.runtime.model import rows_for
from specbranch.runtime.pair import Pair, Slot
from specbranch.runtime.runner import Runner


class Alone:
    """One text after the other, in the pair's own slots. rows: see Pool."""

    tap: FeatureTap | None = None

    def __init__(self, pair: Pair, rows: int) -> None:
        self._pair, self._rows = pair, rows

    def check(self, tokens: int) -> None:
        """See Pool."""
        check_room(self._pair.target, tokens, self._rows)

    def take(self, owner: object, text: Sequence[int], tokens: int) -> Slot | None:
        return self._pair.take(owner, text)

    def give_back(self, slot: Slot) -> None:
        self._pair.give_back(slot)


class Pool:
    """Used by one thread.

    rows: of each model's buffers, for texts and their trees; memory is taken as it is written to. prompt_cache: how
    many texts that are over keep their rows, for texts that begin alike, while nobody else needs them. tap: of the
    target's features, where they are read.
    """

    def __init__(self, like: Slot, rows: int, prompt_cache: int = 0) -> None:
        """like: a slot of the pair."""
        self.rows, self.prompt_cache = rows, prompt_cache
        self._runners = [like.target] if like.draft is None else [like.target, like.draft]
        self._buffers = [Buffers(runner.model.layers, rows + 1, runner.model.device) for runner in self._runners]
        self._slots: list[Slot] = []
        self._takes = 0
        self.tap: FeatureTap | None = None

    def check(self, tokens: int) -> None:
        """Raises SpecBranchError for a text that the target's context, or the buffers, can never hold."""
        check_room(self._runners[0], tokens, self.rows)

    def take(self, owner: object, text: Sequence[int], tokens: int) -> Slot | None:
        """A slot for a text of at most `tokens` tokens that begins with `text`, until it is given back; it keeps what
        any free one keeps of that. None while others have the room."""
        for slot in self._free():
            slot.forget_stale()
        known = {slot: slot.target.model.known(text) for slot in self._free()}
        source = max(known, key=known.__getitem__, default=None)
        if source is not None and known[source] < LEAST:
            source = None
        if source is not None and _goes_on(source, known[source], tokens):
            slot = source
        elif (found := self._new(rows_for(tokens), text, source)) is not None:
            slot = found
        else:
            return None
        self._takes += 1
        slot.used, slot._owner = self._takes, ref(owner)
        return slot

    def give_back(self, slot: Slot) -> None:
        """The slot is free again; while others need no room it keeps the text that is over, if it is to."""
        slot._owner = None
        free = self._free()
        for other in free[: max(0, len(free) - self.prompt_cache)]:
            self._drop(other)
        if slot in self._slots and not slot.keeps:
            self._drop(slot)

    def _free(self) -> list[Slot]:
        """Those of texts that are over, the one that was used longest ago first."""
        return sorted((slot for slot in self._slots if slot.free), key=lambda slot: (slot.keeps > 0, slot.used))

    def _new(self, rows: int, text: Sequence[int], source: Slot | None) -> Slot | None:
        """A slot of so many rows, with what `source` keeps of the text if there is room for both. Free ones may go."""
        while (caches := self._rows(rows)) is None:
            free = self._free()
            others = [slot for slot in free if slot is not source]
            if not free:
                return None
            dropped = others[0] if others else free[0]
            source = None if dropped is source else source
            self._drop(dropped)
        # From the newest: what runners over the same buffers share, they have from each other.
        self._runners = [runner.beside(cache) for runner, cache in zip(self._runners, caches, strict=True)]
        target, *draft = self._runners
        slot = Slot(target, draft[0] if draft else None, self.tap)
        if source is not None:
            slot.adopt(source, text)
        self._slots.append(slot)
        return slot

    def _rows(self, rows: int) -> list[BranchCache] | None:
        taken: list[BranchCache] = []
        for buffers in self._buffers:
            if (cache := buffers.take(rows)) is None:
                for other, theirs in zip(taken, self._buffers, strict=False):
                    theirs.give_back(other)
                return None
            taken.append(cache)
        return taken

    def _drop(self, slot: Slot) -> None:
        self._slots.remove(slot)
        runners: list[Runner | None] = [slot.target, slot.draft]
        for runner in runners:
            if runner is not None:
                runner.model.cache.buffers.give_back(runner.model.cache)


def check_room(target: Runner, tokens: int, rows: int) -> None:
    target.model.check(tokens)
    if rows_for(tokens) > rows:
        raise SpecBranchError(
            f"prompt and new tokens together are {tokens} tokens, {rows_for(tokens)} rows with a tree; the cache for "
            f"texts that are decoded together has {rows}"
        )


def _goes_on(slot: Slot, known: int, tokens: int) -> bool:
    """Whether a text of so many tokens can take the slot as it is; known: how many of them it keeps."""
    kept = slot.target.model.kept
    return kept is not None and kept.is_continued(known) and slot.target.model.holds(tokens)
