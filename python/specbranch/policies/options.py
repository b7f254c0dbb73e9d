"""Options of policies: declared once, with range and help; checks and the command line's switches follow from that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, fields
from typing import Any

from specbranch.core.errors import SpecBranchError


def option(
    default: Any, help: str, *, least: float | None = None, most: float | None = None, choices: Sequence[str] = ()
) -> Any:
    """A dataclass field. Its type is the default's: bool, int, float or str (one of `choices`); an int or a float is at
    least `least` and at most `most`. help: a line for the command line."""
    return field(default=default, metadata={"help": help, "least": least, "most": most, "choices": tuple(choices)})


def inherited(policy: type, name: str, default: Any) -> Any:
    """The option of a base class, with another default."""
    declared = next(one for one in fields(policy) if one.name == name)
    return field(default=default, metadata=declared.metadata)


class Options:
    """Base of the policies that have options: checks them."""

    def __post_init__(self) -> None:
        for declared in fields(self):  # type: ignore[arg-type]
            check(declared.name, getattr(self, declared.name), declared.default, **declared.metadata)


def check(
    name: str, value: Any, default: Any, help: str, least: float | None, most: float | None, choices: Sequence[str]
) -> None:
    """Raise SpecBranchError unless the value is one that the option takes."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise SpecBranchError(f"{name} is {value!r}; expected True or False")
        return
    if isinstance(default, str):
        if value not in choices:
            raise SpecBranchError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
        return
    kind = "an integer" if isinstance(default, int) else "a number"
    known = isinstance(value, int) or (isinstance(value, float) and isinstance(default, float))
    if not known or isinstance(value, bool):
        raise SpecBranchError(f"{name} is {value!r}; expected {kind}")
    if not ((least is None or value >= least) and (most is None or value <= most)):  # NaN is outside too
        low, high = "" if least is None else f"{least:g} <= ", "" if most is None else f" <= {most:g}"
        raise SpecBranchError(f"{name} is {value}; expected {low}{name}{high}")
