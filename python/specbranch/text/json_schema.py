"""A JSON schema as a caller gives it: text, or what Python has for it."""

from __future__ import annotations

import json
from typing import Any

from specbranch.core.checks import shown
from specbranch.core.errors import SpecBranchError


def parse_schema(schema: object) -> dict[str, Any] | bool:
    """The schema, in objects of its own. Raises SpecBranchError for what is not JSON, with the place, and for what is
    JSON but no schema; and for options of llguidance in it."""
    try:
        if not isinstance(schema, str):
            schema = json.dumps(schema, allow_nan=False)
        parsed = json.loads(schema, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise SpecBranchError(
            f"json_schema is not JSON: {error.msg}, line {error.lineno}, column {error.colno}"
        ) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise SpecBranchError(f"json_schema is not JSON: {shown(str(error), 200)[1:-1]}") from error
    if not isinstance(parsed, (dict, bool)):
        raise SpecBranchError(f"json_schema is {shown(parsed)}; expected a JSON object, true or false")
    if isinstance(parsed, dict) and "x-guidance" in parsed:
        # They would come before whitespace=, and could have keywords ignored.
        raise SpecBranchError("json_schema has x-guidance: expected no options for llguidance in the schema")
    return parsed


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
