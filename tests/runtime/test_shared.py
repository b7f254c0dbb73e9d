"""Generations that share an engine, or a model: each owns its state, they take turns, the model is left as found."""

import asyncio
import gc
import itertools
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from captured_pair import capture
from families import families, family_config, family_model
from jobs import JOBS, NEW, PROMPTS, SETTINGS, state
from tiny import tiny_model
from tiny_pair import tiny_pair

from specbranch import Generation, SpecBranch, SpecBranchError
from specbranch.core.generation import TextStream
from specbranch.runtime.pair import KEPT

# ---- One after the other, one inside the other


def test_a_generation_inside_a_stream_changes_neither(bundled_pair, texts, untouched) -> None:
    for (outer, inner), settings in zip(itertools.pairwise(range(len(SETTINGS))), SETTINGS, strict=False):
        stream = bundled_pair.stream(PROMPTS[0], max_new_tokens=NEW, **SETTINGS[outer])
        next(stream)
        assert untouched(), settings
        assert bundled_pair.generate(PROMPTS[1], max_new_tokens=NEW, **SETTINGS[inner]).tokens == texts[6 + inner]
        for _ in stream:
            pass
        assert stream.generation is not None
        assert stream.generation.tokens == texts[outer]


def read_in_turn(engine: SpecBranch, texts: list[list[int]], count: int, seed: int) -> None:
    """Streams that are read in turn; half of them are abandoned: closed, forgotten, or left by an exception."""
    choose = random.Random(seed)
    running: list[tuple[int, TextStream]] = []
    for number in range(count):
        job = choose.randrange(len(JOBS))
        running.append((job, engine.stream(JOBS[job][0], max_new_tokens=NEW, **JOBS[job][1])))
        while running and (len(running) > 5 or number == count - 1 or choose.random() < 0.8):
            place = choose.randrange(len(running))
            job, stream = running[place]
            if choose.random() < 0.1:
                stream.close() if choose.random() < 0.5 else None
                del running[place], stream
                continue
            try:
                next(stream)
            except StopIteration:
                assert stream.generation is not None
                assert stream.generation.tokens == texts[job], JOBS[job]
                del running[place]


def test_streams_in_turn(bundled_pair, texts, untouched) -> None:
    read_in_turn(bundled_pair, texts, 40, seed=1)
    assert untouched()
    gc.collect()
    assert len(bundled_pair.pair._slots) <= KEPT
    assert all(slot.free for slot in bundled_pair.pair._slots)


@pytest.mark.nightly
def test_two_hundred_streams_leave_nothing(bundled_pair, texts, untouched) -> None:
    read_in_turn(bundled_pair, texts, 200, seed=2)
    before = tensors()
    read_in_turn(bundled_pair, texts, 200, seed=2)
    assert tensors() < 1.001 * before


def tensors() -> int:
    """Bytes of the tensors that are alive."""
    gc.collect()
    return sum(each.nbytes for each in gc.get_objects() if type(each) is torch.Tensor)


def test_a_stream_is_a_context_manager(bundled_pair, texts, untouched) -> None:
    with bundled_pair.stream(PROMPTS[0], max_new_tokens=NEW) as stream:
        pieces = [next(stream)]
        pieces += stream
    assert stream.generation is not None
    assert "".join(pieces) == stream.generation.text
    stream = bundled_pair.stream(PROMPTS[0], max_new_tokens=NEW)
    next(stream)
    with pytest.raises(ZeroDivisionError), stream:
        raise ZeroDivisionError
    assert next(stream, None) is None
    assert stream.generation is None
    assert all(slot.free for slot in bundled_pair.pair._slots)


def test_captured_generations_in_turn() -> None:
    engine = tiny_pair()
    prompts = [[5, 6, 7], [9, 8, 7, 6]]
    alone = [engine.generate(prompt, max_new_tokens=24, method="autoregressive").tokens for prompt in prompts]
    capture(engine)
    rounds = itertools.zip_longest(*[engine.stream(prompt, max_new_tokens=24)._pieces for prompt in prompts])
    found = [part for parts in rounds for part in parts if isinstance(part, Generation)]
    assert sorted(generation.tokens for generation in found) == sorted(alone)
    assert [generation.stats.target_runner for generation in found] == ["captured", "captured"]


# ---- Shared models


def test_transformers_generate_between_two_rounds(bundled_pair, texts, untouched) -> None:
    ids = torch.tensor([bundled_pair.encode(PROMPTS[0])])
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
    stream = bundled_pair.stream(PROMPTS[0], max_new_tokens=NEW)
    next(stream)
    theirs = bundled_pair.target.generate(ids, **arguments)[0, ids.shape[1] :].tolist()
    assert theirs == texts[0]
    assert bundled_pair.generate(PROMPTS[0], max_new_tokens=NEW).tokens == theirs


def test_gradients_flow_between_two_rounds() -> None:
    engine = tiny_pair()
    rounds = engine.stream([5, 6, 7], max_new_tokens=30)._pieces
    next(rounds)
    engine.target(input_ids=torch.tensor([[1, 2, 3, 4]])).logits.sum().backward()
    dead = [name for name, weight in engine.target.named_parameters() if weight.grad is None]
    assert dead == []
    next(rounds)


