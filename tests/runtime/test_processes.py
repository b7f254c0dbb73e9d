"""An engine in a forked child, copied, and pickled into another process."""

import copy
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from jobs import NEW, PROMPTS

from specbranch import SpecBranch


def in_child(engine: SpecBranch, prompt: str, overlap: Any, answers: Any) -> None:
    answers.put(engine.generate(prompt, max_new_tokens=NEW, overlap=overlap).tokens)


def ask_child(engine: SpecBranch, overlap: Any, method: str = "fork") -> list[int]:
    context: Any = multiprocessing.get_context(method)
    answers = context.Queue()
    child = context.Process(target=in_child, args=(engine, PROMPTS[0], overlap, answers), daemon=True)
    child.start()
    try:
        tokens: list[int] = answers.get(timeout=60)
        return tokens
    finally:
        child.kill()
        child.join()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("overlap", ["auto", True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_child_generates(texts, overlap, threads) -> None:
    """Also beside a thread that is in the middle of a turn, and where OpenMP has a team, which the child has not."""
    engine = SpecBranch.from_pretrained("bundled", draft="bundled", dtype="float32", threads=threads)
    engine.generate(PROMPTS[0], max_new_tokens=NEW, overlap=True)
    over = threading.Event()

    def busy() -> None:
        while not over.is_set():
            engine.generate(PROMPTS[1], max_new_tokens=8)

    beside = threading.Thread(target=busy)
    beside.start()
    try:
        assert [ask_child(engine, overlap) for _ in range(3)] == [texts[0]] * 3
    finally:
        over.set()
        beside.join()


def in_fork(work: Callable[[], str]) -> str:
    """What `work` returns in a forked child, or the traceback; nothing if it does not end in a minute."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = work()
        except BaseException:
            answer = traceback.format_exc()
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    timer = threading.Timer(60, os.kill, (child, signal.SIGKILL))
    timer.start()
    try:
        with open(reading) as written:
            return written.read()
    finally:
        timer.cancel()
        os.waitpid(child, 0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_engine_is_made_in_a_forked_child() -> None:
    """Where OpenMP had a team, and for a target that has not been tried yet."""
    engine = SpecBranch.from_pretrained("bundled", draft="bundled", dtype="float32", threads=2)
    torch.set_num_threads(2)
    torch.ones(512, 512) @ torch.ones(512, 512)
    draft = engine.draft
    assert draft is not None

    def work() -> str:
        other = SpecBranch(draft, engine.target, threads=2)
        overlapped, plain = (
            other.generate([5, 6, 7], max_new_tokens=NEW, **settings).tokens
            for settings in ({"overlap": True}, {"method": "autoregressive"})
        )
        return "same" if overlapped == plain else f"{overlapped} instead of {plain}"

    try:
        assert in_fork(work) == "same"
    finally:
        torch.set_num_threads(1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_stream_goes_on_in_a_forked_child(bundled_pair, texts) -> None:
    stream = bundled_pair.stream(PROMPTS[0], max_new_tokens=NEW, overlap=True)
    next(stream)

    def rest() -> str:
        for _ in stream:
            pass
        assert stream.generation is not None
        return str(stream.generation.tokens)

    assert in_fork(rest) == rest() == str(texts[0])


def test_an_engine_is_copied_and_pickled_after_a_generation(texts) -> None:
    engine = SpecBranch.from_pretrained("bundled", draft="bundled", dtype="float32")
    engine.generate(PROMPTS[0], max_new_tokens=NEW, overlap=True)
    stream = engine.stream(PROMPTS[0], max_new_tokens=NEW)
    next(stream)
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine)), copy.copy(engine)):
        assert other.generate(PROMPTS[0], max_new_tokens=NEW).tokens == texts[0]
        assert other.pair.target.model.model is other.target
    assert ask_child(engine, True, "spawn") == texts[0]
