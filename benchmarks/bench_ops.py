"""Every op of the core against the straightforward torch version and against the bytes that it must move.

python benchmarks/bench_ops.py [--threads N] [--op NAME] [--seconds S] [--json OUT]
"""

import argparse
import json
import shlex
import sys
from itertools import chain
from pathlib import Path

import torch
from cases_cache import ancestor_mask_cases, kv_commit_cases, tree_attention_cases
from cases_linear import linear_cases
from cases_sampling import draft_sample_cases, verify_cases
from op_case import measure, read_bandwidth

from specbranch.commands.machine import describe_machine, describe_versions

CASES = {
    "verify": verify_cases,
    "draft_sample": draft_sample_cases,
    "tree_attention": tree_attention_cases,
    "kv_commit": kv_commit_cases,
    "ancestor_mask": ancestor_mask_cases,
    "linear": linear_cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's intra-op threads")
    parser.add_argument("--op", choices=CASES, action="append", help="only this op; may be repeated")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each case")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    bandwidth = read_bandwidth()
    print(f"{arguments.threads} threads, memory {bandwidth / 1e9:.1f} GB/s; microseconds, medians (best)\n")
    print(f"{'op':15} {'case':62} {'ours':>16} {'torch':>16} {'ratio':>6} {'x floor':>8} {'GFLOP/s':>8}")
    rows = []
    for case in chain.from_iterable(CASES[op]() for op in arguments.op or CASES):
        timings = measure(case, arguments.seconds)
        ours = timings.pop("ours")
        peer, torch_timing = min(timings.items(), key=lambda item: item[1].median)
        floor = case.bytes / bandwidth
        ratio = torch_timing.median / ours.median
        shown = [f"{t.median * 1e6:.1f} ({t.best * 1e6:.1f})" for t in (ours, torch_timing)]
        times_floor = f"{ours.median / floor:8.1f}" if floor else f"{'-':>8}"
        rate = f"{case.flops / ours.median / 1e9:8.1f}" if case.flops else f"{'-':>8}"
        print(
            f"{case.op:15} {case.what:62} {shown[0]:>16} {shown[1]:>16} {ratio:6.2f} {times_floor} {rate}", flush=True
        )
        rows.append(
            {
                "op": case.op,
                "case": case.what,
                "seconds": ours.median,
                "best_seconds": ours.best,
                "torch": peer,
                "torch_seconds": torch_timing.median,
                "torch_best_seconds": torch_timing.best,
                "ratio": ratio,
                "bytes": case.bytes,
                "flops": case.flops,
                "floor_seconds": floor,
                "repeats": len(ours.seconds),
            }
        )
    if arguments.json is not None:
        result = {
            "command": shlex.join(["python", *sys.argv]),
            "machine": describe_machine(),
            "versions": describe_versions(),
            "threads": arguments.threads,
            "read_bytes_per_second": bandwidth,
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
