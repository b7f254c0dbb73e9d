"""OpenAI's `response_format`: what an answer has to follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from specbranch.core.checks import shown
from specbranch.serve.refusal import Refusal

FIELD = "response_format"
FORMS = {  # each type, with its keys beside "type"
    "text": (),
    "json_object": (),
    "json_schema": ("json_schema",),
}
KEYS = ("name", "schema", "strict", "description")  # of "json_schema"


class Form(NamedTuple):
    """A kind of constraint and its value, as `constraint_of` takes them."""

    kind: str
    value: Any = None


def form(value: object) -> Form | None:
    """None where any text will do. A schema is not looked at. `strict` makes no difference: what is asked for holds.

    Raises Refusal.
    """
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise refused(f'is {shown(value)}; expected {{"type": …}}')
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in FORMS:
        raise refused(f"has the type {shown(kind)}; expected one of {', '.join(FORMS)}")
    _check_keys(value, ("type", *FORMS[kind]), "")
    if kind == "text":
        return None
    return Form(kind, _schema(value.get(kind)) if FORMS[kind] else None)


def _schema(given: object) -> Any:
    place = ".json_schema"
    if not isinstance(given, Mapping):
        raise refused(f'{place} is {shown(given)}; expected {{"name": …, "schema": …}}')
    _check_keys(given, KEYS, place)
    name, strict, description = given.get("name"), given.get("strict"), given.get("description")
    if not isinstance(name, str) or not name:
        raise refused(f"{place}.name is {shown(name)}; expected text")
    if strict is not None and not isinstance(strict, bool):
        raise refused(f"{place}.strict is {shown(strict)}; expected true or false")
    if description is not None and not isinstance(description, str):
        raise refused(f"{place}.description is {shown(description)}; expected text")
    schema = given.get("schema")
    if not isinstance(schema, (Mapping, bool)):
        raise refused(f"{place}.schema is {shown(schema)}; expected a JSON schema")
    return schema


def _check_keys(given: Mapping[str, Any], known: tuple[str, ...], place: str) -> None:
    for key in given:
        if key not in known:
            raise refused(f"{place} has {shown(key)}; expected {', '.join(known)}".removeprefix(" "))


def refused(message: str) -> Refusal:
    """message: what is wrong with the field, or with a place in it."""
    return Refusal(400, f"{FIELD}{'' if message.startswith('.') else ' '}{message}", param=FIELD)
