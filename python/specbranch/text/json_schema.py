"""A JSON schema as a caller gives it, and as llguidance takes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from specbranch.core.checks import shown
from specbranch.core.errors import SpecBranchError

LARGEST = 2**53
"""Of the numbers that llguidance, which has them in double precision, writes as they are."""
ESCAPES = 'nrbtf\\"'
"""After a backslash. With \\uXXXX, llguidance 1.9 takes "\\u0061" for a key other than "a", and so lets a property of
the schema have any value; without, a string has one spelling, and free text no control characters but these."""


def document(schema: object, whitespace: bool) -> str:
    """The grammar for llguidance: of a schema in text, or as Python has it.

    Raises SpecBranchError for what is not JSON, with the place; for what is JSON but no schema; for options of
    llguidance in it; and for numbers that would come out as others.
    """
    parsed = _parsed(schema)
    if not isinstance(parsed, (dict, bool)):
        raise SpecBranchError(f"json_schema is {shown(parsed)}; expected a JSON object, true or false")
    if parsed is True:
        parsed = {}
    if isinstance(parsed, dict):
        if "x-guidance" in parsed:  # it would win over whitespace=, and can have keywords ignored
            raise SpecBranchError("json_schema has x-guidance: expected no options for llguidance in the schema")
        for name, value in _inexact(parsed):
            raise SpecBranchError(f"json_schema: {name} has {shown(value)}; expected a number of at most 2**53")
        parsed = {**parsed, "x-guidance": {"whitespace_flexible": whitespace, "json_allowed_escapes": ESCAPES}}
    return json.dumps({"grammars": [{"json_schema": parsed}]})


def _parsed(schema: object) -> Any:
    """In objects of its own."""
    try:
        if not isinstance(schema, str):
            schema = json.dumps(schema, allow_nan=False)
        return json.loads(schema, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise SpecBranchError(f"json_schema is not JSON: {error.msg}, {place}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise SpecBranchError(f"json_schema is not JSON: {shown(str(error), 200)[1:-1]}") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _inexact(schema: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Values and bounds that llguidance would round to others, each with its keyword."""
    left: list[Any] = [schema]
    while left:
        node = left.pop()
        if not isinstance(node, dict):
            left += node if isinstance(node, list) else []
            continue
        left += node.values()
        for name in node.keys() & {"const", "enum"}:
            yield from ((name, value) for value in _numbers(node[name]) if abs(value) > LARGEST)
        for name in node.keys() & {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}:
            bound = node[name]  # from 2**63 on it has no effect, or is refused
            if type(bound) is int and abs(bound) < 2**63 - 1 and int(float(bound)) != bound:
                yield name, bound


def _numbers(value: Any) -> Iterator[float]:
    left = [value]
    while left:
        node = left.pop()
        if isinstance(node, (list, dict)):
            left += node if isinstance(node, list) else node.values()
        elif isinstance(node, (int, float)):
            yield node
