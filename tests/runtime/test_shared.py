"""Generations that share an engine, or a model: each owns its state, they take turns, the model is left as found."""

import asyncio
import copy
import gc
import itertools
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from captured_pair import capture
from families import families, family_config, family_model
from tiny import tiny_model
from tiny_pair import tiny_pair
from transformers import PreTrainedModel

from specbranch import Generation, GenerationFailed, SpecBranch, SpecBranchError, bundled
from specbranch.core.generation import TextStream
from specbranch.core.messages import Trunk
from specbranch.loop import DecodingLoop
from specbranch.runtime.pair import KEPT
from specbranch.runtime.verifier import ModelVerifier
from specbranch.runtime.workers import Threads

PROMPTS = [entry["prompt"] for entry in bundled.prompts()[:6]]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 5},
    {"method": "pearl", "overlap": True},
    {"method": "autoregressive"},
    {"method": "speculative", "length": 3, "temperature": 0.7, "top_k": 20, "seed": 1},
    {"overlap": False},
]
JOBS = [(prompt, settings) for prompt in PROMPTS for settings in SETTINGS]
NEW = 20


@pytest.fixture(scope="module")
def texts(bundled_pair: SpecBranch) -> list[list[int]]:
    """Of every job, alone and without a draft."""
    found = []
    for prompt, settings in JOBS:
        sampling = {name: settings[name] for name in ("temperature", "top_k", "seed") if name in settings}
        found.append(bundled_pair.generate(prompt, max_new_tokens=NEW, method="autoregressive", **sampling).tokens)
    return found


def state(model: PreTrainedModel) -> dict[str, Any]:
    """What a generation might leave changed."""
    return {
        "attention": [getattr(each, "config", None) and each.config._attn_implementation for each in model.modules()],
        "attributes": [sorted(vars(each)) for each in model.modules()],
        "training": [each.training for each in model.modules()],
        "hooks": [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules()],
        "weights": [(name, id(weight), weight.requires_grad) for name, weight in model.named_parameters()],
        "buffers": [(name, id(buffer), buffer.is_inference()) for name, buffer in model.named_buffers()],
        "numbers": [
            [value for value in vars(each).values() if isinstance(value, int | float)] for each in model.modules()
        ],
        "threads": torch.get_num_threads(),
    }


@pytest.fixture
def untouched(bundled_pair: SpecBranch) -> Iterator[Callable[[], bool]]:
    """Whether both models are as they were when the test began; asked once more when it is over."""
    assert bundled_pair.draft is not None
    models = bundled_pair.target, bundled_pair.draft
    before = [state(model) for model in models]

    def same() -> bool:
        return [state(model) for model in models] == before

    yield same
    assert same()


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


def test_no_thread_starves(bundled_pair, texts) -> None:
    """A short text is done before a long one that began earlier."""
    order: list[str] = []
    began = threading.Event()

    def long() -> None:
        for _ in bundled_pair.stream(PROMPTS[0], max_new_tokens=300, method="autoregressive"):
            began.set()
        order.append("long")

    def short() -> None:
        began.wait()
        bundled_pair.generate(PROMPTS[1], max_new_tokens=4, method="autoregressive")
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


# ---- Interrupts, failures, processes


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


def test_a_second_interrupt_leaves_a_verification_that_disturbs_nobody(
    bundled_pair, texts, untouched, monkeypatch
) -> None:
    verify, wait = ModelVerifier.verify, Threads.wait
    waits = itertools.count()
    asked, answered = threading.Event(), threading.Event()

    def slow(verifier: ModelVerifier, trunk: Trunk) -> Any:
        asked.set()
        answered.wait(0.5)
        answered.set()
        return verify(verifier, trunk)

    def draft(*_: object) -> None:
        asked.wait()
        raise KeyboardInterrupt

    def interrupted(workers: Threads) -> None:
        if next(waits) == 2:  # the one at the end; the others are before and behind the prefill
            raise KeyboardInterrupt
        wait(workers)

    with monkeypatch.context() as patch:
        patch.setattr(ModelVerifier, "verify", slow)
        patch.setattr(DecodingLoop, "_draft_during", draft)
        patch.setattr(Threads, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bundled_pair.generate(PROMPTS[0], max_new_tokens=NEW, overlap=True)
    assert not answered.is_set()
    assert untouched()
    assert bundled_pair.generate(PROMPTS[0], max_new_tokens=NEW, overlap=True).tokens == texts[0]
    assert answered.is_set()


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


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_an_engine_is_made_in_a_forked_child(texts) -> None:
    """Where OpenMP had a team, and for a target that has not been tried yet."""
    engine = SpecBranch.from_pretrained("bundled", draft="bundled", dtype="float32", threads=2)
    torch.set_num_threads(2)
    torch.ones(512, 512) @ torch.ones(512, 512)
    draft = engine.draft
    assert draft is not None
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        other = SpecBranch(draft, engine.target, threads=2)
        tokens = other.generate([5, 6, 7], max_new_tokens=NEW, overlap=True).tokens
        os.write(writing, b"same" if tokens == other.generate([5, 6, 7], max_new_tokens=NEW).tokens else b"else")
        os._exit(0)
    torch.set_num_threads(1)
    os.close(writing)
    timer = threading.Timer(60, os.kill, (child, signal.SIGKILL))
    timer.start()
    try:
        assert os.read(reading, 4) == b"same"
    finally:
        timer.cancel()
        os.waitpid(child, 0)


def test_a_stream_goes_on_in_a_forked_child(bundled_pair, texts) -> None:
    stream = bundled_pair.stream(PROMPTS[0], max_new_tokens=NEW, overlap=True)
    next(stream)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        for _ in stream:
            pass
        os.write(writing, b"same" if stream.generation and stream.generation.tokens == texts[0] else b"else")
        os._exit(0)
    os.close(writing)
    assert os.read(reading, 4) == b"same"
    os.waitpid(child, 0)
    for _ in stream:
        pass
    assert stream.generation is not None
    assert stream.generation.tokens == texts[0]


def test_an_engine_is_copied_and_pickled_after_a_generation(texts) -> None:
    engine = SpecBranch.from_pretrained("bundled", draft="bundled", dtype="float32")
    engine.generate(PROMPTS[0], max_new_tokens=NEW, overlap=True)
    stream = engine.stream(PROMPTS[0], max_new_tokens=NEW)
    next(stream)
    for other in (copy.deepcopy(engine), pickle.loads(pickle.dumps(engine)), copy.copy(engine)):
        assert other.generate(PROMPTS[0], max_new_tokens=NEW).tokens == texts[0]
        assert other.pair.target.model.model is other.target
    assert ask_child(engine, True, "spawn") == texts[0]
