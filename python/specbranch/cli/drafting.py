"""A switch for every option of the methods, made from the fields that declare them (policies/options.py)."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from dataclasses import Field
from typing import Any

from specbranch.cli.arguments import flag, number, whole
from specbranch.cli.messages import complain
from specbranch.policies.methods import METHODS, make_policy, options_of
from specbranch.policies.policy import retrieves
from specbranch.runtime.choices import RETRIEVAL

DEFAULT_METHOD = "specbranch"
NO_RETRIEVAL = "-no-retrieval"
WITHOUT_RETRIEVAL = tuple(method + NO_RETRIEVAL for method in METHODS if make_policy(method, {}).may_retrieve)


def add_drafting(parser: argparse.ArgumentParser, methods: Sequence[str] = METHODS) -> None:
    """Switches for all options of these methods. One that is not given is None in the parsed arguments."""
    group = parser.add_argument_group("drafting", "these change the speed, never the text")
    for name, fields in options_by_name(methods).items():
        text = f"{next(iter(fields.values())).metadata['help']} (default: {defaults(fields)})"
        if len(methods) > 1:
            text = f"{', '.join(fields)}: {text}"
        group.add_argument(switch(name), help=text.replace("%", "%%"), **_kind_of_value(name, fields))


def add_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=METHODS, default=DEFAULT_METHOD, help="default: %(default)s")


def check_method(args: argparse.Namespace, forced: bool = False) -> None:
    """Refuse a method without the draft that it needs, and options without effect on it; a draft without effect is
    warned of and left out. forced: whether there are tokens that must follow. Raises ValueError."""
    free = args.retrieval == "on" or (forced and drafts_freely(args, args.method))
    if args.draft is None and not free and args.method != "autoregressive":
        raise ValueError(f"--method {args.method} needs --draft")
    check_used(args, [args.method])
    if args.draft is not None and args.method == "autoregressive":
        complain("warning: no effect with --method autoregressive: --draft")
        args.draft = None


def add_hrad(parser: argparse.ArgumentParser) -> None:
    takers = ", ".join(forecast_methods())
    parser.add_argument("--hrad", metavar="DIR", help=f"{takers}: a predictor that train-hrad made for this pair")


def options_by_name(methods: Iterable[str] = METHODS) -> dict[str, dict[str, Field[Any]]]:
    """Each option of these methods: its field in every one that takes it. Only defaults differ between methods."""
    found: dict[str, dict[str, Field[Any]]] = {}
    for method in methods:
        for name, declared in options_of(method).items():
            found.setdefault(name, {})[method] = declared
    return found


def forecast_methods() -> list[str]:
    """The methods that use H-RAD, with their default options."""
    return [method for method in METHODS if make_policy(method, {}).uses_forecast]


def defaults(fields: dict[str, Field[Any]]) -> str:
    """For example "any; ssd: fan": DEFAULT_METHOD's, then those of methods that differ."""
    usual = fields.get(DEFAULT_METHOD, next(iter(fields.values()))).default
    others = [f"{method}: {_shown(field.default)}" for method, field in fields.items() if field.default != usual]
    return "; ".join([_shown(usual), *others])


def switch(option: str) -> str:
    """The switch of an option; a boolean has a second one, --no-…"""
    return flag(option)


def drafting_options(args: argparse.Namespace) -> dict[str, object]:
    """The options given on the command line, as `SpecBranch` takes them."""
    values = {name: getattr(args, name, None) for name in options_by_name()}
    return {name: value for name, value in values.items() if value is not None}


def drafts_freely(args: argparse.Namespace, method: str) -> bool:
    """Whether a method drafts what was found, or must follow, without a draft."""
    return make_policy(method, drafting_options(args)).may_retrieve


def method_of(contender: str) -> str:
    """The method that runs under a name of `bench`."""
    return contender.removesuffix(NO_RETRIEVAL)


def check_used(args: argparse.Namespace, methods: Sequence[str]) -> None:
    """Refuse an option without effect on the methods that run. Raises ValueError."""
    given = drafting_options(args)
    running = ", ".join(methods)
    if args.overlap != "auto" and not any(make_policy(method, given).overlaps for method in methods):
        takers = ", ".join(method for method in METHODS if make_policy(method, {}).overlaps)
        raise ValueError(f"--overlap has no effect with {running}; it is for {takers}")
    if args.draft_context != "auto" and not any(make_policy(method, given).candidates for method in methods):
        raise ValueError(f"--draft-context has no effect with {running}; it is for methods that draft")
    _check_retrieval(args, methods)
    for name in given:
        fields = options_by_name()[name]
        if not fields.keys() & set(methods):
            raise ValueError(f"{switch(name)} has no effect with {running}; it is an option of {', '.join(fields)}")
    if args.hrad is not None and not any(make_policy(method, given).uses_forecast for method in methods):
        takers = ", ".join(forecast_methods())
        raise ValueError(f"--hrad has no effect with {running} and these options; it is for {takers}")


def _check_retrieval(args: argparse.Namespace, methods: Sequence[str]) -> None:
    """Refuse to retrieve nothing where something of it is asked for. Raises ValueError."""
    policies = [make_policy(method, drafting_options(args)) for method in methods]
    running, takers = ", ".join(methods), ", ".join(name for name in METHODS if make_policy(name, {}).may_retrieve)
    if args.retrieval != "auto" and not any(policy.may_retrieve for policy in policies):
        raise ValueError(f"--retrieval has no effect with {running}; it is for {takers}")
    if args.draft == RETRIEVAL:
        if args.retrieval == "off":
            raise ValueError(f"--retrieval off leaves no draft with --draft {RETRIEVAL}; expected auto or on")
        if unable := [policy.name for policy in policies if policy.candidates > 0 and not policy.may_retrieve]:
            raise ValueError(f"--draft {RETRIEVAL} is no draft for {', '.join(unable)}; it is for {takers}")
    told = True if args.draft == RETRIEVAL else {"auto": None, "on": True, "off": False}[args.retrieval]
    if args.corpus is not None and not any(retrieves(policy, told) for policy in policies):
        also = "" if told is True else f" and --retrieval {args.retrieval}"
        raise ValueError(f"--corpus has no effect with {running}{also}; it is for --retrieval on with {takers}")


def _kind_of_value(name: str, fields: dict[str, Field[Any]]) -> dict[str, Any]:
    """What `add_argument` must know of an option's values."""
    declared = next(iter(fields.values()))
    default, metadata = declared.default, declared.metadata
    if isinstance(default, bool):
        return {"action": argparse.BooleanOptionalAction}
    if isinstance(default, str):
        return {"choices": metadata["choices"]}
    low = -math.inf if metadata["least"] is None else metadata["least"]
    high = math.inf if metadata["most"] is None else metadata["most"]
    if isinstance(default, int):
        return {"type": whole(low, high), "metavar": "N"}
    return {"type": number(low, high), "metavar": name[0].upper()}


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
