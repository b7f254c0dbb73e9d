"""A generation that is interrupted or fails at any moment leaves the models as found, and the engine working."""

import gc
import itertools
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from interrupted import Tracer, file_of, named
from jobs import NEW, PROMPTS, state
from tiny import tiny_model

from specbranch import GenerationFailed, SpecBranch
from specbranch.loop import DecodingLoop
from specbranch.runtime.attention import current
from specbranch.runtime.modes import inference, no_grad, outside_inference
from specbranch.runtime.workers import Threads
from specbranch.together import Together


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("settings", [{"overlap": False}, {"overlap": True}], ids=["serial", "overlapped"])
def test_an_interrupt_at_any_moment_leaves_the_models_as_found(bundled_pair, texts, untouched, settings) -> None:
    tries, before = random.Random(0), signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for _ in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, tries.uniform(0.0002, 0.03))
                bundled_pair.generate(PROMPTS[0], max_new_tokens=NEW, **settings)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert untouched()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 0
    assert bundled_pair.generate(PROMPTS[0], max_new_tokens=NEW, **settings).tokens == texts[0]
    with ThreadPoolExecutor(1) as other:  # the locks are free too
        again = other.submit(bundled_pair.generate, PROMPTS[0], max_new_tokens=NEW, **settings)
        assert again.result(timeout=60).tokens == texts[0]


def test_modes_are_those_of_torch() -> None:
    def modes() -> tuple[bool, bool]:
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    assert inference(modes)() == (True, False)
    assert no_grad(modes)() == (False, False)
    assert outside_inference(modes)() == (False, False)
    assert inference(outside_inference(modes))() == (False, False)
    assert no_grad(inference(outside_inference(modes)))() == (False, False)
    assert outside_inference(inference(modes))() == (True, False)
    assert modes() == (False, True)


IN_EVERY_FORWARD = {"modes.py", "attention.py", "attach.py", "locks.py", "model.py", "contextlib.py", "grad_mode.py"}


@pytest.mark.parametrize(
    ("settings", "files"),
    [
        ({"overlap": False}, IN_EVERY_FORWARD),
        *(
            pytest.param(settings, None, marks=pytest.mark.nightly)
            for settings in ({"overlap": False}, {"method": "speculative", "length": 2}, {"method": "autoregressive"})
        ),
    ],
)
def test_an_interrupt_at_every_place_leaves_nothing_in_force(bundled_pair, settings, files) -> None:
    """Not even while its traceback is kept: no mode of torch, no context of a forward, nothing of the models."""

    def generate() -> None:
        bundled_pair.generate(PROMPTS[0][:20], max_new_tokens=3, **settings)

    def in_force() -> Any:
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), current()
        return modes, state(bundled_pair.target), state(bundled_pair.draft)

    generate()
    every, before = Tracer(), in_force()
    every.run(generate)
    places = [place for place in every.seen if files is None or file_of(place) in files]
    assert len(places) > 100
    kept = []
    for place in places:
        try:
            Tracer(place).run(generate)
        except KeyboardInterrupt as error:
            kept = [error]
        assert in_force() == before, named(place)
    assert kept


def test_an_interrupt_while_an_engine_is_made_leaves_the_models_as_found() -> None:
    tries, before = random.Random(0), signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for number in range(40):
            model = tiny_model(seed=number)
            model.train()
            found = state(model)
            try:
                signal.setitimer(signal.ITIMER_REAL, tries.uniform(0.0002, 0.012))
                SpecBranch(model, model)
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert state(model) == found
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 0


def test_a_second_interrupt_leaves_a_verification_that_disturbs_nobody(
    bundled_pair, texts, untouched, monkeypatch
) -> None:
    verify, wait = Together.verify, Threads.wait
    waits = itertools.count()
    asked, answered = threading.Event(), threading.Event()

    def slow(*texts: Any) -> Any:
        asked.set()
        answered.wait(0.5)
        answered.set()
        return verify(*texts)

    def draft(*_: object) -> None:
        asked.wait()
        raise KeyboardInterrupt

    def interrupted(workers: Threads) -> None:
        if next(waits) == 3:  # the one at the end; the others are before and behind the prefills
            raise KeyboardInterrupt
        wait(workers)

    with monkeypatch.context() as patch:
        patch.setattr(Together, "verify", slow)
        patch.setattr(DecodingLoop, "_draft_during", draft)
        patch.setattr(Threads, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bundled_pair.generate(PROMPTS[0], max_new_tokens=NEW, overlap=True, draft_context="all")
    assert not answered.is_set()
    assert untouched()
    assert bundled_pair.generate(PROMPTS[0], max_new_tokens=NEW, overlap=True).tokens == texts[0]
    assert answered.is_set()


def test_a_forgotten_stream_may_be_collected_while_the_target_verifies(
    bundled_pair, texts, untouched, monkeypatch
) -> None:
    """On the target's thread, which then cannot wait for the target's thread."""
    verify, collecting = Together.verify, []

    def collect(*texts: Any) -> Any:
        collecting.append(threading.current_thread() is not threading.main_thread() and gc.collect() > 0)
        return verify(*texts)

    gc.disable()
    try:
        stream = bundled_pair.stream(PROMPTS[0], max_new_tokens=NEW, overlap=True)
        next(stream)
        circle = [stream]
        circle.append(circle)
        del circle, stream
        monkeypatch.setattr(Together, "verify", collect)
        assert bundled_pair.generate(PROMPTS[0], max_new_tokens=NEW, overlap=True).tokens == texts[0]
    finally:
        gc.enable()
    assert any(collecting)
    assert all(slot.free for slot in bundled_pair.pair._slots)


def test_a_failure_at_any_round_leaves_the_models_as_found(bundled_pair, texts, untouched, monkeypatch) -> None:
    commit, left = DecodingLoop._commit, 0

    def failing(*arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise MemoryError("none left")
        return commit(*arguments)

    monkeypatch.setattr(DecodingLoop, "_commit", failing)
    for rounds in range(4):
        left = rounds
        with pytest.raises(MemoryError if rounds == 0 else GenerationFailed):
            bundled_pair.generate(PROMPTS[0], max_new_tokens=NEW, method="speculative", length=2)  # 7 rounds at least
        assert untouched()
    monkeypatch.undo()
    assert bundled_pair.generate(PROMPTS[0], max_new_tokens=NEW).tokens == texts[0]
