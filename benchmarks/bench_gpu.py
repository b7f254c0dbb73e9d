"""Whole decoding on a GPU at real sizes: our methods and transformers' own, on models of real shapes.

    python benchmarks/bench_gpu.py --target llama-7b --draft llama-68m \\
        --trace benchmarks/records/coder_good_t0.safetensors

The weights are random and the logits are a recorded pair's (traced_model.py), so that no download is needed, acceptance
is real and so is the time. Every contender decodes the same texts, in turn; before anything is timed each must give the
trace's tokens. Times are medians over texts. With `--device cpu --target tiny-target --draft tiny-draft` it shows that
it works, and no more.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from op_case_cuda import copy_bandwidth
from traced_model import SHAPES, Trace, kv_bytes, traced_model, weight_bytes
from transformers import PreTrainedModel

from specbranch import SpecBranch
from specbranch.commands.machine import describe_machine, describe_versions
from specbranch.commands.peers import Peers
from specbranch.drafter import always
from specbranch.model import CachedModel
from specbranch.placement import make_runner
from specbranch.record import Record, RecordedText
from specbranch.sampling import Sampling
from specbranch.stats import Round, Stats
from specbranch.steps import Step
from specbranch.tree import Tree

CANDIDATES = 6
ROWS = (1, 4, 8, 16)  # of the steps that are measured alone
REPEATS = 12
BURST = 8
PREFIX = 256  # tokens behind which they are
MICRO = 1e6


@dataclass(frozen=True)
class Run:
    """One text by one contender: seconds after the prefill, new tokens in them, and what ours counted."""

    tokens: list[int]
    seconds: float
    decoded: int
    stats: Stats | None = None


Contender = Callable[[list[int], int], Run]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    record = Record.load(args.trace)
    texts = record.texts[: args.limit]
    length = max(text.prompt_tokens + len(text) for text in texts) + 1
    traces = {
        role: Trace(length, CANDIDATES, SHAPES[shape].vocab_size, device)
        for role, shape in (("target", args.target), ("draft", args.draft))
    }
    target = traced_model(args.target, traces["target"], True, dtype, device)
    draft = traced_model(args.draft, traces["draft"], False, dtype, device)
    check_vocabularies(target, draft)
    bandwidth = copy_bandwidth() if device.type == "cuda" else None
    contenders = make_contenders(target, draft, args.peers, device)
    runs: dict[str, list[Run]] = {name: [] for name in contenders}
    for number, text in enumerate(texts):
        for name, contender in in_turn(contenders, number):
            for trace in traces.values():
                prompt, expected = trace.load(text)
            if number == 0:
                warm_up(name, contender, prompt, expected)
            run = contender(prompt, len(expected))
            check(name, text, run.tokens, expected)
            runs[name].append(run)
        print(f"{number + 1} of {len(texts)} texts", file=sys.stderr, flush=True)
    report = {
        "command": shlex.join(["python", "benchmarks/bench_gpu.py", *(sys.argv[1:] if argv is None else argv)]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else describe_machine()["cpu"],
        "driver_cuda": torch.version.cuda,
        "versions": describe_versions(),
        "target": args.target,
        "draft": args.draft,
        "dtype": args.dtype,
        "trace": args.trace.name,
        "texts": len(texts),
        "copy_bandwidth": bandwidth,
        "step_seconds": {
            f"{role}, {rows} rows": step_seconds(model, role, rows)
            for role, model in (("target", target), ("draft", draft))
            for rows in ROWS
        },
        "weight_bytes": {"target": weight_bytes(target), "draft": weight_bytes(draft)},
        "rows": [summary(name, found, texts, target, draft, bandwidth) for name, found in runs.items()],
    }
    print_table(report)
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", choices=SHAPES, required=True)
    parser.add_argument("--draft", choices=SHAPES, required=True)
    parser.add_argument("--trace", type=Path, required=True, help="made by specbranch record, at temperature 0")
    parser.add_argument("--limit", type=int, default=10, help="only the first texts of the trace (10)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--peers", default="greedy,static,assisted", help="transformers' own; none for none")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    args = parser.parse_args(argv)
    args.peers = [] if args.peers == "none" else args.peers.split(",")
    return args


def check_vocabularies(target: PreTrainedModel, draft: PreTrainedModel) -> None:
    """Ids are folded into each model's own vocabulary, so both must fold alike: a larger one is padding."""
    sizes = target.config.vocab_size, draft.config.vocab_size
    if max(sizes) - min(sizes) > 256:
        raise SystemExit(
            f"target and draft have vocabularies of {sizes[0]} and {sizes[1]}: choose shapes of one family"
        )
    smaller = min(sizes)
    for model in (target, draft):
        trace: Any = model.trace
        trace.vocabulary = smaller


