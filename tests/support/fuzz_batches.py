"""Batches of fuzzed calls, each in a process of its own: one that ends, or hangs, is reported with its call."""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

BATCH = 25_000  # calls
LIMIT = 900  # seconds for a batch, which takes 30 on an idle core


def run_batches(implementation: str, calls: int, seed: int = 0, prelude: str = "") -> Counter[str]:
    """Run so many calls; the numbers of those of each op that returned and that raised. Fails for the first fault.

    prelude: code that every process runs first.
    """
    found: Counter[str] = Counter()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])}
    with tempfile.TemporaryDirectory() as folder:
        last = Path(folder, "last")
        for start in range(0, calls, BATCH):
            arguments = (implementation, str(min(BATCH, calls - start)), str(seed), str(last))
            code = f"import fuzz_worker\n{prelude}\nfuzz_worker.main(*{arguments})"
            command = [sys.executable, "-c", code]
            try:
                run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
            except subprocess.TimeoutExpired:
                raise AssertionError(f"a call does not end:\n{replay(implementation, last)}") from None
            ended = f"exit {run.returncode} in\n{replay(implementation, last)}\n{run.stderr[-8000:]}"
            assert run.returncode == 0, ended
            found.update(json.loads(run.stdout.splitlines()[-1]))
            seed += 1
    return found


def replay(implementation: str, last: Path) -> str:
    """The command that makes the call again which was being made."""
    call = last.read_bytes().partition(b"\n")[0].decode() if last.exists() else ""
    return f'python tests/support/fuzz_worker.py {implementation} --replay "{call}"'
