"""What `allowed` costs on the CPU: each op with a mask over the same call without, in turn, medians.

chrt -f 1 python benchmarks/bench_allowed.py [--threads 1] [--seconds 0.5] [--op verify]
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from cases_sampling import MASKS, QWEN, allowed_tokens, peaked_logits
from op_case import in_turn, second_call
from torch import Tensor

from specbranch_ext import draft_sample, verify, verify_rejection

OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "top_k 50": {"temperature": 1.0, "top_k": 50},
}


def call(op: str, logits: Tensor, options: dict[str, Any], allowed: Tensor | None) -> object:
    n = len(logits)
    positions, tokens = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    if op == "verify":
        return verify(logits, tokens, positions - 1, positions, allowed=allowed, **options)
    if op == "draft_sample":
        return draft_sample(logits, positions, 8, allowed=allowed, **options)
    return verify_rejection(logits, logits[1:], tokens, positions, allowed=allowed, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each line")
    parser.add_argument("--op", action="append", choices=["verify", "draft_sample", "verify_rejection"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"{'':55}{'without':>10}" + "".join(f"{mask:>13}" for mask in MASKS))
    for op in arguments.op or ("verify", "draft_sample", "verify_rejection"):
        for dtype in (torch.float32, torch.bfloat16):
            for n in (1, 8, 16):
                logits = peaked_logits(n, QWEN, "cpu").to(dtype)
                masks = {"": None} | {mask: allowed_tokens(n, QWEN, mask, "cpu")[1] for mask in MASKS}
                for name, options in OPTIONS.items():
                    timers: dict[str, Callable[[], float]] = {
                        mask: functools.partial(second_call, functools.partial(call, op, logits, options, allowed))
                        for mask, allowed in masks.items()
                    }
                    found = {mask: timing.median for mask, timing in in_turn(timers, arguments.seconds).items()}
                    what = f"{op}, {n} rows, {str(dtype).removeprefix('torch.')}, {name}"
                    ratios = "".join(f"{found[mask] / found['']:13.2f}" for mask in MASKS)
                    print(f"{what:55}{found[''] * 1e6:7.0f} us{ratios}", flush=True)


if __name__ == "__main__":
    main()
