"""Every method, and SpecBranch part by part, replayed over records at the paper's cost ratios, with overlap.

    python benchmarks/replay_table.py benchmarks/records/*_t[01].safetensors --out benchmarks/results/replay.json

A target forward takes 1, a draft forward 1 / c whatever its rows (the paper's setting: both models on hardware of their
own). One line per record, task and ratio; speeds are tokens per target forward's time, so autoregressive decoding is 1.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from specbranch.core.files import write_json
from specbranch.replay.costs import ReplayCosts
from specbranch.replay.planner import Expectation, expect, tasks_of
from specbranch.replay.record import Record

RATIOS = (5.0, 10.0, 20.0)
COLUMNS: dict[str, tuple[str, dict[str, object]]] = {
    "speculative": ("speculative", {}),
    "adaptive": ("adaptive", {}),
    "pearl": ("pearl", {}),
    "ssd": ("ssd", {}),
    "specbranch-paper": ("specbranch-paper", {}),
    "specbranch": ("specbranch", {}),
    "frugal": ("specbranch", {"min_reach": 0.3, "siblings": 4}),
    # one part less each
    "no calibration": ("specbranch", {"calibrate": False}),
    "one branch point": ("specbranch", {"hedge": "point"}),
    "no hedging": ("specbranch", {"hedge": "none"}),
    "nothing beside the path": ("specbranch", {"siblings": 0}),
    "trunk ends at the branch point": ("specbranch", {"verify_tail": False}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--row", type=float, default=0.0, help="what each further row adds to a forward (0.02)")
    args = parser.parse_args()
    results = []
    for path in args.records:
        record = Record.load(path)
        for task in tasks_of(record.texts):
            texts = [text for text in record.texts if text.task == task]
            for ratio in RATIOS:
                costs = ReplayCosts.ratio(ratio, args.row, args.row)
                row = {
                    name: expect(record, costs, method, "overlapped", o, texts) for name, (method, o) in COLUMNS.items()
                }
                print(
                    f"{path.stem} {task} c={ratio:g}:",
                    *(f"{name} {e.speedup:.2f}" for name, e in row.items()),
                    flush=True,
                )
                results.append({"record": path.stem, "task": task, "ratio": ratio, "columns": kept(row)})
    if args.out is not None:
        report = {"command": shlex.join(["python", *sys.argv]), "row": args.row, "rows": results}
        write_json(args.out, report)


def kept(row: dict[str, Expectation]) -> dict[str, dict[str, object]]:
    names = ("settings", "speedup", "tokens_per_target_forward", "rollback_rate", "wasted_per_token")
    return {column: {name: asdict(e)[name] for name in names} for column, e in row.items()}


if __name__ == "__main__":
    main()
