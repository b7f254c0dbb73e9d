"""Where the time of a captured step goes: torch's profiler over replays of one model's graphs, by kernel.

    python benchmarks/profile_steps.py --target qwen2.5-7b --draft qwen2.5-0.5b --out profile.json

Models of real shapes with random weights (traced_model.py), without a trace. `--device recording` shows that it works.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from step_alone import BURST, step_alone
from torch.profiler import ProfilerActivity, profile
from traced_model import SHAPES, plain_model
from transformers import PreTrainedModel

from specbranch.cli.machine import describe_versions
from specbranch.core.files import write_json
from specbranch.runtime.graphs.runner import CapturedRunner
from specbranch.runtime.model import CachedModel
from specbranch.runtime.placement import make_runner
from specbranch.runtime.runner import Runner

STEPS = (("target", 1), ("target", 8), ("draft", 1), ("draft", 8))
SHOWN = 25  # kernels of a step that are printed


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", choices=SHAPES, required=True)
    parser.add_argument("--draft", choices=SHAPES, required=True)
    parser.add_argument("--device", default="cuda", help="cuda or recording")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    args = parser.parse_args(argv)
    on_gpu = args.device != "recording"
    device = torch.device(args.device if on_gpu else "cpu")
    report: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/profile_steps.py", *(sys.argv[1:] if argv is None else argv)]),
        "device": torch.cuda.get_device_name(device) if on_gpu else "a recording device",
        "versions": describe_versions(),
        "steps": [],
    }
    models = {
        role: plain_model(getattr(args, role), getattr(torch, args.dtype), device) for role in ("target", "draft")
    }
    for role, rows in STEPS:
        found = profile_step(models[role], role, rows, args.replays, on_gpu)
        report["steps"].append(found)
        print_step(found)
        if args.out is not None:
            write_json(args.out, report)


def profile_step(model: PreTrainedModel, role: str, rows: int, replays: int, on_gpu: bool) -> dict[str, Any]:
    """Kernels of one step, with microseconds and launches a step."""
    runner = captured_runner(CachedModel(model, role), on_gpu)
    with runner.model.attached():
        run = step_alone(runner, rows)
        run()
        run()
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            for _ in range(replays):
                run()
    if runner.note != "captured":
        raise SystemExit(f"{role}: the steps are to be captured, but run {runner.note}")
    seconds, launches = defaultdict[str, float](float), defaultdict[str, int](int)
    for event in profiler.events() or ():
        seconds[event.name] += event.device_time_total if on_gpu else event.cpu_time_total
        launches[event.name] += 1
    steps = replays * (BURST + 1 if role == "draft" else 1)  # a burst, and the step over the root before it
    kernels = [
        {"name": name, "microseconds": seconds[name] / steps, "launches": launches[name] / steps}
        for name in sorted(seconds, key=lambda name: -seconds[name])
    ]
    return {
        "role": role,
        "rows": rows,
        "microseconds": sum(kernel["microseconds"] for kernel in kernels),
        "launches": sum(kernel["launches"] for kernel in kernels),
        "kernels": kernels,
    }


def captured_runner(model: CachedModel, on_gpu: bool) -> Runner:
    if on_gpu:
        return make_runner(model, cuda_graphs=True)
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "support"))
    return CapturedRunner(model, importlib.import_module("recording_device").RecordingDevice())


def print_step(step: dict[str, Any]) -> None:
    print(
        f"\n{step['role']}, {step['rows']} rows: {step['microseconds']:.0f} us in {step['launches']:.0f} kernels a step"
    )
    for kernel in step["kernels"][:SHOWN]:
        print(f"{kernel['microseconds']:9.1f} us {kernel['launches']:7.1f} x {kernel['name'][:90]}")


if __name__ == "__main__":
    main()