def make_contenders(
    target: PreTrainedModel, draft: PreTrainedModel, peers: Sequence[str], device: torch.device
) -> dict[str, Contender]:
    """Ours, captured and eager where there are graphs, and transformers'."""
    engine = SpecBranch(target, draft, tokenizer=None)
    eager = SpecBranch(target, draft, tokenizer=None, cuda_graphs=False)

    def ours(engine: SpecBranch, method: str, overlap: bool) -> Contender:
        def run(prompt: list[int], new_tokens: int) -> Run:
            generation = engine.generate(prompt, max_new_tokens=new_tokens, method=method, overlap=overlap)
            stats = generation.stats
            return Run(generation.tokens, stats.decode_seconds, len(generation.tokens), stats)

        return run

    def transformers(name: str) -> Contender:
        own = Peers(target, draft)

        def run(prompt: list[int], new_tokens: int) -> Run:
            begin = time.perf_counter()
            text = own.generate(name, prompt, max_new_tokens=new_tokens)
            seconds = time.perf_counter() - begin - text.first_seconds
            return Run(text.tokens, seconds, len(text.tokens) - text.first_tokens)

        return run

    contenders = {
        "autoregressive": ours(engine, "autoregressive", False),
        "speculative": ours(engine, "speculative", False),
        "adaptive": ours(engine, "adaptive", False),
        "pearl": ours(engine, "pearl", True),
        "ssd": ours(engine, "ssd", True),
        "specbranch-paper": ours(engine, "specbranch-paper", True),
        "specbranch": ours(engine, "specbranch", True),
        "specbranch, in turn": ours(engine, "specbranch", False),
    }
    if device.type == "cuda":
        contenders["autoregressive, eager"] = ours(eager, "autoregressive", False)
        contenders["specbranch, eager"] = ours(eager, "specbranch", True)
    return contenders | {f"transformers {name}": transformers(name) for name in peers}


def step_seconds(model: PreTrainedModel, role: str, rows: int) -> float:
    """Median device seconds of one step of a model that runs alone, its forward and what is done with the logits."""
    runner = make_runner(CachedModel(model, role), cuda_graphs=True)
    runner.model.reset(PREFIX + 1)
    tree = Tree.rooted(1, PREFIX)
    for _ in range(rows):
        tree = tree.hang(0, 1)
    steps: list[Step] = []
    with runner.model.attached():
        runner.prefill([1] * PREFIX)
        for _ in range(REPEATS):
            runner.model.cache.rollback(PREFIX)
            if role == "draft":
                runner.draft(runner.model.place(tree, [0]), CANDIDATES, model.config.vocab_size, Sampling(), 1, always)
                batch = runner.model.place(tree, range(1, rows + 1))
                guesses = runner.draft(batch, CANDIDATES, model.config.vocab_size, Sampling(), BURST, always)
                steps += [guess.step for guess in guesses]
            else:
                batch = runner.model.place(tree, range(rows))
                steps.append(runner.verify(batch, [-1] + [0] * (rows - 1), Sampling()).result().step)
    return statistics.median(step.seconds for step in steps[len(steps) // 4 :])


def in_turn(contenders: dict[str, Contender], number: int) -> list[tuple[str, Contender]]:
    """All of them, another one first for every text."""
    items = list(contenders.items())
    start = number % len(items)
    return items[start:] + items[:start]


def warm_up(name: str, contender: Contender, prompt: list[int], expected: list[int]) -> None:
    """The whole first text once: graphs are captured, kernels loaded, and the tokens checked."""
    got = contender(prompt, len(expected)).tokens
    if got != expected:
        first = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), len(got))
        raise SystemExit(f"{name}: token {first} of the first text is not the trace's")


