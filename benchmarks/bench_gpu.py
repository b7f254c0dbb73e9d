"""Whole decoding on a GPU at real sizes: our methods and transformers' own, on models of real shapes.

    python benchmarks/bench_gpu.py --target llama-7b --draft llama-68m \\
        --trace benchmarks/records/coder_good_t0.safetensors

The weights are random and the logits are a recorded pair's (traced_model.py), so that no download is needed, acceptance
is real and so is the time, but for the 4 to 12 small kernels that a trace adds to every forward: they count where a
model has few itself (68M). Every contender decodes the same texts, in turn; before anything is timed each must give the
trace's tokens, and run as it is meant to: steps that are to be captured and are not end the run. Times are medians over
texts. The file of --out is rewritten after every text, so that a run that is cut off leaves what it measured.

`--device cpu --target tiny-target --draft tiny-draft` shows that it works, and no more; so does `--device recording`,
the CPU with captured steps on a stand-in for a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from op_case_cuda import copy_bandwidth
from step_alone import CANDIDATES, step_alone
from traced_model import SHAPES, Trace, kv_bytes, traced_model, weight_bytes
from transformers import PreTrainedModel

from specbranch import METHODS, SpecBranch
from specbranch.cli.bench.peers import Peers
from specbranch.cli.machine import describe_machine, describe_versions
from specbranch.core.files import write_json
from specbranch.core.stats import Round, Stats
from specbranch.replay.record import TAIL, Record, RecordedProposals, RecordedText
from specbranch.runtime.choices import PRIORITIES
from specbranch.runtime.graphs.runner import VERIFY_ROWS
from specbranch.runtime.model import CachedModel
from specbranch.runtime.placement import make_runner

ROWS = (1, 4, 8, 16)  # of the draft's steps that are measured alone
REPEATS = 12
MICRO = 1e6
OVERLAPPED = ("pearl", "ssd", "specbranch-paper", "specbranch")
BASELINE = "autoregressive"


@dataclass(frozen=True)
class Run:
    """One text by one contender: seconds after the prefill, new tokens in them, and what ours counted."""

    tokens: list[int]
    seconds: float
    decoded: int
    stats: Stats | None = None


@dataclass(frozen=True)
class Contender:
    """decode: prompt and number of new tokens to a run. captured: whether its steps must be, to be timed."""

    decode: Callable[[list[int], int], Run]
    captured: bool = False


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device, dtype = torch.device("cpu" if args.device == "recording" else args.device), getattr(torch, args.dtype)
    texts = [shortened(text, args.tokens) for text in Record.load(args.trace).texts[: args.limit]]
    length = max(text.prompt_tokens + len(text) for text in texts) + 1
    traces = {
        role: Trace(length, CANDIDATES, SHAPES[shape].vocab_size, device)
        for role, shape in (("target", args.target), ("draft", args.draft))
    }
    target = traced_model(args.target, traces["target"], True, dtype, device)
    draft = traced_model(args.draft, traces["draft"], False, dtype, device)
    check_vocabularies(target, draft)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/bench_gpu.py", *(sys.argv[1:] if argv is None else argv)]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else describe_machine()["cpu"],
        "driver_cuda": torch.version.cuda,
        "versions": describe_versions(),
        **{name: getattr(args, name) for name in ("target", "draft", "dtype", "priority")},
        "trace": args.trace.name,
        "copy_bandwidth": copy_bandwidth() if device.type == "cuda" else None,
        "weight_bytes": {"target": weight_bytes(target), "draft": weight_bytes(draft)},
    }

    def measure(contenders: dict[str, Contender], texts: Sequence[RecordedText]) -> None:
        runs: dict[str, list[Run]] = {name: [] for name in contenders}
        others = report.get("rows", [])
        for number, text in enumerate(texts):
            for name, contender in in_turn(contenders, number):
                for trace in traces.values():
                    prompt, expected = trace.load(text)
                if number == 0:
                    warm_up(name, contender, prompt, expected)
                run = contender.decode(prompt, len(expected))
                check(name, contender, run, text, expected)
                runs[name].append(run)
            report["rows"] = [
                *others,
                *(summary(name, found, texts, target, draft, report["copy_bandwidth"]) for name, found in runs.items()),
            ]
            write(args.out, report)
            print(f"{number + 1} of {len(texts)} texts", file=sys.stderr, flush=True)

    measure(our_contenders(target, draft, args), texts)
    if not args.no_steps:
        report["step_seconds"] = {
            f"{role}, {rows} rows": step_seconds(model, role, rows)
            for role, model, all_rows in (("target", target, [VERIFY_ROWS]), ("draft", draft, ROWS))
            for rows in all_rows
        }
        write(args.out, report)
    if args.peers:
        measure(transformers_contenders(target, draft, args.peers), texts[: args.peer_limit])
    print_table(report)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", choices=SHAPES, required=True)
    parser.add_argument("--draft", choices=SHAPES, required=True)
    parser.add_argument("--trace", type=Path, required=True, help="made by specbranch record, at temperature 0")
    parser.add_argument("--limit", type=int, default=10, help="only the first texts of the trace (10)")
    parser.add_argument("--tokens", type=int, help="only the first new tokens of each (all)")
    parser.add_argument("--device", default="cuda", help="cuda, cpu, or recording")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--methods", default=",".join(METHODS), help="of ours; autoregressive always runs (all)")
    parser.add_argument("--eager", action="store_true", help="also autoregressive and specbranch without graphs")
    parser.add_argument("--priority", choices=PRIORITIES, default="target", help="whose stream goes first (target)")
    parser.add_argument("--peers", default="greedy,assisted", help="transformers' own; also static; none for none")
    parser.add_argument("--peer-limit", type=int, help="only the first texts for the peers (--limit)")
    parser.add_argument("--no-steps", action="store_true", help="do not time single steps")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    args = parser.parse_args(argv)
    args.peers = [] if args.peers == "none" else args.peers.split(",")
    args.methods = list(dict.fromkeys([BASELINE, *args.methods.split(",")]))
    if unknown := [name for name in args.methods if name not in METHODS]:
        parser.error(f"unknown method {unknown[0]!r}; expected some of {', '.join(METHODS)}")
    return args


def shortened(text: RecordedText, tokens: int | None) -> RecordedText:
    """The text's first new tokens."""
    if tokens is None:
        return text

    def first(said: RecordedProposals, rows: int) -> RecordedProposals:
        return RecordedProposals(*(values[:rows] for values in vars(said).values()))

    return replace(
        text,
        tokens=text.tokens[:tokens],
        proposals=first(text.proposals, tokens),
        tails=first(text.tails, TAIL * tokens),
    )


