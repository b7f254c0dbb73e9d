"""Commands that are killed at some moment, in processes forked from one that has everything imported.

As a script it answers a line of standard input with a line, as `Killer.run` sends and reads them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


class Killer:
    """A process that runs commands of specbranch and kills them."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Killer:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, command: list[str], after: float | None = None) -> tuple[int, float, str]:
        """Run a command, and kill it after so many seconds. Gives its exit status (-9 if it was killed), how long it
        ran, and what it said."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"command": command, "after": after}) + "\n")
        self._process.stdin.flush()
        status, seconds, said = json.loads(self._process.stdout.readline())
        return status, seconds, said


def main() -> None:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import specbranch.engine
    import specbranch.replay.measure
    import specbranch.replay.planner
    import specbranch.replay.recorder
    import specbranch.replay.train_hrad  # noqa: F401
    from specbranch.cli.main import main

    assert torch.get_num_threads() == 1, "a forked process has none of the threads"
    said = Path(f"/tmp/killed-{os.getpid()}")
    for line in sys.stdin:
        wanted = json.loads(line)
        began = time.perf_counter()
        if (child := os.fork()) == 0:
            with said.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os._exit(main(wanted["command"]))
        if wanted["after"] is not None:
            time.sleep(wanted["after"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        answer = os.waitstatus_to_exitcode(status), time.perf_counter() - began, said.read_text()
        said.unlink()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
