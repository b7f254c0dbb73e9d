"""Locks that an interrupt cannot leave locked.

An interrupt (Ctrl-C) may arrive between any two bytecodes of the main thread, so also between taking a lock and
entering the block that gives it back. (CPython 3.11 does not look for one within a `with` over a lock itself, which is
no promise; it does in whatever is built on locks in Python, such as a condition or a queue.Queue.) It never arrives
within a call into C. So a lock is taken and noted in one such call, and given back in another, the first thing that
happens however the work ends.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

Lock: Any = type(threading.RLock())
"""A lock that its thread may take again."""

run_out: Callable[[Iterator[object]], None] = deque[object](maxlen=0).extend
"""Take everything from an iterator, and drop it: a call into C, if the iterator is made of C functions."""


def locked(locks: Sequence[Any], work: Callable[[], T]) -> T:
    """What `work` returns or raises, called when this thread has all the locks; waits for each in turn."""
    held: list[Any] = []
    take = map(held.append, filter(Lock.acquire, locks))
    give = map(Lock.release, held)
    try:
        run_out(take)
        return work()
    finally:
        run_out(give)