def check(name: str, text: RecordedText, tokens: list[int], expected: list[int]) -> None:
    if tokens != expected:
        raise SystemExit(f"{name}: other tokens than the trace's in {text.task} {text.id}")


def summary(
    name: str,
    runs: list[Run],
    texts: Sequence[RecordedText],
    target: PreTrainedModel,
    draft: PreTrainedModel,
    bandwidth: float | None,
) -> dict[str, Any]:
    """Medians over texts of one contender; parts of a round are medians over all rounds, in microseconds."""
    row: dict[str, Any] = {
        "name": name,
        "tokens_per_second": statistics.median(run.decoded / run.seconds for run in runs),
        "per_text": [run.decoded / run.seconds for run in runs],
    }
    stats = [run.stats for run in runs if run.stats is not None]
    if not stats:
        return row
    counted = [one.as_dict() for one in stats]
    for key in ("tokens_per_target_forward", "rollback_rate", "hit_rate", "acceptance_rate"):
        row[key] = statistics.median(values[key] for values in counted)
    row["bubble_share"] = statistics.median(one.bubble_seconds / (2 * one.decode_seconds) for one in stats)
    row["runners"] = {"target": stats[0].target_runner, "draft": stats[0].draft_runner}
    row["parts"] = parts([round for one in stats for round in one.log[2:]])
    if bandwidth is not None:
        shares = []
        for one, text in zip(stats, texts, strict=True):
            middle = text.prompt_tokens + len(text) // 2
            each = {model: weight_bytes(model) + kv_bytes(model, middle) for model in (target, draft)}
            moved = one.target_forwards * each[target] + one.draft_forwards * each[draft]
            shares.append(moved / bandwidth / one.decode_seconds)
        row["bandwidth_share"] = statistics.median(shares)
    return row


def parts(rounds: Sequence[Round]) -> dict[str, float]:
    """What a round takes: each side's forwards, one draft step, the time when neither model works, and the round over
    its longer side."""
    longer = [max(sum(s.seconds for s in round.target), sum(s.seconds for s in round.draft)) for round in rounds]
    steps = [step.seconds for round in rounds for step in round.draft]
    found = {
        "round": [round.seconds for round in rounds],
        "target": [sum(step.seconds for step in round.target) for round in rounds],
        "draft": [sum(step.seconds for step in round.draft) for round in rounds],
        "draft_step": steps or [0.0],
        "neither": [round.outside_seconds for round in rounds],
    }
    micro = {name: statistics.median(values) * MICRO for name, values in found.items()}
    over = statistics.median(round.seconds / long for round, long in zip(rounds, longer, strict=True) if long > 0)
    return {**micro, "over_longer_side": over}


def print_table(report: dict[str, Any]) -> None:
    rows = report["rows"]
    base = next(row["tokens_per_second"] for row in rows if row["name"] == "autoregressive")
    print(f"{report['target']} / {report['draft']}, {report['dtype']}, {report['trace']}, {report['device']}")
    print(f"{'':26}{'tokens/s':>10}{'x':>7}{'per fwd':>9}{'rollback':>10}{'bubbles':>9}{'round':>9}{'neither':>9}")
    for row in rows:
        line = f"{row['name']:26}{row['tokens_per_second']:10.1f}{row['tokens_per_second'] / base:7.2f}"
        if "parts" in row:
            line += f"{row['tokens_per_target_forward']:9.2f}{row['rollback_rate']:10.2f}{row['bubble_share']:9.2f}"
            line += f"{row['parts']['round']:9.0f}{row['parts']['neither']:9.0f}"
        print(line)


if __name__ == "__main__":
    main()
