"""Runs a batch of fuzzed calls in a process of its own, so that one that ends the process is found, with its text.

python tests/support/fuzz_worker.py IMPLEMENTATION CALLS SEED LAST       as the test does; LAST: the file with the call
python tests/support/fuzz_worker.py IMPLEMENTATION --replay "Call(...)"  that is being made
"""

import json
import mmap
import sys
from collections import Counter
from pathlib import Path

import implementations
import torch
from fuzz_calls import CPU_ONLY, OPS, calls
from fuzz_checks import check, same_bits
from fuzz_values import Ancestors, Bytes, Call, Doubles, Floats, Ints, Odd, Packed
from hypothesis import HealthCheck, Phase, given, seed, settings

inf, nan = float("inf"), float("nan")  # in a call's text
ROOM = 1 << 20  # bytes for a call's text


def run_batch(name: str, count: int, number: int, last: Path) -> Counter[str]:
    ops = [op for op in OPS if name == "cpu" or op not in CPU_ONLY]
    outcomes: Counter[str] = Counter()
    last.write_bytes(bytes(ROOM))
    with last.open("r+b") as file, mmap.mmap(file.fileno(), ROOM) as text:

        @seed(number)
        @settings(
            max_examples=count // 4,  # an example has four calls
            database=None,
            deadline=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(group=calls(ops))
        def fuzz(group: list[Call]) -> None:
            results = []
            for call in group:
                line = repr(call).encode()[: ROOM - 1] + b"\n"
                text[: len(line)] = line
                results.append(check(call, name == "cpu"))
                outcomes[f"{call.op} {'raised' if results[-1] is None else 'returned'}"] += 1
            assert same_bits(*results[:2]), "the same call in another form has other bits"

        fuzz()
    return outcomes


def main(name: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    for _ in implementations.use(name):
        if arguments[0] == "--replay":
            known = {kind.__name__: kind for kind in (Ancestors, Bytes, Call, Doubles, Floats, Ints, Odd, Packed)}
            results = check(eval(arguments[1], {**known, "inf": inf, "nan": nan}), name == "cpu")
            print("raised" if results is None else "returned")
        else:
            count, number, last = arguments
            print(json.dumps(run_batch(name, int(count), int(number), Path(last))))


if __name__ == "__main__":
    main(*sys.argv[1:])
