"""`specbranch bench`: its arguments, and a run from start or resumption to its tables and files."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from specbranch.cli import files
from specbranch.cli.arguments import add_models, add_prompts, add_sampling, flag, names, whole
from specbranch.cli.bench import llama_peer, plot, report, resume, vllm_peer
from specbranch.cli.constraint import add_constraint, constrained, constraint_given, free, prepare
from specbranch.cli.drafting import (
    DEFAULT_METHOD,
    NO_RETRIEVAL,
    WITHOUT_RETRIEVAL,
    add_drafting,
    add_hrad,
    check_used,
    drafts_freely,
    method_of,
)
from specbranch.cli.loading import load_engine
from specbranch.cli.messages import FAILURE, INTERRUPTED, complain, one_line
from specbranch.cli.terminal import Progress, output_console, progress
from specbranch.policies.methods import METHODS
from specbranch.runtime.choices import RETRIEVAL
from specbranch.text.generation_config import bare
from specbranch.text.prompts import Prompt, read_all

if TYPE_CHECKING:
    from specbranch.cli.bench.bench import Bench
    from specbranch.cli.bench.process import PeerProcess

HELP = "compare methods, and transformers' own generation, vLLM or llama.cpp, on the same prompts"
OUTPUTS = (
    files.Output("json", "a report of specbranch bench", read_back=True),  # resume.read_report looks
    files.Output("plot", "a picture of specbranch bench", plot.is_plot),
)
DEFAULT_METHODS = (DEFAULT_METHOD, report.REFERENCE)
PEERS = ("greedy", "assisted", "prompt-lookup")  # of Peers.generate
PROCESSES = {"vllm": vllm_peer.NAMES, "llama.cpp": llama_peer.NAMES}  # one name for all of each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_models(parser, draft_required=False)
    add_prompts(parser)
    parser.add_argument(
        "--methods",
        type=names((*METHODS, *WITHOUT_RETRIEVAL)),
        default=DEFAULT_METHODS,
        metavar="LIST",
        help=f"comma-separated, of {', '.join(METHODS)}; {report.REFERENCE} always runs; with {NO_RETRIEVAL} behind "
        f"its name a method runs without (default: {','.join(DEFAULT_METHODS)})",
    )
    parser.add_argument(
        "--peers",
        type=names((*PEERS, *vllm_peer.NAMES, *llama_peer.NAMES), none=True, groups=PROCESSES),
        default=PEERS,
        metavar="LIST",
        help=f"comma-separated: transformers' own generation ({', '.join(PEERS)}), vLLM's without and with the draft "
        f"({', '.join(vllm_peer.NAMES)}; vllm for all; {vllm_peer.PYTHON} is the Python that has it), llama.cpp's "
        f"({', '.join(llama_peer.NAMES)}; llama.cpp for all; needs {llama_peer.PROGRAM} on the PATH); or none "
        f"(default: {','.join(PEERS)})",
    )
    for role in ("target", "draft"):
        parser.add_argument(
            f"--llama-{role}",
            metavar=f"FILE{llama_peer.SUFFIX}",
            help=f"what llama.cpp runs as the {role} (default: --{role}, if that is such a file)",
        )
    add_sampling(parser)
    add_constraint(parser)
    parser.add_argument(
        "--max-requests",
        type=whole(1),
        default=1,
        metavar="N",
        help="prompts that our methods decode at once, their speed that of all together; peers have one after the "
        "other (default: %(default)s)",
    )
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
    running = list(dict.fromkeys(map(method_of, methods(args))))
    check_used(args, running)
    _check_processes(args)
    _check_peers(args)
    given = constraint_given(args)
    prompts = constrained(args, given, read_all(args.prompts, args.limit), running)
    _check_constrained(args, prompts, running)
    if args.plot is not None:
        plot.check(args.plot)
    request = resume.request(args, prompts)
    before = None
    if args.json is not None:
        before = resume.read_report(args.json, request, fresh=args.fresh)
    schedule = laps(args)
    at_once = sum(map(len, schedule))
    wanted = len(prompts) * at_once
    if before is not None:
        if len(before["records"]) >= wanted:
            complain(f"{args.json} is complete; --fresh measures again")
            whole = before | {"interrupted": False, "rows": report.summarize(before["records"])}
            if before["interrupted"]:  # after the last measurement
                files.write_json(args.json, whole)
            return _show(args, whole, wanted)
        complain(f"going on after {len(before['records'])} of {wanted} measurements; --fresh starts anew")
    from specbranch.cli.bench.bench import Bench, resident_with_libraries

    resident_before_loading = resident_with_libraries()
    engine = load_engine(args)
    prepare(engine, args, given)
    engine.target.generation_config = bare(engine.target)  # peers differ in what they make of the rest
    engine.max_requests = args.max_requests
    bench = Bench(engine, args, request, resident_before_loading, before)
    interrupted = False
    try:
        with progress(at_once + wanted - len(bench.records)) as bar:
            for lap, contenders in enumerate(schedule):
                if bench.measured(lap) < len(prompts) * len(contenders):
                    _run_lap(bench, lap, contenders, prompts, bar)
    except KeyboardInterrupt:
        interrupted = True
    result = bench.report(interrupted)
    if args.json is not None:
        files.write_json(args.json, result)
    return _show(args, result, wanted)


def _run_lap(bench: Bench, lap: int, contenders: list[str], prompts: list[Prompt], bar: Progress) -> None:
    """Measure contenders over all prompts. A process that does not start is reported, and the others go on."""
    from specbranch.cli.bench.bench import IN_A_PROCESS

    with ExitStack() as stack:
        processes: dict[str, PeerProcess] = {}
        able = list(contenders)
        for name in (name for name in contenders if name in IN_A_PROCESS):
            try:
                processes[name] = stack.enter_context(bench.start(name, prompts, bar))
            except ChildProcessError as error:
                complain(f"error: {name}: {one_line(error)}")
                able.remove(name)
        if lap and not processes:  # the others are there for its sake
            return
        bench.begin_lap(lap, able, prompts, bar, processes)
        if lap and not any(contender.name in processes for contender in bench.contenders):
            return
        at_once = bench.args.max_requests
        for first in range(0, len(prompts), at_once):
            bench.measure(prompts[first : first + at_once], first, bar)
            if bench.args.json is not None:
                files.write_json(bench.args.json, bench.report(interrupted=True))


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
        for line in result.get("notes", ()):
            print(line)
        if args.plot is not None:
            plot.plot(args.plot, result["rows"], title)
    if result["interrupted"]:
        more = "" if args.json is None else "; the same command goes on from there"
        complain(f"interrupted after {len(result['records'])} of {wanted} measurements{more}")
        return INTERRUPTED
    failed = any(record["error"] for record in result["records"]) or len(result["records"]) < wanted
    return FAILURE if failed else 0


def methods(args: argparse.Namespace) -> list[str]:
    """The methods that run; autoregressive is always there, as the others are compared with its tokens."""
    return list(dict.fromkeys([*args.methods, report.REFERENCE]))


def laps(args: argparse.Namespace) -> list[list[str]]:
    """Who runs in each pass over the prompts: everybody in the first, but of vLLM's engines one, as several seldom fit
    into memory (llama.cpp's servers share most of theirs). The others have a lap each, together with what speeds are
    divided by."""
    engines = [peer for peer in args.peers if peer in vllm_peer.NAMES]
    first = [*methods(args), *(peer for peer in args.peers if peer not in engines), *engines[:1]]
    bases = [name for name in first if name in (report.BASELINE, report.REFERENCE)]
    return [first, *([*bases, engine] for engine in engines[1:])]


def _check_peers(args: argparse.Namespace) -> None:
    """Without a draft model there are no peers that need one; such as were named are refused. Raises ValueError."""
    if args.draft not in (None, RETRIEVAL):
        return
    drafting = {
        "assisted",
        *(name for each in (vllm_peer.SPECULATIVE_TOKENS, llama_peer.DRAFTED_TOKENS) for name in each if each[name]),
    }
    if args.peers is PEERS:
        args.peers = tuple(peer for peer in PEERS if peer not in drafting)
    elif unable := [peer for peer in args.peers if peer in drafting]:
        found = "there is none" if args.draft is None else f"--draft {RETRIEVAL} has none"
        raise ValueError(f"--peers {','.join(unable)} needs a draft model; {found}")


def _check_constrained(args: argparse.Namespace, prompts: list[Prompt], running: list[str]) -> None:
    """Refuse peers that cannot follow a constraint, and methods without the draft that they need. Raises ValueError."""
    kinds = dict.fromkeys(flag(prompt.constraint[0]) for prompt in prompts if prompt.constraint is not None)
    unable = [peer for peer in args.peers if peer not in PEERS]
    if kinds and unable:
        named = ", ".join(kinds)
        raise ValueError(f"--peers {','.join(unable)} cannot follow {named}; expected some of {', '.join(PEERS)}")
    if args.draft is None:
        found = args.retrieval == "on" or free(args, prompts)
        drafting = [name for name in running if name != report.REFERENCE]
        if needy := [name for name in drafting if not (found and drafts_freely(args, name))]:
            raise ValueError(f"--methods {','.join(needy)} needs --draft")


def _check_processes(args: argparse.Namespace) -> None:
    for word, peers in PROCESSES.items():
        if set(args.peers) & set(peers):
            for name in ("device", "draft_device", "device_map"):
                if getattr(args, name) not in (None, "cpu"):
                    raise ValueError(f"--peers {word} runs on the CPU, not with {flag(name)} {getattr(args, name)}")
            for model in filter(None, (args.target, args.draft)):
                if word == "vllm" and model.lower().endswith(".gguf"):
                    raise ValueError(f"--peers vllm needs checkpoints, not the GGUF file {model}")
        elif word == "llama.cpp":
            for name in ("llama_target", "llama_draft"):
                if getattr(args, name) is not None:
                    raise ValueError(f"{flag(name)} is for --peers llama.cpp")
