"""A differential trace: one forward recorded call by call, and another, with more rows, compared with it.

The row that both have must come to the same bits in every module. Where it does not, the recorded values take its
place, so that what follows starts from equal values again, and one forward finds every module at fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Forward = Callable[..., Any]
Keepers = Iterator[tuple[nn.Module, Callable[[Forward], Forward]]]


class Place(NamedTuple):
    """Where rows lie in a tensor: along this axis, so many entries each."""

    axis: int
    each: int


Places = tuple[Place | None, ...]  # of the leaves of (args, kwargs), or of a result; None for what has no rows


@dataclass
class Call:
    """Copies of what a module was given and of what it gave: the leaves of (args, kwargs) and of the result."""

    inputs: list[Any]
    spec: pytree.TreeSpec
    outputs: list[Any] = field(default_factory=list)


@dataclass
class Judged:
    """A module's first call, compared. call: the recorded one, None where it could not be compared. inputs, outputs:
    where rows lie. error: how far off its row was at most, over the row's norm."""

    call: Call | None
    inputs: Places = ()
    outputs: Places = ()
    error: float = 0.0


class Recording:
    """The calls of a forward of `rows` rows, by module and by how often it had been called before."""

    def __init__(self, model: nn.Module, rows: int) -> None:
        self.model, self.rows = model, rows
        self.calls: dict[tuple[nn.Module, int], Call] = {}
        self.running: list[nn.Module] = []
        self._counts: Counter[nn.Module] = Counter()

    def keepers(self) -> Keepers:
        """See attach.Tap."""
        return around(self.model, self._before, self._after)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        self.calls[module, self._counts[module]] = Call(copied(leaves), spec)
        self.running.append(module)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        self.calls[module, self._counts[module]].outputs = copied(pytree.tree_leaves(result))
        self._counts[module] += 1
        self.running.pop()


class Running(NamedTuple):
    """A module's call in progress. rows: how many it has, those at `copies` being the recorded one."""

    module: nn.Module
    call: Call | None
    inputs: Places
    rows: int
    copies: Sequence[int]


class Comparison:
    """A forward of `rows` rows, of which those at `copies` are the recording's first, compared with it."""

    def __init__(self, recording: Recording, rows: int, copies: Sequence[int]) -> None:
        self.recording, self.rows, self.copies = recording, rows, copies
        self.culprits: dict[nn.Module, Judged] = {}
        self.judged: dict[nn.Module, Judged] = {}
        self._running: list[Running] = []
        self._counts: Counter[nn.Module] = Counter()

    def keepers(self) -> Keepers:
        """See attach.Tap."""
        return around(self.recording.model, self._before, self._after)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        call = self.recording.calls.get((module, self._counts[module]))
        if call is None or len(call.inputs) != len(leaves):
            self._running.append(Running(module, None, (), 0, ()))
            return None
        rows, copies = self.rows, self.copies
        places = self._places(call.inputs, leaves, rows)
        if not any(places):
            rows, copies = picked(call.inputs, leaves)
            places = self._places(call.inputs, leaves, rows)
        difference = restore(call.inputs, leaves, places, copies)
        if difference is not None and difference.error and self._running:
            self._blame(self._running[-1].module, Judged(None), difference.error)
        moved = difference is not None and difference.moved
        self._running.append(Running(module, call if copies and not moved else None, places, rows, copies))
        return None if difference is None or moved else pytree.tree_unflatten(leaves, spec)

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        _, call, inputs, rows, copies = self._running.pop()
        self._counts[module] += 1
        leaves, spec = pytree.tree_flatten(result)
        if call is None or len(leaves) != len(call.outputs):
            return None
        outputs = self._places(call.outputs, leaves, rows)
        judged = self.judged.setdefault(module, Judged(call, inputs, outputs))
        difference = restore(call.outputs, leaves, outputs, copies)
        if difference is None:
            return None
        if not difference.moved:
            self._blame(module, judged, difference.error)
            return pytree.tree_unflatten(leaves, spec)
        if difference.error:
            self._blame(module, Judged(None), difference.error)
        return None

    def _places(self, alone: Sequence[Any], together: Sequence[Any], rows: int) -> Places:
        return tuple(place(a, b, self.recording.rows, rows) for a, b in zip(alone, together, strict=True))

    def _blame(self, module: nn.Module, judged: Judged, error: float) -> None:
        known = self.culprits.setdefault(module, judged)
        known.error = max(known.error, error)