def write(out: Path | None, report: dict[str, Any]) -> None:
    """Whole or not at all, whenever the run is cut off."""
    if out is not None:
        write_json(out, report)


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


def our_contenders(target: PreTrainedModel, draft: PreTrainedModel, args: argparse.Namespace) -> dict[str, Contender]:
    """Our methods, their steps captured where there are graphs."""
    graphs = args.device != "cpu"

    def engine(one_row: bool = False, cuda_graphs: bool = True) -> SpecBranch:
        made = SpecBranch(target, draft, priority=args.priority, cuda_graphs=cuda_graphs)
        if args.device == "recording" and cuda_graphs:
            record_steps(made)
        if one_row:
            made.pair.target.most_rows = 1
        return made

    def ours(engine: SpecBranch, method: str, overlap: bool, captured: bool = graphs) -> Contender:
        def decode(prompt: list[int], new_tokens: int) -> Run:
            generation = engine.generate(prompt, max_new_tokens=new_tokens, method=method, overlap=overlap)
            stats = generation.stats
            return Run(generation.tokens, stats.decode_seconds, len(generation.tokens), stats)

        return Contender(decode, captured)

    captured = engine()
    contenders = {name: ours(captured, name, overlap=name in OVERLAPPED) for name in args.methods}
    if "specbranch" in args.methods:
        contenders["specbranch, in turn"] = ours(captured, "specbranch", overlap=False)
    if graphs:  # for whoever only ever decodes this way, and so does not need the same bits at all row counts
        contenders["autoregressive, one row"] = ours(engine(one_row=True), BASELINE, overlap=False)
    if args.eager:
        eager = engine(cuda_graphs=False)
        contenders["autoregressive, eager"] = ours(eager, BASELINE, overlap=False, captured=False)
        contenders["specbranch, eager"] = ours(eager, "specbranch", overlap=True, captured=False)
    return contenders


