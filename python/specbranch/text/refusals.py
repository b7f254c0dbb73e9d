"""What llguidance says of a grammar that it does not take, on one line."""

from __future__ import annotations

import json
import re

from specbranch.core.errors import SpecBranchError

LONGEST = 200


def refused(name: str, message: str) -> SpecBranchError:
    """The error for the constraint `name` that llguidance refused with `message`, which may have many lines and the
    grammar in it."""
    lines = message.strip().splitlines() or ["no reason given"]
    reason = lines[0]
    if found := re.match(r"Unsatisfiable schema: (.*)", reason):
        return SpecBranchError(f"{name}: no text satisfies it: {_short(found[1])}")
    if found := re.match(r"Unimplemented keys: (\[.*\])$", reason):
        return SpecBranchError(f"{name} has keywords that are not supported: {_short(', '.join(json.loads(found[1])))}")
    if reason.startswith("oneOf constraints are not supported"):
        return SpecBranchError(f"{name} has a oneOf whose options may not exclude each other: expected anyOf")
    if reason.startswith("rollback not supported"):
        return SpecBranchError(
            f"{name} has max_tokens= or stop=, which cannot be taken back: expected suffix= or neither"
        )
    place = ""
    if found := re.match(r"(?:at )?(\d+)\((\d+)\): (.*)", reason):
        place, reason = f"line {found[1]}, column {found[2]}: ", found[3]
    if causes := [line for line in lines if line.startswith("error: ")]:  # of the regex crate, below a drawing
        reason = causes[0].removeprefix("error: ")
    elif found := re.match(r"invalid regex .* \(in regex\): (.*)", reason):
        reason = found[1]
    if name == "regex":
        place = ""  # of the rule that is made of it
    elif name == "json_schema":
        reason = re.sub(r" at line \d+ column \d+$", "", reason)  # of the document that it was put into
    return SpecBranchError(f"{name} cannot be used: {_short(place + reason)}")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
