"""vLLM's CPU build as a peer of our methods: the same models and prompts, in a process of another Python.

vLLM's dependencies cannot share our environment, so PYTHON names the Python of one that has it; vllm_worker.py is what
runs there. It is set up as vLLM's documentation advises for one request at a time, on as many cores as we use.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbranch.cli.bench.process import ChildProcess, PeerProcess, last_line

if TYPE_CHECKING:
    from specbranch.cli.bench.peers import PeerText

PYTHON = "SPECBRANCH_VLLM_PYTHON"
WORKER = Path(__file__).with_name("vllm_worker.py")
SPECULATIVE_TOKENS = {"vllm-plain": 0, "vllm-2": 2, "vllm-4": 4, "vllm-6": 6}  # by name
NAMES = tuple(SPECULATIVE_TOKENS)
LEAST_CACHE = 1 << 28  # bytes

_ERROR = re.compile(r"(?:^|\] |\) )((?:\w+\.)*\w*(?:Error|Exception): .+)")  # behind the prefix of vLLM's log, if any


def versions() -> dict[str, str | None]:
    """Versions of vLLM and its surroundings.

    Raises ValueError where PYTHON is not set or is no Python with vLLM.
    """
    command = [_python(), str(WORKER), "versions"]
    done = subprocess.run(command, env=_environment({}), capture_output=True, text=True, errors="replace")
    try:
        found: dict[str, str | None] = json.loads(done.stdout)
        version = found["vllm"]
    except (ValueError, TypeError, KeyError):
        said = last_line(done.stderr) or f"it ended with status {done.returncode}"
        raise ValueError(f"{PYTHON}: {command[0]} does not run as a Python: {said}") from None
    if version is None:
        raise ValueError(f"{PYTHON}: {command[0]} has no vllm")
    return found


class VllmProcess(ChildProcess):
    """A process that answers in lines of JSON, as vllm_worker.py does.

    setup: what it is to load. environment: more than ours. Raises ChildProcessError where it does not start, and then
    keeps its log.
    """

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], setup: Mapping[str, Any]
    ) -> None:
        super().__init__(name, command, _environment(environment), answers=True)
        try:
            if self._ask(dict(setup)) != {"ready": True}:
                raise self._nonsense()
        except BaseException:
            self.close()
            raise

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self._begin()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = b""
        with suppress(OSError):  # nobody is there: the empty line says so
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise self._ended(self._cause())
        try:
            answer = json.loads(line)
        except ValueError:
            raise self._nonsense() from None
        if not isinstance(answer, dict):
            raise self._nonsense()
        if isinstance(error := answer.get("error"), str):
            raise self._failure(self._cause(error))
        return answer

    def _cause(self, error: str = "") -> str:
        """The first error in the log since the last question, as the one that vLLM raises says only that there was one;
        else that error, or the last line. Of what it only warns of nothing ended."""
        said = self._said()
        lines = (line for line in said.splitlines() if " WARNING " not in line)
        named = next((match[1] for line in lines if (match := _ERROR.search(line))), None)
        return named or error or last_line(said)


class VllmEngine(VllmProcess, PeerProcess):
    """One engine.

    setup: as the worker's `Engine` takes it; cores: those that it computes on. stop: the tokens that end a text. Raises
    ChildProcessError where the engine does not start, and then keeps its log.
    """

    def __init__(self, name: str, setup: Mapping[str, Any], *, cores: Sequence[int], stop: Sequence[int]) -> None:
        self._stop = list(stop)
        setup = {**setup, "speculative_tokens": SPECULATIVE_TOKENS[name]}
        super().__init__(name, [_python(), str(WORKER)], bound_to(cores), setup)

    def generate(self, ids: Sequence[int], **options: Any) -> PeerText:
        """As `PeerProcess.generate`. Seconds are those of the request, measured beside vLLM."""
        from specbranch.cli.bench.peers import PeerText

        answer = self._ask({"ids": list(ids), "stop": self._stop, **options})
        match answer:
            case {
                "tokens": list(tokens),
                "first_tokens": int(first),
                "first_seconds": float(first_seconds),
                "seconds": float(seconds),
            } if all(isinstance(token, int) for token in tokens):
                if 0 <= first <= len(tokens) and 0 <= first_seconds <= seconds:
                    return PeerText(tokens, first, first_seconds, seconds)
        raise self._nonsense()

    def check_sampling(self, ids: Sequence[int]) -> None:
        """Raise ChildProcessError if this engine does not sample as it is asked to: of one candidate a token must come
        out greedy. vLLM 0.32.0 on a CPU reads uninitialised parameters when it verifies drafts at a temperature."""
        options: dict[str, Any] = {"max_new_tokens": 8, "top_p": 1.0, "min_p": 0.0, "seed": 0}
        greedy = self.generate(ids, temperature=0.0, top_k=0, **options).tokens
        try:
            found = "other tokens than the likeliest came"
            if self.generate(ids, temperature=1.0, top_k=1, **options).tokens == greedy:
                return
        except ChildProcessError as error:
            found = str(error)
        raise self._failure(f"this vLLM does not sample as asked; tried with --top-k 1: {found}")


def bound_to(cores: Sequence[int]) -> dict[str, str]:
    """The environment of an engine that computes on these cores."""
    return {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}


def cores(threads: int) -> list[int]:
    """As many of the cores that this process may use, hyperthreads of a core that is taken already last."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)

    def place(core: int) -> tuple[int, int]:
        siblings = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        numbers = [core]
        with suppress(OSError, ValueError):
            parts = [part.split("-") for part in siblings.read_text().split(",")]
            numbers = [number for part in parts for number in range(int(part[0]), int(part[-1]) + 1)]
        return sum(number < core and number in usable for number in numbers), core

    return sorted(usable, key=place)[:threads]


def _python() -> str:
    named = os.environ.get(PYTHON)
    if not named:
        raise ValueError(f"--peers vllm needs {PYTHON}: the Python of an environment that has vllm")
    found = shutil.which(named)
    if found is None:
        raise ValueError(f"{PYTHON}: there is no program {named}")
    return found


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """Ours without what leads a Python to our packages. Nothing is asked of the network: the models are here."""
    ours = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return {**ours, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", **more}