def around(model: nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> Keepers:
    """Every module, with what calls `before` and `after` its forward; each may give other arguments, or another
    result."""

    def run(module: nn.Module, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        given = before(module, args, kwargs)
        args, kwargs = given or (args, kwargs)
        result = forward(*args, **kwargs)
        other = after(module, args, kwargs, result)
        return result if other is None else other

    for module in model.modules():
        yield module, partial(partial, run, module)


def copied(leaves: Sequence[Any]) -> list[Any]:
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def place(alone: Any, together: Any, rows_alone: int, rows: int) -> Place | None:
    """Where rows lie in what two calls of another number of rows were given; with the same number, along the first axis
    of that length."""
    if not isinstance(alone, Tensor) or not isinstance(together, Tensor) or alone.dim() != together.dim():
        return None
    sizes = list(zip(alone.shape, together.shape, strict=True))
    if rows == rows_alone:
        axes = [axis for axis, (a, b) in enumerate(sizes) if a == b == rows][:1]
    else:
        axes = [axis for axis, (a, b) in enumerate(sizes) if a != b]
    if len(axes) != 1:
        return None
    each, rest = divmod(alone.shape[axes[0]], rows_alone)
    if rest or each * rows != together.shape[axes[0]]:
        return None
    return Place(axes[0], each)


def picked(alone: Sequence[Any], together: Sequence[Any]) -> tuple[int, Sequence[int]]:
    """How many rows a module was given that gets only some of them (an expert), and which are the recorded one."""
    pairs = [(a, b) for a, b in zip(alone, together, strict=True) if isinstance(a, Tensor) and isinstance(b, Tensor)]
    if len(pairs) != 1 or pairs[0][0].dim() != 2 or len(pairs[0][0]) != 1 or len(pairs[0][1]) < 2:
        return 0, ()
    row, rows = pairs[0]
    return len(rows), [i for i in range(len(rows)) if same(row[0], rows[i])]


class Difference(NamedTuple):
    """error: how far off the copies of a row were, over its norm. moved: its entries lie elsewhere, sorted perhaps."""

    error: float
    moved: bool


def restore(recorded: Sequence[Any], leaves: list[Any], places: Places, copies: Sequence[int]) -> Difference | None:
    """Give the copies of the recorded row its bits, unless its entries were moved. Returns None if they had them.

    Integers (token ids, positions, the places of a sort) follow the values: they are not judged.
    """
    placed = [(index, where) for index, where in enumerate(places) if where is not None]
    rows = {index: recorded[index].narrow(where.axis, 0, where.each) for index, where in placed}

    def found(index: int, where: Place) -> list[Tensor]:
        return [leaves[index].narrow(where.axis, copy * where.each, where.each) for copy in copies]

    wrong = [
        (index, where)
        for index, where in placed
        if rows[index].is_floating_point() and not all(same(rows[index], copy) for copy in found(index, where))
    ]
    if not wrong:
        return None
    error = max(distance(rows[index], copy) for index, where in wrong for copy in found(index, where))
    elsewhere = max(distance_elsewhere(rows[index], leaves[index], where.axis, len(copies)) for index, where in wrong)
    if elsewhere < error:
        return Difference(elsewhere, moved=True)
    for index, where in placed:
        leaves[index] = leaves[index].clone()
        for copy in found(index, where):
            copy.copy_(rows[index])
    return Difference(error, moved=False)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, where NaN equals NaN."""
    return bool(torch.equal(a, b)) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def distance(right: Tensor, other: Tensor) -> float:
    """Norm of the difference over the norm."""
    finite = right.isfinite() & other.isfinite()
    a, b = (torch.where(finite, values, 0).double() for values in (right, other))
    scale = float(a.norm())
    return float((a - b).norm()) / scale if scale else float((a - b).norm() > 0)


def distance_elsewhere(row: Tensor, among: Tensor, axis: int, copies: int) -> float:
    """The same from each entry of the row to the nearest ones, as many as there are copies, wherever they lie; the
    largest of all."""
    entries, others = (values.movedim(axis, 0).reshape(values.shape[axis], -1) for values in (row, among))
    return max(sorted(distance(entry, other) for other in others)[copies - 1] for entry in entries)
