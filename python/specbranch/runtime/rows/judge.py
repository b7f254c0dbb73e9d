"""Questions to one module whose call was recorded: does it depend on the rows beside a row, and what is to be done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import Cache

from specbranch.runtime.modes import inference
from specbranch.runtime.rows.routes import RowByRow
from specbranch.runtime.rows.trace import Call, Judged, distance

SMALL = 2**20  # bytes of weights that may be read again for every row: they stay in a core's cache
MIXED = 0.05  # of a row's norm: more than 8-bit values lose when the rows beside a row have its range
GROSS = 0.25  # the same, when their range may be another
LOUD = 30.0  # a row beside a row that much larger: outliers, to whatever looks for them

Beside = Callable[[Tensor], tuple[Tensor, Tensor]]


def permuted(row: Tensor) -> tuple[Tensor, Tensor]:
    values = row.reshape(-1)
    return values.flip(0).view(row.shape), values.roll(1).view(row.shape)


def loud(row: Tensor) -> tuple[Tensor, Tensor]:
    before, behind = permuted(row)
    return LOUD * before, -LOUD * behind


def mixes(module: nn.Module, judged: Judged) -> bool:
    """Whether a row's values, and not only their rounding, come from other rows too.

    It is run between two permutations of itself: a layer that quantises by the range of the call then does as it does
    for the row alone, and one that mixes rows does not. Where it cannot be run by itself, the size of the error counts.
    """
    error = error_among(module, judged, permuted, 3)
    return judged.error > GROSS if error is None else error > MIXED


@inference
def error_among(module: nn.Module, judged: Judged, beside: Beside, rows: int) -> float | None:
    """How far off a recorded row is as the second of so many, the others being made of it; None where that cannot be
    asked of the module."""
    call = judged.call
    if call is None or in_context(call):
        return None
    leaves: list[Any] = []
    for leaf, where in zip(call.inputs, judged.inputs, strict=True):
        if where is not None:
            row = leaf.narrow(where.axis, 0, where.each)
            before, behind = beside(row) if row.is_floating_point() else (row, row)
            leaf = torch.cat([before, row, *[behind] * (rows - 2)], where.axis)
        leaves.append(leaf)
    args, kwargs = pytree.tree_unflatten(leaves, call.spec)
    try:
        results = pytree.tree_leaves(module(*args, **kwargs))
    except Exception:  # whatever its code raises for rows that it was not made for
        return None
    errors = [0.0]
    for alone, among, where in zip(call.outputs, results, judged.outputs, strict=True):
        if where is not None and alone.is_floating_point():
            pair = (alone.narrow(where.axis, 0, where.each), among.narrow(where.axis, where.each, where.each))
            errors.append(distance(*pair))
    return max(errors)


def row_by_row(judged: Judged) -> RowByRow | None:
    """The route, or None where a call is more than a function of its rows."""
    call = judged.call
    if call is None or in_context(call):
        return None
    if any(
        isinstance(leaf, Tensor) and where is None for leaf, where in zip(call.outputs, judged.outputs, strict=True)
    ):
        return None
    return RowByRow(judged.inputs, judged.outputs)


def in_context(call: Call) -> bool:
    """Whether attention is asked within it, which knows the tree of a whole forward: it is given the cache."""
    return any(isinstance(leaf, Cache) for leaf in call.inputs)


def is_small(module: nn.Module) -> bool:
    """Whether the weights that are read again for every row are few."""
    weights: list[Any] = [*module.parameters(), *module.buffers()]
    if not weights:  # torch packs those of its quantised modules
        weights = pytree.tree_leaves(dict(module.state_dict()))
    return sum(size(weight) for weight in weights if isinstance(weight, Tensor)) <= SMALL


def size(weight: Tensor) -> int:
    """Bytes, those that a subclass has within it."""
    if hasattr(weight, "__tensor_flatten__"):
        names, _ = weight.__tensor_flatten__()
        return sum(size(getattr(weight, name)) for name in names)
    return weight.numel() * weight.element_size()
