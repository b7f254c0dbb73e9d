"""Replayed speeds beside measured ones: decode tokens per second of a `specbranch bench` report, method by method.

    python benchmarks/check_replay.py RECORD BENCH.json

The record must hold the same prompts and costs measured on the machine of the report. "auto" is replayed as it ran:
both modes tried, then the faster one. Methods retrieve where they did; then the record needs the prompts' tokens too
(`specbranch record --prompt-ids`). Where the machine was faster in one minute than in the other, compare ratios to
autoregressive decoding.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from specbranch.policies.methods import METHODS, make_policy
from specbranch.replay.costs import ReplayCosts
from specbranch.replay.record import Record
from specbranch.replay.replayer import replay


def main() -> None:
    record = Record.load(Path(sys.argv[1]))
    report = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    texts = {(text.task, text.id): text for text in record.texts}
    columns = f"{'measured':>9} {'replayed':>9} {'off by':>7} {'ratios':>7}"
    print(f"{'method':18} {columns}   tokens per forward: measured, replayed")
    alone = 1.0
    for method in METHODS:
        runs = [run for run in report["records"] if run["name"] == method and (run["task"], run["id"]) in texts]
        if not runs:
            continue
        chosen = [texts[run["task"], run["id"]] for run in runs]
        overlap = {"auto": None, "on": True, "off": False}[report["settings"]["overlap"]]
        retrieval = any(run["stats"].get("retrieved_tokens") for run in runs)
        policy = make_policy(method, {})
        stats = replay(record, policy, ReplayCosts.of(record), overlap, chosen, retrieval=retrieval)
        tokens, forwards = sum(run["new_tokens"] for run in runs), sum(run["stats"]["target_forwards"] for run in runs)
        measured = tokens / sum(run["seconds"] - run["prefill_seconds"] for run in runs)
        replayed = sum(s.new_tokens for s in stats) / sum(s.seconds for s in stats)
        per_forward = sum(s.new_tokens for s in stats) / sum(s.target_forwards for s in stats)
        off = replayed / measured
        if method == "autoregressive":
            alone = off
        print(
            f"{method:18} {measured:9.2f} {replayed:9.2f} {off - 1:+7.1%} {off / alone - 1:+7.1%}   "
            f"{tokens / forwards:.2f}, {per_forward:.2f}"
        )


if __name__ == "__main__":
    main()
