"""How a module whose rows depend on each other is run instead, once that was found out (see probe.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils import _pytree as pytree

from specbranch.runtime.cache import TREE_ROWS
from specbranch.runtime.modes import outside_inference
from specbranch.runtime.rows.functions import ExactFunctions, is_plain
from specbranch.runtime.rows.trace import Places

Forward = Callable[..., Any]


class Route(Protocol):
    """Runs a module's forward with rows that do not depend on each other."""

    def __call__(self, forward: Forward, *args: Any, **kwargs: Any) -> Any: ...


# By module, so that every engine of a model, and whoever attaches it, runs it in the same way.
ROUTES: WeakKeyDictionary[nn.Module, Route] = WeakKeyDictionary()


class ExactForward(partial[Any]):
    """What is run instead of a module's forward while it is attached. original: the forward that somebody else had put
    in its place (accelerate's hooks), if any."""

    original: Forward | None


def own_forward(module: nn.Module) -> Forward | None:
    """The forward that somebody put in the place of the class's, attached or not; None for the class's."""
    forward = vars(module).get("forward")
    return forward.original if isinstance(forward, ExactForward) else forward


def replacement(module: nn.Module, run: Forward, *arguments: Any) -> ExactForward:
    """`run` with these arguments before the call's, in the place of a module's forward."""
    forward = ExactForward(run, *arguments)
    forward.original = own_forward(module)
    return forward


def routed_forward(module: nn.Module) -> Forward | None:
    """What to run instead of a module's own forward; None where its own will do."""
    route, foreign = ROUTES.get(module), has_foreign_weights(module)
    if route is None and not foreign:
        return None
    forward = own_forward(module) or partial(type(module).forward, module)
    if foreign:
        forward = outside_inference(forward)  # they make wrappers around views, which inference tensors do not allow
    return replacement(module, forward) if route is None else replacement(module, route, forward)


def has_foreign_weights(module: nn.Module) -> bool:
    """Whether a weight of its own is a tensor subclass: a quantised, packed or distributed one."""
    own = (*module._parameters.values(), *module._buffers.values())
    return any(weight is not None and not is_plain(weight) for weight in own)


def exact_functions(forward: Forward, *args: Any, **kwargs: Any) -> Any:
    """The route of modules that call torch's products and activations themselves."""
    with ExactFunctions():
        return forward(*args, **kwargs)


@dataclass(frozen=True)
class RowByRow:
    """The route of modules that are small. inputs, outputs: where rows lie in the arguments and in the result."""

    inputs: Places
    outputs: Places

    def __call__(self, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        rows = self._rows(leaves)
        if not 1 < rows <= TREE_ROWS:  # more are a prompt's, in the same chunks whatever the method
            return forward(*args, **kwargs)
        results: list[list[Any]] = []
        for row in range(rows):
            row_args, row_kwargs = pytree.tree_unflatten(
                [
                    leaf if place is None else leaf.narrow(place.axis, row * place.each, place.each)
                    for leaf, place in zip(leaves, self.inputs, strict=True)
                ],
                spec,
            )
            result, result_spec = pytree.tree_flatten(forward(*row_args, **row_kwargs))
            results.append(result)
        joined = [
            parts[0] if place is None else torch.cat(parts, place.axis)
            for parts, place in zip(zip(*results, strict=True), self.outputs, strict=True)
        ]
        return pytree.tree_unflatten(joined, result_spec)

    def _rows(self, leaves: Sequence[Any]) -> int:
        if len(leaves) != len(self.inputs):
            return 0
        placed = [(leaf, place) for leaf, place in zip(leaves, self.inputs, strict=True) if place is not None]
        counts = {leaf.shape[place.axis] // place.each for leaf, place in placed}
        return counts.pop() if len(counts) == 1 else 0
