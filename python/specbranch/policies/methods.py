"""All methods by name."""

from __future__ import annotations

from dataclasses import Field, fields, is_dataclass
from typing import Any

from specbranch.core.checks import shown
from specbranch.core.errors import SpecBranchError
from specbranch.policies.branching import Hedging, Paper, Ssd
from specbranch.policies.chain import Adaptive, Autoregressive, Pearl, Speculative
from specbranch.policies.policy import Policy

_ALL: tuple[type[Policy], ...] = (Autoregressive, Speculative, Adaptive, Pearl, Ssd, Paper, Hedging)
POLICIES = {str(policy.name): policy for policy in _ALL}
METHODS = tuple(POLICIES)


def options_of(method: str) -> dict[str, Field[Any]]:
    """The options that a method takes, by name; see options.py for what each declares."""
    policy = POLICIES[method]
    return {one.name: one for one in fields(policy)} if is_dataclass(policy) else {}


def make_policy(method: str, options: dict[str, object]) -> Policy:
    """The policy of a method, with those of `options` that it takes.

    Raises SpecBranchError for an unknown method, an option that no method takes, and a value out of range.
    """
    if not isinstance(method, str) or method not in POLICIES:
        raise SpecBranchError(f"unknown method {shown(method)}; expected one of {', '.join(METHODS)}")
    known = {name for each in METHODS for name in options_of(each)}
    if unknown := sorted(set(options) - known):
        raise SpecBranchError(f"unknown option {unknown[0]!r}; expected one of {', '.join(sorted(known))}")
    taken = options_of(method)
    return POLICIES[method](**{name: value for name, value in options.items() if name in taken})
