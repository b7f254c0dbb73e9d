"""torch's intra-op threads of the calling thread, and the cores that they leave."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import torch

# torch.set_num_threads itself: vLLM's CPU worker puts another function in its place, which warns and does nothing.
set_threads = torch._C.set_num_threads


def free_cores() -> list[int]:
    """Cores for work beside what this process computes: those to which none of its threads is bound, or, where none is,
    those that torch's threads leave. None where the system does not say.

    What the parent may use counts: an engine binds itself to less.
    """
    try:
        usable = os.sched_getaffinity(0) | os.sched_getaffinity(os.getppid())
    except (AttributeError, OSError):  # not Linux; a parent of another user
        return []
    bound: set[int] = set()
    for task in Path("/proc/self/task").glob("*"):
        with suppress(OSError):  # a thread that has ended
            if len(cores := os.sched_getaffinity(int(task.name))) == 1:
                bound |= cores
    if len(usable) == 1 or not bound:
        return sorted(usable)[torch.get_num_threads() :]
    return sorted(usable - bound)


def run_on(cores: Collection[int]) -> None:
    """Bind the calling thread to some cores, and the threads that it starts."""
    with suppress(AttributeError, OSError):
        os.sched_setaffinity(0, cores)
