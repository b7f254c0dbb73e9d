"""The branch cache: one preallocated K/V buffer per layer; of each text in it the committed prefix first, then the rows
of tree nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from specbranch.core.errors import SpecBranchError
from specbranch.core.tree import MOST_NODES
from specbranch.runtime.modes import inference
from specbranch_ext import kv_commit

MAX_BACKLOG = 16  # rows for text that is caught up with in the same forward
TREE_ROWS = MOST_NODES + MAX_BACKLOG  # kept free behind the text


class BranchLayer(CacheLayerMixin):
    """One layer's buffers, `[1, kv_heads, capacity, head_dim]`, written at the rows that the owner names.

    Sliding-window layers keep all rows too (the window is applied in the attention), so that rollback is exact.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, owner: Buffers) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner = owner

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = self._buffer(key_states)
        self.values = self._buffer(key_states if value_states is None else value_states)
        self.is_initialized = True

    def _buffer(self, states: torch.Tensor) -> torch.Tensor:
        batch, heads, _, width = states.shape
        if batch != 1:
            raise SpecBranchError(f"the branch cache takes texts as rows of one batch; got a batch of {batch}")
        return states.new_empty(1, heads, self.owner.capacity, width)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `[1, kv_heads, n, head_dim]` at the owner's rows; return the whole buffers (the mask selects)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        rows = self.owner.rows_on(key_states.device)
        self.keys.index_copy_(2, rows, key_states)
        self.values.index_copy_(2, rows, value_states)
        return self.keys, self.values

    def buffers(self, like: torch.Tensor, heads: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[kv_heads, capacity, head_dim]`, to write to. like: of the dtype, on the device."""
        if not self.is_initialized:
            self.lazy_initialization(like.new_empty(1, heads, 0, width))
        assert self.keys is not None
        assert self.values is not None
        return self.keys[0], self.values[0]

    def get_seq_length(self) -> int:
        return self.owner.length

    def get_max_length(self) -> int:
        return self.owner.capacity

    get_max_cache_shape = get_max_length  # the name of 5.17

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.length + query_length, 0

    def reset(self) -> None:
        self.owner.length = 0


class Buffers(Cache):
    """All layers' keys and values, of one text or of several that have rows of their own.

    capacity: rows of each buffer. rows: int64 [n], where the forward in progress writes. length: committed rows of the
    text that it is for, if it is for one. Of several texts each gets its rows by `take`.
    """

    def __init__(self, layers: int, capacity: int, device: torch.device | str = "cpu") -> None:
        self.capacity = capacity
        self.length = 0
        self.rows = torch.empty(0, dtype=torch.int64, device=device)
        self.branch_layers = [BranchLayer(self) for _ in range(layers)]
        self._taken: list[BranchCache] = []  # in the order of their rows
        super().__init__(layers=list(self.branch_layers))

    def rows_on(self, device: torch.device) -> torch.Tensor:
        """`rows` on a layer's device: a model may be spread over several."""
        return self.rows if self.rows.device == device else self.rows.to(device, non_blocking=True)

    def take(self, rows: int) -> BranchCache | None:
        """Rows for one more text; None where there is no room between the others. The very last row stays nobody's:
        what pads a captured batch is written there."""
        start = 0
        for place, other in enumerate([*self._taken, None]):
            end = self.capacity - 1 if other is None else other.start
            if end - start >= rows:
                self._taken.insert(place, BranchCache(self, start, rows))
                return self._taken[place]
            start = end if other is None else other.start + other.capacity
        return None

    def give_back(self, cache: BranchCache) -> None:
        """Its rows are free for other texts."""
        self._taken.remove(cache)

    def release(self) -> None:
        """Free the memory now: buffers and layers refer to each other, so Python would take its time."""
        for layer in self.branch_layers:
            layer.keys = layer.values = None
            layer.is_initialized = False
        self.capacity = 0

    def tensors(self) -> list[torch.Tensor]:
        """Keys and values of every layer that has been written to, [Hkv, capacity, D]."""
        both = [buffer for layer in self.branch_layers for buffer in (layer.keys, layer.values)]
        return [buffer[0] for buffer in both if buffer is not None]


class BranchCache:
    """One text's rows of the buffers, with the row of every tree node.

    start: the first one. capacity: how many. length: committed ones, from the first on; this and all that follows
    counts from there. nodes: the tree node in each row behind them, so node nodes[j] sits at row length + j. ancestors:
    of each one, bit j set where it is, or is below, nodes[j].
    """

    def __init__(self, buffers: Buffers, start: int, capacity: int) -> None:
        self.buffers, self.start, self.capacity = buffers, start, capacity
        self.length = 0
        self.nodes: list[int] = []
        self.ancestors: list[int] = []

    @staticmethod
    def alone(layers: int, capacity: int, device: torch.device | str = "cpu") -> BranchCache:
        """A text with buffers of its own."""
        return BranchCache(Buffers(layers, capacity + 1, device), 0, capacity)

    @property
    def used(self) -> int:
        return self.length + len(self.nodes)

    @property
    def room(self) -> int:
        """Rows that are still free."""
        return self.capacity - self.used

    @property
    def tree_room(self) -> int:
        """Tree nodes that there may still be before the next commit."""
        return min(self.room, MOST_NODES - len(self.nodes))

    def reserve(self, count: int) -> None:
        """Raise SpecBranchError when there are no `count` free rows."""
        if count > self.room:
            raise SpecBranchError(
                f"the cache has {self.capacity} rows and {self.used} are in use: no room for {count} more"
            )

    def add(self, nodes: Sequence[int], parents: Sequence[int]) -> None:
        """Give tree nodes the next free rows. parents: the node above each, which has a row already or stands earlier
        in `nodes`; -1, or a committed node, for a root."""
        place = {node: i for i, node in enumerate([*self.nodes, *nodes])}
        self.nodes += nodes
        for parent in parents:
            above = place.get(parent, -1)
            self.ancestors.append((self.ancestors[above] if above >= 0 else 0) | 1 << len(self.ancestors))

    def commit(self, path: Sequence[int], survivors: Mapping[int, int] | None = None) -> None:
        """Move the rows of the accepted `path` behind the prefix, keep those of `survivors`, drop the others.

        path: tree nodes from the root down; those that have no row (the model never ran over them) are skipped,
        and may only stand at the end. survivors: old index to new index of the nodes that live on.
        """
        start = self.length
        self.move(self.accept(path, survivors or {}), start)

    @inference  # the buffers are inference tensors: they were made in a forward
    def move(self, rows: Sequence[int], start: int) -> None:
        """Move rows, in order, to `start` and behind it."""
        if rows:
            for device, tensors in groupby(self.buffers.tensors(), key=lambda tensor: tensor.device):
                moved = torch.tensor([self.start + row for row in rows], device=device)
                kv_commit(list(tensors), moved, self.start + start)

    def accept(self, path: Sequence[int], survivors: Mapping[int, int]) -> list[int]:
        """Take note of a commit; return the rows that must move behind the prefix, in order, none if they are in place.

        Whoever calls it moves them.
        """
        row_of = {node: row for row, node in enumerate(self.nodes, self.length)}
        accepted = [row_of[node] for node in path if node in row_of]
        living = [place for place, node in enumerate(self.nodes) if node in survivors]
        rows = [*accepted, *(self.length + place for place in living)]
        in_place = rows == list(range(self.length, self.length + len(rows)))
        self.length += len(accepted)
        # Of the rows above a node, its parent's is the last.
        above = [(self.ancestors[place] ^ 1 << place).bit_length() - 1 for place in living]
        nodes = [survivors[self.nodes[place]] for place in living]
        parents = [survivors.get(self.nodes[place], -1) if place >= 0 else -1 for place in above]
        self.nodes, self.ancestors = [], []
        self.add(nodes, parents)
        return [] if in_place else rows

    def rollback(self, length: int) -> None:
        """Drop all tree rows and the committed rows from `length` on: no bytes move."""
        if not 0 <= length <= self.length:
            raise SpecBranchError(f"cannot roll back to {length} rows: {self.length} are committed")
        self.length, self.nodes, self.ancestors = length, [], []

    @inference
    def adopt(self, other: BranchCache, rows: int, release: bool = False) -> None:
        """Begin with the first rows of another text. release: free its buffers, layer by layer."""
        here, there = slice(self.start, self.start + rows), slice(other.start, other.start + rows)
        for mine, theirs in zip(self.buffers.branch_layers, other.buffers.branch_layers, strict=True):
            if theirs.keys is None or theirs.values is None:
                continue
            if not mine.is_initialized:
                mine.lazy_initialization(theirs.keys, theirs.values)
            assert mine.keys is not None
            assert mine.values is not None
            mine.keys[:, :, here] = theirs.keys[:, :, there]
            mine.values[:, :, here] = theirs.values[:, :, there]
            if release:
                theirs.keys = theirs.values = None
        self.restart(rows)

    def restart(self, rows: int) -> None:
        """Begin with the first rows of what is there."""
        self.length, self.nodes, self.ancestors = rows, [], []

    @property
    def is_shared(self) -> bool:
        """Whether other texts have rows in the buffers, or may get some."""
        return self in self.buffers._taken

    def release(self) -> None:
        """Free the buffers, which are this text's alone."""
        assert not self.is_shared
        self.buffers.release()
        self.capacity = 0
        self.restart(0)
