"""Every op of the core against the straightforward torch version and against the bytes that it must move.

python benchmarks/bench_ops.py [--device cpu|cuda] [--quick] [--op NAME] [--seconds S] [--limit-seconds N] [--json OUT]

On a CUDA device every function is timed with events, called from Python and as a node of a captured graph, on inputs
that rotate beyond the L2 cache. Ratios compare like with like: two graphs, or two calls from Python where the peer
cannot be captured; the peer is the one that does best against ours.

OUT gets a line of JSON for the machine, one for each case as soon as it is measured, and one that names the cases that
a limit left out. A case that fails has its error there, and the others go on; the exit status is then 1.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import cases_advance
import cases_cache
import cases_layers
import cases_linear
import cases_sampling
import torch
from cases_cache import tree_attention_cases
from op_case import Case, Timing, describe_error, measure, read_bandwidth
from op_case_cuda import CudaTiming, Gpu, copy_bandwidth, measure_cuda

from specbranch.cli.machine import describe_machine, describe_versions

CASES: dict[str, Callable[[str], Iterator[Case]]] = {
    name.removesuffix("_cases"): cases
    for module in (cases_sampling, cases_advance, cases_cache, cases_layers, cases_linear)
    for name, cases in vars(module).items()
    if name.endswith("_cases")
}
"""The cases of each op: a function <op>_cases."""

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    arguments = parse(argv)
    on_cuda = arguments.device == "cuda"
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    cases = choose(arguments)
    seconds = arguments.seconds if arguments.seconds is not None else 0.3 if arguments.quick else 0.5
    with arguments.json.open("w", encoding="utf-8") if arguments.json else nullcontext() as file:
        bandwidth = copy_bandwidth() if on_cuda else read_bandwidth()
        where = torch.cuda.get_device_name() if on_cuda else f"{arguments.threads} threads"
        print(f"{where}, memory {bandwidth / 1e9:.1f} GB/s; microseconds, medians\n\n{HEAD}", flush=True)
        write(file, environment("cpu" if not on_cuda else where, arguments.threads, bandwidth))
        row_of = partial(cuda_row, seconds=seconds, gpu=Gpu()) if on_cuda else partial(cpu_row, seconds=seconds)
        return measure_all(cases, row_of, bandwidth, file, started + arguments.limit_seconds)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's intra-op threads")
    parser.add_argument("--op", choices=CASES, action="append", help="only this op; may be repeated")
    parser.add_argument("--quick", action="store_true", help="only a few cases, for a first impression")
    parser.add_argument("--flex", action="store_true", help="beside FlexAttention too, compiled for every shape")
    parser.add_argument("--seconds", type=float, help="time for each case (default 0.5, with --quick 0.3)")
    parser.add_argument(
        "--limit-seconds", type=float, default=float("inf"), metavar="N", help="start no case after N seconds"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file, a line for each case")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device (specbranch doctor says more)")
    if arguments.flex and arguments.device != "cuda":
        parser.error("--flex needs --device cuda")
    return arguments


def choose(arguments: argparse.Namespace) -> list[Case]:
    makers = CASES | {"tree_attention": partial(tree_attention_cases, flex=arguments.flex)}
    cases = [case for op in arguments.op or makers for case in makers[op](arguments.device)]
    chosen = [case for case in cases if case.quick or not arguments.quick]
    if not chosen:
        raise SystemExit("bench_ops.py: there is no such case for this device")
    return chosen


def environment(device: str, threads: int, bandwidth: float) -> Row:
    return {
        "command": shlex.join(["python", *sys.argv]),
        "device": device,
        "machine": describe_machine(),
        "versions": describe_versions(),
        "threads": threads,
        "bytes_per_second": bandwidth,
    }


def write(file: TextIO | None, record: Row) -> None:
    if file is not None:
        file.write(json.dumps(record) + "\n")
        file.flush()


def measure_all(
    cases: list[Case], row_of: Callable[[Case], Row], bandwidth: float, file: TextIO | None, deadline: float
) -> int:
    """Measure, print and write one case after the other until time.monotonic() passes `deadline`; the exit status."""
    failed = 0
    for i, case in enumerate(cases):
        if time.monotonic() > deadline:
            print(f"left out, the time is over: {len(cases) - i} of {len(cases)} cases", flush=True)
            write(file, {"left_out": [f"{case.op}: {case.what}" for case in cases[i:]]})
            break
        row = {"op": case.op, "case": case.what} | row_or_error(case, row_of, bandwidth)
        failed += "error" in row
        print(line(row), flush=True)
        write(file, row)
    if failed:
        print(f"failed: {failed} of {len(cases)} cases", flush=True)
    return 1 if failed else 0


def row_or_error(case: Case, row_of: Callable[[Case], Row], bandwidth: float) -> Row:
    try:
        row = row_of(case)
    except Exception as error:
        return {"error": describe_error(error), "details": str(error)}
    return row | {
        "bytes": case.bytes,
        "flops": case.flops,
        "floor_seconds": case.bytes / bandwidth,
        "bytes_per_second": case.bytes / row["seconds"],
        "share_of_bandwidth": case.bytes / row["seconds"] / bandwidth,
    }


HEAD = (
    f"{'op':16} {'case':83} {'eager':>9} {'ours':>9} {'torch':>10} {'ratio':>6} {'MB':>8} {'GB/s':>7} {'share':>6} "
    f"{'GFLOP/s':>8}"
)


def line(row: Row) -> str:
    def micro(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds * 1e6:.1f}"

    start = f"{row['op']:16} {row['case']:83}"
    if "error" in row:
        return f"{start} failed: {row['error']}"
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
    rate = f"{row['flops'] / row['seconds'] / 1e9:8.1f}" if row["flops"] else f"{'-':>8}"
    no_graph = f"  not captured: {row['no_graph_because']}" if row.get("no_graph_because") else ""
    return (
        f"{start} {micro(row.get('eager_seconds')):>9} {micro(row['seconds']):>9} "
        f"{micro(row['torch_seconds']):>10} {ratio:>6} {row['bytes'] / 1e6:8.2f} "
        f"{row['bytes_per_second'] / 1e9:7.1f} {row['share_of_bandwidth']:6.1%} {rate}{no_graph}"
    )


def cpu_row(case: Case, seconds: float) -> Row:
    timings = measure(case, seconds)
    ours = timings.pop("ours")
    peer, peer_timing = min(timings.items(), key=lambda item: item[1].median)
    return {
        "seconds": ours.median,
        "best_seconds": ours.best,
        "torch": peer,
        "torch_seconds": peer_timing.median,
        "torch_best_seconds": peer_timing.best,
        "ratio": peer_timing.median / ours.median,
        "repeats": len(ours.seconds),
    }


def cuda_row(case: Case, seconds: float, gpu: Gpu) -> Row:
    timings = measure_cuda(case, seconds, gpu)
    ours = timings.pop("ours")
    ratios = {name: ratio(ours, timing) for name, timing in timings.items() if not timing.error}
    peer = min(ratios, key=ratios.__getitem__, default=None)
    fastest = ours.graph or ours.eager
    return {
        "seconds": fastest.median,
        "best_seconds": fastest.best,
        "eager_seconds": ours.eager.median,
        "in_graph": ours.graph is not None,
        "no_graph_because": ours.no_graph_because or None,
        "torch": peer,
        "torch_seconds": compared(ours, timings[peer])[1].median if peer else None,
        "ratio": ratios[peer] if peer else None,
        "ratio_of_graphs": peer is not None and compared(ours, timings[peer])[0] is ours.graph,
        "repeats": len(ours.eager.seconds),
        "peers": {name: describe_peer(timing) for name, timing in timings.items()},
    }


def compared(ours: CudaTiming, peer: CudaTiming) -> tuple[Timing, Timing]:
    """Like with like."""
    if ours.graph is not None and peer.graph is not None:
        return ours.graph, peer.graph
    return ours.eager, peer.eager


def ratio(ours: CudaTiming, peer: CudaTiming) -> float:
    our_timing, peer_timing = compared(ours, peer)
    return peer_timing.median / our_timing.median


def describe_peer(timing: CudaTiming) -> Row:
    if timing.error:
        return {"error": timing.error}
    return {
        "eager_seconds": timing.eager.median,
        "graph_seconds": timing.graph.median if timing.graph else None,
        "no_graph_because": timing.no_graph_because or None,
    }


if __name__ == "__main__":
    sys.exit(main())
