"""Constraints by the names that prompt files, switches and requests have for their kinds. Equal ones are one, so that
they are compiled once."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from specbranch.text.grammar import Constraint

KEPT = 64  # which are compiled already; a large schema takes some megabytes
JSON = ("json_schema", "json_object")


def constraint_of(kind: str, value: Any, *, whitespace: bool = False, forced: bool = True) -> Constraint:
    """kind: "json_schema" (value: what JSON has for it), "json_object" (None), "regex" or "grammar" (text).

    Raises SpecBranchError as the Constraint of that kind does.
    """
    text = value if kind in ("regex", "grammar") else json.dumps(value)
    return _kept(kind, text, whitespace and kind in JSON, forced)


@lru_cache(KEPT)
def _kept(kind: str, text: str, whitespace: bool, forced: bool) -> Constraint:
    if kind == "json_schema":
        return Constraint.json_schema(text, whitespace=whitespace, forced=forced)
    if kind == "json_object":
        return Constraint.json_object(whitespace=whitespace, forced=forced)
    if kind == "regex":
        return Constraint.regex(text, forced=forced)
    return Constraint.lark(text, forced=forced)
