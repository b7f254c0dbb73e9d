"""Whether two functions do the same: transformers' families are made from each other, so most have the same code."""

from __future__ import annotations

import inspect
from collections.abc import Set
from functools import cache
from importlib import import_module
from types import CodeType, FunctionType
from typing import Any

METHODS = ("forward", "_norm")  # that modules compute with
NOTHING: frozenset[str] = frozenset()


def same_class(kind: Any, exemplar: str, apart_from: Set[str] = NOTHING) -> bool:
    """Whether modules of a class compute what those of an exemplar do, "llama.LlamaMLP" for one of transformers.

    apart_from: names that may stand for something else in the two modules.
    """
    other = named(exemplar)
    return other is not None and all(
        same_code(getattr(kind, method, None), getattr(other, method), apart_from)
        for method in METHODS
        if hasattr(other, method)
    )


@cache
def named(exemplar: str) -> Any:
    """A class or function of transformers, "llama.apply_rotary_pos_emb"; None where this version has none."""
    family, name = exemplar.split(".")
    try:
        return getattr(import_module(f"transformers.models.{family}.modeling_{family}"), name, None)
    except ImportError:
        return None


def same_code(function: object, other: object, apart_from: Set[str] = NOTHING) -> bool:
    """Whether two functions have the same instructions, and names in them that stand for the same.

    What variables are called makes no difference, nor do annotations and docstrings. other: of transformers; what
    somebody has put in its place is not known.
    """
    mine, others = _plain(function), _plain(other)
    if mine is None or others is None or not others.__module__.startswith("transformers."):
        return False
    return mine is others or (
        _same_instructions(mine.__code__, others.__code__)
        and mine.__code__.co_freevars == others.__code__.co_freevars == ()
        and all(
            name in apart_from or _same(mine.__globals__[name], others.__globals__.get(name), apart_from)
            for name in _names(mine.__code__)
            if name in mine.__globals__
        )
    )


@cache
def _plain(function: Any) -> FunctionType | None:
    """The function that was written, under its decorators."""
    if not isinstance(function, FunctionType):
        return None
    inner = inspect.unwrap(function)
    return inner if isinstance(inner, FunctionType) else None


def _same(value: object, other: object, apart_from: Set[str]) -> bool:
    return value is other or same_code(value, other, apart_from)


@cache
def _same_instructions(code: CodeType, other: CodeType) -> bool:
    counts = [(c.co_argcount, c.co_posonlyargcount, c.co_kwonlyargcount, c.co_flags) for c in (code, other)]
    if counts[0] != counts[1] or code.co_code != other.co_code or code.co_names != other.co_names:
        return False
    if len(code.co_consts) != len(other.co_consts):
        return False
    for place, (mine, others) in enumerate(zip(code.co_consts, other.co_consts, strict=True)):
        if isinstance(mine, CodeType) and isinstance(others, CodeType):
            if not _same_instructions(mine, others):
                return False
        elif mine != others and not (place == 0 and isinstance(mine, str | None)):  # the docstring
            return False
    return True


@cache
def _names(code: CodeType) -> set[str]:
    """All that its instructions look up by name, inner functions' too."""
    inner = (_names(each) for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*inner)
