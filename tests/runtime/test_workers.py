"""The thread for the target: what it is given is done, whatever happens to whoever gave it."""

import gc
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial

import pytest

from specbranch.runtime.workers import Worker


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_work_is_done_in_order_on_one_thread() -> None:
    worker = Worker(1)
    order: list[int] = []

    def work(number: int) -> int:
        order.append(number)
        return threading.get_ident()

    tasks = [worker.submit(partial(work, number)) for number in range(9)]
    idents = {task.result() for task in tasks}
    assert order == list(range(9))
    assert len(idents) == 1
    assert threading.get_ident() not in idents


def test_what_work_raises_is_raised_where_it_is_asked_for() -> None:
    worker = Worker(1)
    failing, later = worker.submit(lambda: 1 // 0), worker.submit(lambda: 7)
    with pytest.raises(ZeroDivisionError):
        failing.result()
    assert later.result() == 7


def test_done_says_whether_a_result_waits() -> None:
    worker, go = Worker(1), threading.Event()
    task = worker.submit(go.wait)
    assert not task.done()
    go.set()
    worker.wait()
    assert task.done()
    assert task.result()


@pytest.mark.parametrize("interrupts", [500, pytest.param(20_000, marks=pytest.mark.nightly)])
def test_an_interrupt_at_any_moment_leaves_it_working(interrupts: int) -> None:
    worker, moments, before = Worker(1), random.Random(0), signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for _ in range(interrupts):
            try:
                signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.0001, 0.002))
                while True:
                    worker.submit(lambda: None).result()
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            worker.wait()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted == interrupts


def test_work_does_not_wait_for_itself() -> None:
    worker = Worker(1)
    worker.submit(worker.wait).result()


def until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_its_thread_ends_with_it() -> None:
    worker = Worker(1)
    local = threading.local()

    class Kept:
        pass

    def keep() -> weakref.ref[Kept]:
        local.kept = Kept()  # until the thread ends
        return weakref.ref(local.kept)

    kept = worker.submit(keep).result()
    assert kept() is not None
    del worker
    gc.collect()
    assert until(lambda: kept() is None)


EXIT = """
import os, sys, time, torch
from specbranch.runtime.workers import Worker
worker = Worker(1)
worker.submit(lambda: (time.sleep(0.5), torch.ones(9, 9) @ torch.ones(9, 9), print("done", flush=True)))
if os.fork() == 0:
    sys.exit()  # without the thread, nothing to wait for
print(os.wait()[1], flush=True)
"""


def test_python_ends_when_the_work_is_done() -> None:
    run = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, text=True, timeout=60)
    assert (run.returncode, sorted(run.stdout.split()), run.stderr) == (0, ["0", "done"], "")