def test_engines_share_models_in_any_role() -> None:
    """The target of one is the draft of another, and of a third it is both."""
    one, two = tiny_model(seed=1), tiny_model(seed=2)
    engines = [SpecBranch(one, two), SpecBranch(two, one), SpecBranch(one, one), SpecBranch(one)]
    settings: list[dict[str, Any]] = [{}, {"overlap": True}, {"overlap": True}, {"method": "autoregressive"}]
    before = [state(model) for model in (one, two)]
    alone = [
        engine.generate([3, 4, 5], max_new_tokens=30, **{**each, "method": "autoregressive"}).tokens
        for engine, each in zip(engines, settings, strict=True)
    ]

    def run(place: int) -> list[int]:
        return engines[place].generate([3, 4, 5], max_new_tokens=30, **settings[place]).tokens

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(run, [place for place in range(4) for _ in range(4)]))
    assert found == [alone[place] for place in range(4) for _ in range(4)]
    assert [state(model) for model in (one, two)] == before


def test_a_model_in_training_mode_is_evaluated_and_stays_in_training() -> None:
    model: Any = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()
    engine, before = SpecBranch(model, model), state(model)
    methods = "autoregressive", "ssd"
    texts = [engine.generate([5, 6, 7], max_new_tokens=20, method=method).tokens for method in methods]
    assert state(model) == before
    model.eval()
    assert texts == [SpecBranch(model).generate([5, 6, 7], max_new_tokens=20, method="autoregressive").tokens] * 2


def test_a_training_flag_that_changes_between_two_rounds_is_kept() -> None:
    engine = tiny_pair()
    whole = engine.generate([5, 6, 7], max_new_tokens=30).tokens
    rounds = engine.stream([5, 6, 7], max_new_tokens=30)._pieces
    next(rounds)
    engine.target.train()
    *_, generation = rounds
    assert isinstance(generation, Generation)
    assert generation.tokens == whole
    assert all(module.training for module in engine.target.modules())


@pytest.mark.nightly
@pytest.mark.parametrize("family", families())
def test_a_model_of_any_family_is_left_as_found(family) -> None:
    """Refused or not; and it can be trained afterwards."""
    try:
        model = family_model(family_config(family))
    except Exception as error:
        pytest.skip(f"not made: {error}")
    model.train()
    before = state(model)
    with suppress(SpecBranchError):
        engine = SpecBranch(model, model)
        for settings in ({"method": "autoregressive"}, {"overlap": True}):
            engine.generate([3, 4, 5, 6], max_new_tokens=40, **settings)
    assert state(model) == before
    model(input_ids=torch.tensor([[3, 4, 5, 6]])).logits.sum().backward()


# ---- Threads and tasks


def from_threads(engine: SpecBranch, texts: list[list[int]], threads: int, each: int) -> None:
    jobs = random.Random(threads).choices(range(len(JOBS)), k=threads * each)
    wrong: list[Any] = []

    def run(mine: list[int]) -> None:
        for job in mine:
            try:
                tokens = engine.generate(JOBS[job][0], max_new_tokens=NEW, **JOBS[job][1]).tokens
            except Exception as error:
                wrong.append((job, repr(error)))
            else:
                if tokens != texts[job]:
                    wrong.append((job, tokens))

    workers = [threading.Thread(target=run, args=(jobs[i::threads],)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_threads_share_an_engine(bundled_pair, texts, untouched) -> None:
    from_threads(bundled_pair, texts, 8, 4)
    assert untouched()
    assert len(bundled_pair.pair._slots) <= KEPT


@pytest.mark.nightly
def test_fifty_threads_share_an_engine_and_leave_nothing(bundled_pair, texts, untouched) -> None:
    from_threads(bundled_pair, texts, 50, 4)
    before = tensors()
    from_threads(bundled_pair, texts, 50, 20)
    assert tensors() < 1.001 * before


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("shared", ["engine", "models"])
def test_no_thread_starves(bundled_pair, streamed, shared) -> None:
    """A short text is done before a long one that began earlier."""
    other = bundled_pair if shared == "engine" else SpecBranch(bundled_pair.target, bundled_pair.draft)
    order: list[str] = []
    began = threading.Event()

    class Tokens(list[int]):
        """A prompt that says when it is read."""

        def __iter__(self) -> Iterator[int]:
            began.set()
            return super().__iter__()

    def long() -> None:
        settings: dict[str, Any] = {"max_new_tokens": 300, "method": "autoregressive"}
        if streamed:
            for _ in bundled_pair.stream(Tokens([5, 6, 7]), **settings):
                pass
        else:
            bundled_pair.generate(Tokens([5, 6, 7]), **settings)
        order.append("long")

    def short() -> None:
        began.wait()
        time.sleep(0.05)  # a few rounds
        other.generate([5, 6, 7], max_new_tokens=4, method="autoregressive")
        order.append("short")

    workers = [threading.Thread(target=long), threading.Thread(target=short)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert order == ["short", "long"]


def test_tasks_share_an_engine(bundled_pair, texts, untouched) -> None:
    async def read(job: int) -> list[int]:
        with bundled_pair.stream(JOBS[job][0], max_new_tokens=NEW, **JOBS[job][1]) as stream:
            for _ in stream:
                await asyncio.sleep(0)
        assert stream.generation is not None
        return stream.generation.tokens

    async def main() -> list[list[int]]:
        return await asyncio.gather(*[read(job) for job in range(12)], asyncio.to_thread(asyncio.run, read(12)))

    assert asyncio.run(main()) == texts[:13]
