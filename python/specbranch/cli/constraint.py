"""What answers have to follow: by a switch, all of a run; by its line in a prompt file, one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from specbranch.cli.arguments import flag, read_named, text
from specbranch.cli.drafting import drafts_freely
from specbranch.core.errors import SpecBranchError
from specbranch.core.extras import check_installed
from specbranch.policies.methods import METHODS, make_policy
from specbranch.text.grammar import Constraint
from specbranch.text.kinds import JSON, constraint_of
from specbranch.text.prompts import CONSTRAINTS, Prompt, PromptFileError

if TYPE_CHECKING:
    from specbranch import SpecBranch

Given = tuple[str, Any]  # a kind of CONSTRAINTS and its value, as Prompt has them


def add_constraint(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--json-schema", metavar="FILE", help="answers are JSON that this JSON schema validates")
    kinds.add_argument(
        "--regex", type=text, metavar="R", help="answers match this regular expression, from beginning to end"
    )
    kinds.add_argument("--grammar", metavar="FILE", help="answers follow this grammar, in llguidance's form of Lark")
    add_whitespace(parser)
    parser.add_argument(
        "--no-forced-tokens",
        action="store_true",
        help="with one of these: what must follow is not drafted but by the draft, for measurements",
    )


def add_whitespace(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--json-whitespace",
        action="store_true",
        help="JSON of a schema, which is compact otherwise, may have blanks and line breaks between its parts",
    )


def constraint_given(args: argparse.Namespace) -> Given | None:
    """That of all answers. Raises ValueError or OSError that names the file."""
    for kind in CONSTRAINTS:
        value = getattr(args, kind)
        if value is not None:
            return kind, value if kind == "regex" else _read(kind, value)
    return None


def _read(kind: str, file: str) -> Any:
    content = read_named(flag(kind), file)
    if kind != "json_schema":
        return content
    try:
        Constraint.json_schema(content)
    except SpecBranchError as error:
        raise ValueError(f"{flag(kind)} {file}: {error}") from None
    return json.loads(content)


def constrained(
    args: argparse.Namespace, given: Given | None, prompts: Sequence[Prompt], methods: Sequence[str]
) -> list[Prompt]:
    """The prompts, each with its constraint. given: that of all of them. methods: that run.

    Raises ValueError for two of one prompt, for one that cannot be read, and for a switch without effect;
    MissingPackageError without llguidance.
    """
    made = list[Prompt]()
    for prompt in prompts:
        if given is not None and prompt.constraint is not None:
            switch, kind = flag(given[0]), prompt.constraint[0]
            raise PromptFileError(f"prompt {prompt.id}: has a {kind} of its own, and there is {switch}; expected one")
        prompt = replace(prompt, constraint=given or prompt.constraint)
        try:
            constraint_for(args, prompt)
        except SpecBranchError as error:
            raise PromptFileError(f"prompt {prompt.id}: {error}") from None
        made.append(prompt)
    kinds = {prompt.constraint[0] for prompt in made if prompt.constraint is not None}
    _check_used(args, kinds, methods)
    if kinds:
        check_installed("a constraint", "grammar")
    return made


def _check_used(args: argparse.Namespace, kinds: set[str], methods: Sequence[str]) -> None:
    if args.json_whitespace and not kinds & set(JSON):
        with_what = f"with {' and '.join(map(flag, sorted(kinds)))}" if kinds else "without a JSON schema"
        raise ValueError(f"--json-whitespace has no effect {with_what}; it is for {flag('json_schema')}")
    if not args.no_forced_tokens:
        return
    if not kinds:
        raise ValueError(f"--no-forced-tokens has no effect without {', '.join(map(flag, CONSTRAINTS))}")
    if not any(drafts_freely(args, method) for method in methods):
        takers = ", ".join(method for method in METHODS if make_policy(method, {}).may_retrieve)
        raise ValueError(f"--no-forced-tokens has no effect with {', '.join(methods)}; it is for {takers}")


def check_unconstrained(args: argparse.Namespace, prompts: Sequence[Prompt]) -> None:
    """Of a command that knows no constraints. Raises PromptFileError."""
    for prompt in prompts:
        if prompt.constraint is not None:
            kind = prompt.constraint[0]
            raise PromptFileError(f"prompt {prompt.id}: has a {kind}; {args.command} expects prompts without")


def free(args: argparse.Namespace, prompts: Sequence[Prompt]) -> bool:
    """Whether something can be drafted for each prompt without a draft."""
    return not args.no_forced_tokens and all(prompt.constraint is not None for prompt in prompts)


def constraint_for(args: argparse.Namespace, prompt: Prompt) -> Constraint | None:
    """What the answer to a prompt has to follow. Raises SpecBranchError."""
    if prompt.constraint is None:
        return None
    whitespace, forced = args.json_whitespace, not args.no_forced_tokens
    return constraint_of(*prompt.constraint, whitespace=whitespace, forced=forced)


def prepare(engine: SpecBranch, args: argparse.Namespace, given: Given | None) -> None:
    """What can be said of the constraint of all answers once there is a tokenizer. Raises ValueError."""
    if given is None:
        return
    whitespace, forced = args.json_whitespace, not args.no_forced_tokens
    try:
        engine.prepare(constraint_of(*given, whitespace=whitespace, forced=forced))
    except SpecBranchError as error:
        named = getattr(args, given[0])
        raise ValueError(f"{flag(given[0])} {named}: {error}") from error
