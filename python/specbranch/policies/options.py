"""Options of policies: declared once, with range and help; checks and the command line's switches follow from that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, fields
from typing import Any

from specbranch.core.checks import choice, flag, number, whole


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
    """Base of the policies that have options: checks them, and takes whole floats as integers."""

    def __post_init__(self) -> None:
        for declared in fields(self):  # type: ignore[arg-type]
            value = checked(declared.name, getattr(self, declared.name), declared.default, **declared.metadata)
            object.__setattr__(self, declared.name, value)


def checked(
    name: str,
    value: object,
    default: object,
    help: str,
    least: float | None,
    most: float | None,
    choices: Sequence[str],
) -> bool | int | float | str:
    """The value as the option takes it. Raises SpecBranchError for one that it does not take."""
    if isinstance(default, bool):
        return flag(name, value)
    if isinstance(default, str):
        return choice(name, value, choices)
    numeric = whole if isinstance(default, int) else number
    return numeric(name, value, least=least, most=most)