def record_steps(engine: SpecBranch) -> None:
    """Captured steps without a GPU: the tests' stand-in for one."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "support"))
    importlib.import_module("captured_pair").capture(engine)


def transformers_contenders(
    target: PreTrainedModel, draft: PreTrainedModel, peers: Sequence[str]
) -> dict[str, Contender]:
    own = Peers(target, draft)

    def transformers(name: str) -> Contender:
        def decode(prompt: list[int], new_tokens: int) -> Run:
            begin = time.perf_counter()
            text = own.generate(name, prompt, max_new_tokens=new_tokens)
            seconds = time.perf_counter() - begin - text.first_seconds
            return Run(text.tokens, seconds, len(text.tokens) - text.first_tokens)

        return Contender(decode)

    return {f"transformers {name}": transformers(name) for name in peers}


def step_seconds(model: PreTrainedModel, role: str, rows: int) -> float:
    """Median device seconds of one step of a model that runs alone, its forward and what is done with the logits."""
    runner = make_runner(CachedModel(model, role), cuda_graphs=True)
    with runner.model.attached():
        run = step_alone(runner, rows)
        steps = [step for _ in range(REPEATS) for step in run()]
    if model.device.type == "cuda" and runner.note != "captured":
        raise SystemExit(f"{role}: its steps are to be captured, but run {runner.note}")
    return statistics.median(step.seconds for step in steps[len(steps) // 4 :])


def in_turn(contenders: dict[str, Contender], number: int) -> list[tuple[str, Contender]]:
    """All of them, another one first for every text."""
    items = list(contenders.items())
    start = number % len(items)
    return items[start:] + items[:start]


def warm_up(name: str, contender: Contender, prompt: list[int], expected: list[int]) -> None:
    """The whole first text once: graphs are captured, kernels loaded, and the tokens checked."""
    run = contender.decode(prompt, len(expected))
    if run.tokens != expected:
        first = next((i for i, (a, b) in enumerate(zip(run.tokens, expected, strict=False)) if a != b), len(run.tokens))
        raise SystemExit(f"{name}: token {first} of the first text is not the trace's")
    check_runners(name, contender, run)


def check(name: str, contender: Contender, run: Run, text: RecordedText, expected: list[int]) -> None:
    if run.tokens != expected:
        raise SystemExit(f"{name}: other tokens than the trace's in {text.task} {text.id}")
    check_runners(name, contender, run)


def check_runners(name: str, contender: Contender, run: Run) -> None:
    """A figure of eager steps under the name of captured ones would be worse than none."""
    if not contender.captured or run.stats is None:
        return
    for role, note in (("target", run.stats.target_runner), ("draft", run.stats.draft_runner)):
        if note not in ("captured", ""):
            raise SystemExit(f"{name}: the {role}'s steps are to be captured, but run {note}")


def summary(
    name: str,
    runs: list[Run],
    texts: Sequence[RecordedText],
    target: PreTrainedModel,
    draft: PreTrainedModel,
    bandwidth: float | None,
) -> dict[str, Any]:
    """Medians over the texts so far of one contender; parts of a round are medians over all rounds, in microseconds."""
    row: dict[str, Any] = {
        "name": name,
        "texts": len(runs),
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
    row["parts"] = parts([round for one in stats for round in one.log[min(2, len(one.log) - 1) :]])
    if bandwidth is not None:
        shares = []
        for one, text in zip(stats, texts, strict=False):
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
    base = next(row["tokens_per_second"] for row in rows if row["name"] == BASELINE)
    print(f"{report['target']} / {report['draft']}, {report['dtype']}, {report['trace']}, {report['device']}")
    print(
        f"{'':26}{'runner':>10}{'tokens/s':>10}{'x':>7}{'per fwd':>9}{'rollback':>10}{'bubbles':>9}{'round':>9}"
        f"{'neither':>9}{'/longer':>9}"
    )
    for row in rows:
        runner = row["runners"]["target"].split(":")[0] if "runners" in row else "-"
        line = f"{row['name']:26}{runner:>10}{row['tokens_per_second']:10.1f}{row['tokens_per_second'] / base:7.2f}"
        if "parts" in row:
            line += f"{row['tokens_per_target_forward']:9.2f}{row['rollback_rate']:10.2f}{row['bubble_share']:9.2f}"
            line += f"{row['parts']['round']:9.0f}{row['parts']['neither']:9.0f}{row['parts']['over_longer_side']:9.2f}"
        print(line)
    for step, seconds in report.get("step_seconds", {}).items():
        print(f"{step:26}{seconds * MICRO:10.0f} us")


if __name__ == "__main__":
    main()
