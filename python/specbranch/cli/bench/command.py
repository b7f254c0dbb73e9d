"""`specbranch bench`: its arguments, and a run from start or resumption to its tables and files."""

from __future__ import annotations

import argparse
from typing import Any

from specbranch.cli import files
from specbranch.cli.arguments import add_models, add_prompts, add_sampling, names
from specbranch.cli.bench import plot, report, resume
from specbranch.cli.drafting import DEFAULT_METHOD, add_drafting, add_hrad, check_used
from specbranch.cli.loading import load_engine
from specbranch.cli.messages import FAILURE, INTERRUPTED, complain
from specbranch.cli.terminal import output_console, progress
from specbranch.policies.methods import METHODS
from specbranch.text.prompts import read_all

HELP = "compare methods, and transformers' own generation, on the same prompts"
OUTPUTS = (
    files.Output("json", "a report of specbranch bench", read_back=True),  # resume.read_report looks
    files.Output("plot", "a picture of specbranch bench", plot.is_plot),
)
DEFAULT_METHODS = (DEFAULT_METHOD, report.REFERENCE)
PEERS = ("greedy", "assisted", "prompt-lookup")  # of Peers.generate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_models(parser, draft_required=True)
    add_prompts(parser)
    parser.add_argument(
        "--methods",
        type=names(METHODS),
        default=DEFAULT_METHODS,
        metavar="LIST",
        help=f"comma-separated, of {', '.join(METHODS)}; {report.REFERENCE} always runs "
        f"(default: {','.join(DEFAULT_METHODS)})",
    )
    parser.add_argument(
        "--peers",
        type=names(PEERS, none=True),
        default=PEERS,
        metavar="LIST",
        help=f"transformers' own generation: comma-separated, of {', '.join(PEERS)}; or none (default: all)",
    )
    add_sampling(parser)
    add_hrad(parser)
    parser.add_argument(
        "--json", metavar="OUT", help="write all measurements to this file; resumes if it is incomplete"
    )
    parser.add_argument("--fresh", action="store_true", help="with --json: start over instead of resuming")
    parser.add_argument("--plot", metavar="OUT.png", help="draw the figures (needs matplotlib; also .svg, .pdf, …)")
    add_drafting(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write the files. Ctrl-C does so with what has been measured, and ends with 130.

    What the file of --json holds already is not measured again.
    """
    if args.fresh and args.json is None:
        raise ValueError("--fresh needs --json: without a file nothing is kept")
    check_used(args, methods(args))
    prompts = read_all(args.prompts, args.limit)
    if args.plot is not None:
        plot.check(args.plot)
    request = resume.request(args, prompts)
    before = None
    if args.json is not None:
        before = resume.read_report(args.json, request, fresh=args.fresh)
    wanted = len(prompts) * len(contender_names(args))
    if before is not None:
        if len(before["records"]) >= wanted:
            complain(f"{args.json} is complete; --fresh measures again")
            whole = before | {"interrupted": False, "rows": report.summarize(before["records"])}
            if before["interrupted"]:  # after the last measurement
                files.write_json(args.json, whole)
            return _show(args, whole, wanted)
        complain(f"going on after {len(before['records'])} of {wanted} measurements; --fresh starts anew")
    from specbranch.cli.bench.bench import Bench, contenders, resident_with_libraries

    resident_before_loading = resident_with_libraries()
    engine = load_engine(args)
    bench = Bench(
        engine, contenders(engine, args, contender_names(args)), args, request, resident_before_loading, before
    )
    interrupted = False
    try:
        with progress(len(bench.contenders) + wanted - len(bench.records)) as bar:
            bench.warm_up(prompts, bar)
            for number, prompt in enumerate(prompts):
                bench.measure(prompt, number, bar)
                if args.json is not None:
                    files.write_json(args.json, bench.report(interrupted=True))
    except KeyboardInterrupt:
        interrupted = True
    result = bench.report(interrupted)
    if args.json is not None:
        files.write_json(args.json, result)
    return _show(args, result, wanted)


def _show(args: argparse.Namespace, result: dict[str, Any], wanted: int) -> int:
    """Print and draw a report, and give the exit status."""
    if result["rows"]:
        title, console = report.title(result["settings"]), output_console()
        for number, table in enumerate(report.tables(result["rows"], title)):
            if number:
                console.print()
            console.print(table)
        for line in report.difference_lines(result["rows"]):
            print(line)
        if args.plot is not None:
            plot.plot(args.plot, result["rows"], title)
    if result["interrupted"]:
        more = "" if args.json is None else "; the same command goes on from there"
        complain(f"interrupted after {len(result['records'])} of {wanted} measurements{more}")
        return INTERRUPTED
    return FAILURE if any(record["error"] for record in result["records"]) else 0


def methods(args: argparse.Namespace) -> list[str]:
    """The methods that run; autoregressive is always there, as the others are compared with its tokens."""
    return list(dict.fromkeys([*args.methods, report.REFERENCE]))


def contender_names(args: argparse.Namespace) -> list[str]:
    """Everything that runs: methods, then peers."""
    return [*methods(args), *args.peers]
