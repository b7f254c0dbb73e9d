"""Every op of the core against the straightforward torch version and against the bytes that it must move.

python benchmarks/bench_ops.py [--device cpu|cuda] [--threads N] [--op NAME] [--seconds S] [--json OUT]

On a CUDA device every function is timed with events, called from Python and as a node of a captured graph, on inputs
that rotate beyond the L2 cache; ratios compare graphs where both could be captured.
"""

import argparse
import json
import shlex
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from cases_cache import ancestor_mask_cases, kv_commit_cases, tree_attention_cases
from cases_linear import linear_cases
from cases_sampling import draft_sample_cases, verify_cases, verify_rejection_cases
from op_case import Case, CudaTiming, Timing, copy_bandwidth, measure, measure_cuda, read_bandwidth

from specbranch.commands.machine import describe_machine, describe_versions

CASES = {
    "verify": verify_cases,
    "verify_rejection": verify_rejection_cases,
    "draft_sample": draft_sample_cases,
    "tree_attention": tree_attention_cases,
    "kv_commit": kv_commit_cases,
    "ancestor_mask": ancestor_mask_cases,
    "linear": linear_cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's intra-op threads")
    parser.add_argument("--op", choices=CASES, action="append", help="only this op; may be repeated")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each case")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device (specbranch doctor says more)")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    on_cuda = arguments.device == "cuda"
    bandwidth = copy_bandwidth() if on_cuda else read_bandwidth()
    where = torch.cuda.get_device_name() if on_cuda else f"{arguments.threads} threads"
    print(f"{where}, memory {bandwidth / 1e9:.1f} GB/s; microseconds, medians\n")
    print(HEAD, flush=True)
    rows = []
    for case in chain.from_iterable(CASES[op](arguments.device) for op in arguments.op or CASES):
        row = cuda_row(case, arguments.seconds) if on_cuda else cpu_row(case, arguments.seconds)
        row |= {
            "bytes": case.bytes,
            "flops": case.flops,
            "floor_seconds": case.bytes / bandwidth,
            "bytes_per_second": case.bytes / row["seconds"],
            "share_of_bandwidth": case.bytes / row["seconds"] / bandwidth,
        }
        print(line(row), flush=True)
        rows.append(row)
    if arguments.json is not None:
        result = {
            "command": shlex.join(["python", *sys.argv]),
            "device": arguments.device if not on_cuda else where,
            "machine": describe_machine(),
            "versions": describe_versions(),
            "threads": arguments.threads,
            "bytes_per_second": bandwidth,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


HEAD = (
    f"{'op':16} {'case':83} {'eager':>9} {'ours':>9} {'torch':>10} {'ratio':>6} {'MB':>8} {'GB/s':>7} {'share':>6} "
    f"{'GFLOP/s':>8}"
)


def line(row: dict[str, Any]) -> str:
    def micro(seconds: float | None) -> str:
        return "-" if seconds is None else f"{seconds * 1e6:.1f}"

    rate = f"{row['flops'] / row['seconds'] / 1e9:8.1f}" if row["flops"] else f"{'-':>8}"
    return (
        f"{row['op']:16} {row['case']:83} {micro(row.get('eager_seconds')):>9} {micro(row['seconds']):>9} "
        f"{micro(row['torch_seconds']):>10} {row['ratio']:6.2f} {row['bytes'] / 1e6:8.2f} "
        f"{row['bytes_per_second'] / 1e9:7.1f} {row['share_of_bandwidth']:6.1%} {rate}"
    )


def cpu_row(case: Case, seconds: float) -> dict[str, Any]:
    timings = measure(case, seconds)
    ours = timings.pop("ours")
    peer, peer_timing = min(timings.items(), key=lambda item: item[1].median)
    return {
        "op": case.op,
        "case": case.what,
        "seconds": ours.median,
        "best_seconds": ours.best,
        "torch": peer,
        "torch_seconds": peer_timing.median,
        "torch_best_seconds": peer_timing.best,
        "ratio": peer_timing.median / ours.median,
        "repeats": len(ours.seconds),
    }


def cuda_row(case: Case, seconds: float) -> dict[str, Any]:
    timings = measure_cuda(case, seconds)

    def fastest(timing: CudaTiming) -> Timing:
        return timing.graph or timing.eager

    peers = {name: timing for name, timing in timings.items() if name != "ours"}
    ours, peer = timings["ours"], min(peers, key=lambda name: fastest(peers[name]).median)
    best = fastest(peers[peer])
    return {
        "op": case.op,
        "case": case.what,
        "seconds": fastest(ours).median,
        "best_seconds": fastest(ours).best,
        "eager_seconds": ours.eager.median,
        "in_graph": ours.graph is not None,
        "torch": peer,
        "torch_seconds": best.median,
        "torch_in_graph": peers[peer].graph is not None,
        "ratio": best.median / fastest(ours).median,
        "repeats": len(ours.eager.seconds),
        "peers": {
            name: {
                "eager_seconds": timing.eager.median,
                "graph_seconds": timing.graph.median if timing.graph else None,
                "no_graph_because": timing.failure or None,
            }
            for name, timing in peers.items()
        },
    }


if __name__ == "__main__":
    main()
