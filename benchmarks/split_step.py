"""Where the time of a forward goes on a CPU, by op: products, attention, norms, what is between them.

    python benchmarks/split_step.py --model MODEL --role draft --rows 1 4
    python benchmarks/split_step.py --model MODEL --role target --unfused

The calls of one forward are recorded, and those of each op then repeated alone, in turn with the whole forward. What no
op accounts for is the time between them: Python, and allocations; it is below 0 where one call runs a layer's ops
without what each of them costs as an operator of torch. `--unfused` runs the modules' own forwards in turn, too.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from specbranch.cli.machine import describe_machine, describe_versions
from specbranch.core.files import write_json
from specbranch.runtime.attach import Attachment
from specbranch.runtime.batch import Inputs
from specbranch.runtime.exact import exact_forward
from specbranch.runtime.loading import load_model
from specbranch.runtime.model import CachedModel
from specbranch.runtime.packing import pack_loaded
from specbranch.runtime.sources import resolve

PRODUCTS = ("specbranch::linear", "specbranch::packed_linear")
PREFIX = 300
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Recorder(TorchDispatchMode):
    """The calls of operators, by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: defaultdict[str, list[Call]] = defaultdict(list)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.calls[func._schema.name].append((func, tuple(args), kwargs))
        return func(*args, **kwargs)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--role", choices=("target", "draft"), default="target")
    parser.add_argument("--weights", default="auto")
    parser.add_argument("--arithmetic", choices=("exact", "fast"))
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--unfused", action="store_true", help="beside the modules' own forwards")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    model = CachedModel(loaded(args), args.role)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/split_step.py", *(sys.argv[1:] if argv is None else argv)]),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "threads": args.threads,
        "splits": [split(model, rows, args.rounds, args.unfused) for rows in args.rows],
    }
    for found in report["splits"]:
        print_split(found)
    if args.out is not None:
        write_json(args.out, report)


def loaded(args: argparse.Namespace) -> Any:
    source = resolve(args.model, args.role)
    model = load_model(source, args.role, args.dtype, "cpu", arithmetic=args.arithmetic)
    pack_loaded(source, model, args.role, args.weights, args.arithmetic, args.threads)
    return model


def split(model: CachedModel, rows: int, rounds: int, unfused: bool) -> dict[str, Any]:
    """Milliseconds of a forward over `rows` rows behind a prefix, and of each op's calls in it."""
    model.reset(PREFIX + rows)
    forwards = {"fused": None, **({"unfused": exact_forward} if unfused else {})}
    attachments = {name: Attachment([model.model], forward_of=of) for name, of in forwards.items()}
    attachments["fused"].turn(lambda: model.prefill([1 + i % 500 for i in range(PREFIX)]))
    batch = model.place(range(rows), [-1] + [0] * (rows - 1), [7] * rows, [PREFIX] + [PREFIX + 1] * (rows - 1))
    inputs = Inputs.of([batch], model.device)
    calls = {name: recorded(attachments[name], lambda: model.forward(inputs)) for name in forwards}

    def seconds(name: str, work: Callable[[], object]) -> float:
        def timed() -> float:
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin

        return attachments[name].turn(timed)

    times: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in forwards}
    for _ in range(rounds):
        for name, of in times.items():
            of["forward"].append(seconds(name, lambda: model.forward(inputs)))
            for op, found in calls[name].items():
                of[op].append(seconds(name, lambda found=found: repeat(found)))  # type: ignore[misc]
    medians = {name: {op: 1000 * statistics.median(each) for op, each in of.items()} for name, of in times.items()}
    return {
        "rows": rows,
        "milliseconds": medians,
        "calls": {n: {op: len(c) for op, c in of.items()} for n, of in calls.items()},
    }


def recorded(attachment: Attachment, work: Callable[[], object]) -> dict[str, list[Call]]:
    def run() -> dict[str, list[Call]]:
        with Recorder() as recorder:
            work()
        return dict(recorder.calls)

    return attachment.turn(run)


@torch.inference_mode()
def repeat(calls: Sequence[Call]) -> None:
    for func, args, kwargs in calls:
        func(*args, **kwargs)


def print_split(found: dict[str, Any]) -> None:
    for name, times in found["milliseconds"].items():
        whole, calls = times["forward"], found["calls"][name]
        products = sum(times.get(op, 0.0) for op in PRODUCTS)
        print(f"\n{found['rows']} rows, {name}: {whole:.2f} ms, {100 * (1 - products / whole):.0f} % outside products")
        for op in sorted(calls, key=lambda op: -times[op]):
            if times[op] > 0.002 * whole:
                print(f"{times[op]:9.3f} ms {calls[op]:6} x {op}")
        left = whole - sum(times[op] for op in calls)
        print(f"{left:9.3f} ms          between them")


if __name__ == "__main__":
    main()
