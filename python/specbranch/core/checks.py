"""Values that a caller gives: taken as what they mean, or refused by name."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

from specbranch.core.errors import SpecBranchError


def whole(name: str, value: object, *, least: float | None = None, most: float | None = None) -> int:
    """An integer. A float without a fraction counts as one, since JSON and YAML write 5 as 5.0 at times, and so do
    scalars of numpy and torch; True and text do not. Raises SpecBranchError."""
    found = None if _is_bool(value) else _attempt(operator.index, value)
    if found is None and (real := _real(value)) is not None and real.is_integer():
        found = int(real)
    if found is None:
        raise SpecBranchError(f"{name} is {shown(value)}; expected an integer")
    return int(_in_range(name, found, least, most))


def count(name: str, value: object) -> int | None:
    """A positive integer, or None. Raises SpecBranchError."""
    return None if value is None else whole(name, value, least=1)


def number(name: str, value: object, *, least: float | None = None, most: float | None = None) -> float:
    """A finite number; as for `whole`, neither True nor text. Raises SpecBranchError."""
    found = _real(value)
    if found is None:
        raise SpecBranchError(f"{name} is {shown(value)}; expected a number")
    found = _in_range(name, found, least, most)
    if not math.isfinite(found):
        raise SpecBranchError(f"{name} is {found}; expected a finite number")
    return found


def flag(name: str, value: object) -> bool:
    """True or False, nothing else. Raises SpecBranchError."""
    found: bool | None = _attempt(bool, value) if _is_bool(value) else None
    if found is None:
        raise SpecBranchError(f"{name} is {shown(value)}; expected True or False")
    return found


def choice(name: str, value: object, choices: Sequence[str]) -> str:
    """One of some names. Raises SpecBranchError."""
    if not isinstance(value, str) or value not in choices:
        raise SpecBranchError(f"{name} is {shown(value)}; expected one of {', '.join(choices)}")
    return value


def shown(value: object, longest: int = 60) -> str:
    """A value in a message: on one line, and not all of a long one."""
    text = " ".join(repr(value).split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _in_range(name: str, value: float, least: float | None, most: float | None) -> float:
    if (least is None or value >= least) and (most is None or value <= most):
        return value
    low = "" if least is None else f"{least} <= "
    high = "" if most is None else f" <= {most}"
    raise SpecBranchError(f"{name} is {value}; expected {low}{name}{high}")


def _is_bool(value: object) -> bool:
    """Those of numpy and torch too."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")


def _real(value: object) -> float | None:
    """The number that a value is; None for text, and for True."""
    return None if _is_bool(value) or isinstance(value, (str, bytes, bytearray)) else _attempt(float, value)


def _attempt(convert: Callable[[Any], Any], value: object) -> Any:
    """None where the value does not convert: an object of any library may come, and each raises errors of its own."""
    try:
        return convert(value)
    except Exception:
        return None
