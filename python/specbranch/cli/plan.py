"""`specbranch plan`: every method replayed over records, without the models."""

from __future__ import annotations

import argparse
import math
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbranch.cli.arguments import number
from specbranch.cli.files import Output, json_object, write_json
from specbranch.cli.tables import FoldedTable, figures, key, text
from specbranch.cli.terminal import output_console, status

if TYPE_CHECKING:
    from specbranch.replay.costs import ReplayCosts
    from specbranch.replay.planner import Expectation
    from specbranch.replay.record import Record


HELP = "replay every method over records: expected speeds and best settings"


def is_plan(file: Path) -> bool:
    found = json_object(file) or {}
    return str(found.get("command")).startswith("specbranch plan ") and isinstance(found.get("results"), list)


OUTPUTS = (Output("json", "a plan of specbranch plan", is_plan),)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", nargs="+", metavar="RECORD", help="files made by specbranch record, of one pair")
    parser.add_argument(
        "--ratio",
        type=number(0, math.inf, open_low=True),
        action="append",
        metavar="C",
        help="assume that a target forward costs C draft forwards, instead of what was measured; may be repeated",
    )
    parser.add_argument(
        "--row",
        type=number(0, math.inf),
        metavar="R",
        help="with --ratio: what one more row adds to a forward, as a share of it, for example 0.02 (default: 0)",
    )
    parser.add_argument(
        "--retrieval",
        choices=("on", "off"),
        help="let methods retrieve that may, and show retrieval without a draft model; what is in a prompt is found "
        "where its record holds that (default: on if all records do)",
    )
    parser.add_argument("--json", metavar="OUT", help="write all results to this file")


def run(args: argparse.Namespace) -> int:
    """Print a table for every set of costs; --json writes them with more detail."""
    from specbranch.replay.record import Record

    if args.row is not None and not args.ratio:
        raise ValueError("--row has no effect without --ratio: the costs are those measured with the record")
    record = joined([Record.load(Path(path)) for path in args.records], args.records)
    held = all(text.prompt_ids is not None for text in record.texts)
    retrieval = held if args.retrieval is None else args.retrieval == "on"
    results = []
    for title, costs, modes in cost_sets(record, args):
        from specbranch.replay.planner import plan

        with status(f"replaying: {title}"):
            expectations = list(plan(record, costs, modes, retrieval))
        output_console().print(table(expectations, title))
        results.append({"costs": title, "expectations": [asdict(expectation) for expectation in expectations]})
    if args.json is not None:
        pair: dict[str, Any] = {"target": asdict(record.target), "draft": asdict(record.draft)}
        command = shlex.join(["specbranch", *args.argv])
        texts = [{"task": text.task, "id": text.id, "tokens": len(text)} for text in record.texts]
        head = {"command": command, **pair, "retrieval": retrieval}
        write_json(args.json, {**head, "texts": texts, "results": results})
    return 0


def joined(records: list[Record], paths: list[str]) -> Record:
    """One record of all texts; costs are the first's. Raises ValueError for records of different pairs."""
    first = records[0]
    for other, path in zip(records, paths, strict=True):
        if (other.target, other.draft) != (first.target, first.draft):
            raise ValueError(
                f"{path}: a record of {other.draft.name} and {other.target.name}; {paths[0]} is of "
                f"{first.draft.name} and {first.target.name}"
            )
    return replace(first, texts=[text for record in records for text in record.texts])


def cost_sets(record: Record, args: argparse.Namespace) -> list[tuple[str, ReplayCosts, tuple[str, ...]]]:
    """Title, costs and modes of every table."""
    from specbranch.replay.costs import ReplayCosts
    from specbranch.replay.planner import MODES

    if args.ratio:
        return [
            (
                f"a target forward is {ratio:g} draft forwards",
                ReplayCosts.ratio(ratio, args.row or 0.0, args.row or 0.0),
                tuple(MODES),
            )
            for ratio in args.ratio
        ]
    if not record.costs:
        raise ValueError(f"{args.records[0]}: no measured costs (an unfinished record?); finish it or pass --ratio")
    return [("costs as measured with the record", ReplayCosts.of(record), tuple(MODES))]


DRAFTS_FROM = {  # by draft and retrieval
    (False, False): "none",
    (True, False): "model",
    (False, True): "retrieval",
    (True, True): "both",
}


def table(expectations: list[Expectation], title: str) -> FoldedTable:
    best = max(range(len(expectations)), key=lambda place: expectations[place].tokens_per_second)
    settings = (" ".join(f"{name}={value}" for name, value in each.settings.items()) for each in expectations)
    columns = {
        "tokens/s": "tokens_per_second",
        "speed-up": "speedup",
        "per forward": "tokens_per_target_forward",
        "rollback": "rollback_rate",
        "wasted": "wasted_per_token",
    }
    keys = [key("method", (each.method for each in expectations)), key("mode", (each.mode for each in expectations))]
    if any(each.retrieval for each in expectations):
        keys.append(key("drafts from", (DRAFTS_FROM[each.draft, each.retrieval] for each in expectations)))
    return FoldedTable(
        title,
        keys,
        [
            *(
                figures(heading, (f"{getattr(each, name):.2f}" for each in expectations))
                for heading, name in columns.items()
            ),
            text("settings", (each or "default" for each in settings)),
        ],
        bold=[best],
    )
