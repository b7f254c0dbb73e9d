"""torch's modes, and the context of a forward, as blocks that an interrupt cannot leave in force: see `locks`.

torch's own context managers are written in Python: an interrupt behind the call that turns a mode on, and before the
block begins, leaves it on. Here the block begins first, and what ends it is one call into C.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, copy_context
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
V = TypeVar("V")


def inference(function: Callable[P, T]) -> Callable[P, T]:
    """`torch.inference_mode()` as a decorator."""
    return wraps(function)(lambda *args, **kwargs: _inference(True, function, *args, **kwargs))


def outside_inference(function: Callable[P, T]) -> Callable[P, T]:
    """`torch.inference_mode(False)`, still without gradients, as a decorator."""
    within = no_grad(function)  # inside: the mode's end turns gradients on
    return wraps(function)(lambda *args, **kwargs: _inference(False, within, *args, **kwargs))


def no_grad(function: Callable[P, T]) -> Callable[P, T]:
    """`torch.no_grad()` as a decorator."""

    @wraps(function)
    def without(*args: P.args, **kwargs: P.kwargs) -> T:
        before = torch.is_grad_enabled()
        try:
            torch._C._set_grad_enabled(False)
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return without


def _inference(on: bool, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    mode = torch._C._InferenceMode(on)
    try:
        mode.__enter__()
        return function(*args, **kwargs)
    finally:
        mode.__exit__(None, None, None)


def with_value(variable: ContextVar[V], value: V, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What a function returns while a context variable has a value."""

    def within() -> T:
        variable.set(value)
        return function(*args, **kwargs)

    return copy_context().run(within)
