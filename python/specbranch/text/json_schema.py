"""A JSON schema as a caller gives it, and as llguidance takes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from specbranch.core.checks import shown
from specbranch.core.errors import SpecBranchError

LARGEST = 2**53
"""Of the numbers that llguidance, which has them in double precision, writes as they are."""
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
ESCAPES = 'nrbtf\\"'
"""After a backslash. With \\uXXXX, llguidance 1.9 takes "\\u0061" for a key other than "a", and so lets a property of
the schema have any value. Without, a string has one spelling, and control characters but these have none."""
CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
CONTROL_IN_PATTERN = re.compile(
    CONTROL.pattern + r"|\\(?:x|u00)(?:0[0-7bBeEfF]|1.|7[fF])|\\[0cuxv]\{?(?![0-9a-fA-F]{2})"
)
"""Those, or what may be an escape of one."""
CLASS = re.compile(r"\[\^(?:\\.|[^\]\\])*\]|\[(?:\\.|[^\]\\])*-(?:\\.|[^\]\\])*\]")
"""One that leaves out or has a range: of these llguidance takes the characters that can be written."""


def document(schema: object, whitespace: bool) -> str:
    """The grammar for llguidance: of a schema in text, or as Python has it. Raises as `parse_schema`."""
    parsed = parse_schema(schema)
    if parsed is not False:
        options = {"whitespace_flexible": whitespace, "json_allowed_escapes": ESCAPES}
        parsed = {**({} if parsed is True else parsed), "x-guidance": options}
    return json.dumps({"grammars": [{"json_schema": parsed}]})


def parse_schema(schema: object) -> dict[str, Any] | bool:
    """A schema in text, or as Python has it.

    Raises SpecBranchError for what is not JSON, with the place; for what is JSON but no schema; for options of
    llguidance in it; and for values, bounds and patterns that llguidance would take for others.
    """
    parsed = _parsed(schema)
    if not isinstance(parsed, (dict, bool)):
        raise SpecBranchError(f"json_schema is {shown(parsed)}; expected a JSON object, true or false")
    if isinstance(parsed, dict):
        if "x-guidance" in parsed:  # it would win over whitespace=, and can have keywords ignored
            raise SpecBranchError("json_schema has x-guidance: expected no options for llguidance in the schema")
        _check_values(parsed)
    return parsed


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


def _check_values(schema: dict[str, Any]) -> None:
    """Refuse values, bounds and patterns that llguidance would take for others."""
    left: list[Any] = [schema]
    while left:
        node = left.pop()
        if not isinstance(node, dict):
            left += node if isinstance(node, list) else []
            continue
        left += node.values()
        for name in ("const", "enum"):
            for value in _leaves(node.get(name)):
                if isinstance(value, str):
                    _check_characters(name, value, value)
                elif abs(value) > LARGEST:
                    raise _too_large(name, value)
        patterns = {"pattern": [node.get("pattern")], "patternProperties": node.get("patternProperties")}
        for name, given in patterns.items():
            for pattern in given if isinstance(given, (list, dict)) else ():
                if isinstance(pattern, str):
                    _check_characters(name, pattern, CLASS.sub("", pattern), CONTROL_IN_PATTERN)
        bounds = {name: node[name] for name in BOUNDS if type(node.get(name)) in (int, float)}
        for name, bound in bounds.items():  # from 2**63 on it has no effect, or is refused
            if type(bound) is int and abs(bound) < 2**63 - 1 and int(float(bound)) != bound:
                raise _too_large(name, bound)
        bounds = {name: bound for name, bound in bounds.items() if abs(bound) <= LARGEST}
        _check_narrow("exclusiveMinimum", bounds, ("maximum", "exclusiveMaximum"), 1)
        _check_narrow("exclusiveMaximum", bounds, ("minimum", "exclusiveMinimum"), -1)


def _check_characters(name: str, value: str, text: str, control: re.Pattern[str] = CONTROL) -> None:
    if control.search(text):  # llguidance 1.9 would leave them out
        raise SpecBranchError(
            f"json_schema: {name} has {shown(value)}; expected no control characters but"
            r" those of \b, \f, \n, \r, \t"
        )


def _too_large(name: str, value: float) -> SpecBranchError:
    return SpecBranchError(f"json_schema: {name} has {shown(value)}; expected a number of at most 2**53")


def _check_narrow(name: str, bounds: dict[str, float], others: tuple[str, ...], sign: int) -> None:
    """Refuse an interval from a whole number on, without it, that is shorter than 1: llguidance 1.9 lets the number
    in."""
    start = bounds.get(name)
    if start is None or start % 1 or sign * start < 0:
        return
    for other in others:
        if 0 < sign * (bounds.get(other, start) - start) < 1:
            raise SpecBranchError(
                f"json_schema: between {name} {start} and {other} {bounds[other]} llguidance would let {start} in:"
                " expected bounds at least 1 apart"
            )


def _leaves(value: Any) -> Iterator[float | str]:
    left = [value]
    while left:
        node = left.pop()
        if isinstance(node, (list, dict)):
            left += node if isinstance(node, list) else node.values()
        elif isinstance(node, (int, float, str)):
            yield node
