"""What a forward calls the cache that it is given: `cache` since transformers 5.24, where the old name warns."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

NAMES = ("past_key_values", "cache")


def cache_argument(kind: type, method: str = "forward") -> str:
    """One of NAMES, by the signature of a class's method: a checkpoint may come with code for another transformers.

    Where it takes anything, by that of the class below; where none says, the old name, which everybody takes.
    """
    return _named(kind, method)


@cache
def _named(kind: Any, method: str) -> str:
    for each in kind.__mro__:
        if (function := vars(each).get(method)) is not None:
            named = inspect.signature(function).parameters
            if found := next((name for name in NAMES if name in named), None):
                return found
    return NAMES[0]
