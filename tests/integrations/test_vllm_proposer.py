"""The proposer for vLLM, driven as vLLM drives it, by an engine that knows what the target says."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_vllm import FakeVllm, Request, make_proposer, vllm_config
from torch import nn

from specbranch import SpecBranch, SpecBranchError, bundled
from specbranch.drafters.model import ModelDrafter
from specbranch.integrations.vllm import SpecBranchProposer, with_cores
from specbranch.proposer import drafting, proposer
from specbranch.proposer.recognition import Row, recognise
from specbranch.proposer.step_costs import Round
from specbranch.runtime import model as runtime_model
from specbranch.runtime import threads
from specbranch.together import Together

NEW = 48
CACHE = 0.0012  # GiB: of two texts of the bundled draft


@pytest.fixture(scope="module")
def references() -> list[tuple[list[int], list[int]]]:
    """Prompts, and what the target goes on with."""
    engine = SpecBranch.from_pretrained("bundled", dtype="float32", method="autoregressive", threads=1)
    lines = (bundled.path("target").parent / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [engine.encode(json.loads(line)["prompt"]) for line in lines[:6]]
    return [(prompt, engine.generate(prompt, max_new_tokens=NEW).tokens) for prompt in prompts]


@pytest.fixture
def requests(references: list[tuple[list[int], list[int]]]) -> list[Request]:
    return [Request(prompt, answer) for prompt, answer in references]


@pytest.fixture
def faultless(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING] == []


# ---- Rounds


@pytest.mark.usefixtures("faultless")
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_most_proposed_tokens_are_the_targets(requests: list[Request], overlap: str) -> None:
    engine = FakeVllm(make_proposer(overlap=overlap))
    for request in requests:
        engine.rows = [request]
        engine.run()
    drafted, taken = sum(each.drafted for each in requests), sum(each.taken for each in requests)
    assert taken > 0.6 * drafted
    assert sum(each.steps for each in requests) < 0.8 * NEW * len(requests)


@pytest.mark.usefixtures("faultless")
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_proposals_are_those_of_one_request_alone(requests: list[Request], overlap: str) -> None:
    """Whatever shares the batch, moves in it, waits or leaves: a text's drafts are its own."""
    alone = make_proposer()
    expected: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
        engine = FakeVllm(alone)
        engine.rows = [Request(request.whole[: request.prompt], request.whole[request.prompt :])]
        (only,) = engine.rows
        engine.run()
        expected[i] = [only.drafted, only.taken]
    generator = random.Random(0)
    engine = FakeVllm(make_proposer(overlap=overlap))
    waiting: list[Request] = []
    coming = list(requests)
    while engine.rows or waiting or coming:
        if coming and generator.random() < 0.5:
            engine.rows.append(coming.pop())
        if engine.rows and generator.random() < 0.2:  # preempted
            waiting.append(engine.rows.pop(generator.randrange(len(engine.rows))))
        if waiting and generator.random() < 0.5:
            engine.rows.insert(0, waiting.pop())
        generator.shuffle(engine.rows)
        engine.step()
    assert all(request.over for request in requests)
    assert sum(each.taken for each in requests) > 0.6 * sum(each.drafted for each in requests)
    assert sum(each.steps for each in requests) < 0.85 * NEW * len(requests)


@pytest.mark.usefixtures("faultless")
def test_equal_requests_are_all_served(references: list[tuple[list[int], list[int]]]) -> None:
    engine = FakeVllm(make_proposer())
    engine.rows = [Request(*references[0]) for _ in range(5)]
    rows = list(engine.rows)
    engine.run()
    assert len({row.taken for row in rows}) == 1
    assert rows[0].taken > 0


@pytest.mark.usefixtures("faultless")
def test_a_prompt_that_is_read_in_parts_gets_nothing_yet(requests: list[Request]) -> None:
    engine = FakeVllm(make_proposer())
    engine.rows = requests[:2]
    for _ in range(4):
        proposals = engine.step(reading=[requests[1]])
        assert proposals[1] == []
    engine.run()
    assert requests[1].taken > 0


@pytest.mark.usefixtures("faultless")
def test_steps_that_were_not_asked_for_are_caught_up_with(requests: list[Request]) -> None:
    """vLLM asks no proposer while any request is near the end of its context."""
    engine = FakeVllm(make_proposer())
    engine.rows = [requests[0]]
    for _ in range(5):
        engine.step()
    known = list(engine.proposer._proposer.texts)
    requests[0].proposal = []
    for _ in range(21):
        requests[0].verify()
    before = requests[0].taken
    engine.run()
    assert list(engine.proposer._proposer.texts) == known
    assert requests[0].taken > before


@pytest.mark.usefixtures("faultless")
def test_never_more_than_asked_for(requests: list[Request]) -> None:
    engine = FakeVllm(make_proposer(most=3, overlap="on"))
    engine.rows = requests[:3]
    while engine.rows:
        assert max(map(len, engine.step())) <= 3


@pytest.mark.usefixtures("faultless")
@pytest.mark.parametrize(("prompt", "draft_context"), [(8, "auto"), (400, "32+16")])
def test_texts_up_to_the_end_of_the_context(prompt: int, draft_context: str) -> None:
    """And with caches that grow on the way there."""
    engine = FakeVllm(make_proposer(draft_context=draft_context))
    generator = random.Random(1)
    request = Request([generator.randrange(2048) for _ in range(prompt)], [7, 8, 9] * 400)
    del request.whole[1024:]
    engine.rows = [request]
    engine.run()
    assert len(request.tokens) == 1024
    assert request.taken > (1024 - prompt) / 2


# ---- Recognition


class Text:
    def __init__(self, *tokens: int) -> None:
        self.tokens = np.array(tokens, dtype=np.int32)


def test_rows_are_recognised_by_their_tokens() -> None:
    one, same, other, longer = Text(1, 2, 3), Text(1, 2, 3), Text(1, 2, 4), Text(1, 2, 3, 5)

    def row(new: int, *tokens: int) -> Row:
        return Row(np.array(tokens, dtype=np.int32), new)

    texts = [one, same, other, longer]
    assert recognise([row(1, 1, 2, 4, 9), row(2, 1, 2, 3, 5, 6)], texts) == [other, one]
    assert recognise([row(1, 1, 2, 3, 5), row(1, 1, 2, 3, 5), row(1, 1, 2, 3, 5)], texts) == [one, same, None]
    # Steps in between, or a text that goes on from one that is over: the longest that it begins with.
    assert recognise([row(1, 1, 2, 3, 5, 6, 7)], texts) == [longer]
    assert recognise([row(1, 1, 2), row(1, 3)], texts) == [None, None]


# ---- Memory


@pytest.mark.usefixtures("faultless")
def test_texts_that_left_are_forgotten(requests: list[Request], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proposer, "GONE", 8)
    engine = FakeVllm(make_proposer())
    engine.rows = list(requests)
    for _ in range(4):
        engine.step()
    engine.rows = engine.rows[:1]  # the others were aborted
    for _ in range(10):
        engine.step()
    (left,) = engine.proposer._proposer.texts
    assert list(left.tokens) == requests[0].tokens


@pytest.mark.usefixtures("faultless")
def test_caches_take_no_more_than_they_may(requests: list[Request]) -> None:
    """Whose text was seen longest ago goes first; what is needed now stays."""
    engine = FakeVllm(make_proposer(cache_gib=CACHE))

    engine.rows = list(requests)
    while engine.rows:
        engine.step()
        runners = [each.runner for each in engine.proposer._proposer.texts if each.runner is not None]
        for buffers in {runner.model.cache.buffers for runner in runners}:  # one for all
            assert sum(each.nbytes for each in buffers.tensors()) <= CACHE * 2**30
        assert len(runners) <= 2
    assert any(request.taken > 0 for request in requests)
    engine.rows = [again := Request(requests[-1].whole[:20], requests[-1].whole[20:])]
    engine.run()
    assert again.taken > 0


@pytest.mark.usefixtures("faultless")
def test_a_text_that_begins_like_another_is_not_read_again(
    requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeVllm(make_proposer())
    engine.rows = [requests[0]]
    engine.run()
    read: list[int] = []
    prefill = type(engine.proposer._proposer._slots._newest).prefill
    monkeypatch.setattr(
        type(engine.proposer._proposer._slots._newest),
        "prefill",
        lambda self, tokens: (read.append(len(tokens)), prefill(self, tokens)),
    )
    whole = requests[0].whole
    engine.rows = [turn := Request([*whole[:-10], *requests[1].whole[:20]], requests[1].whole[20:])]
    engine.run()
    assert turn.drafted > 0
    assert sum(read) < 40


@pytest.mark.usefixtures("faultless")
def test_a_prompt_is_read_in_chunks_between_the_steps(requests: list[Request], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (runtime_model, proposer):
        monkeypatch.setattr(module, "PREFILL_CHUNK", 16)
    engine = FakeVllm(make_proposer())
    engine.rows = requests[:3]
    for request in engine.rows:
        assert request.prompt > 17
    drafted = []
    while engine.rows:
        engine.step()
        drafted.append(sum(text.ready for text in engine.proposer._proposer.texts))
    assert drafted.index(3) >= 4
    assert all(request.taken > 0 for request in requests[:3])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no threads")
def test_the_draft_goes_on_where_the_target_does_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine binds its threads, and those that they start would be bound as they are."""
    every, taken = {0, 1, 2, 3}, {1: {0}, 2: {2}, 3: {0, 1, 2, 3}}
    monkeypatch.setattr(os, "sched_getaffinity", lambda task: taken.get(task, every))
    monkeypatch.setattr(
        threads, "Path", lambda path: SimpleNamespace(glob=lambda _: [Path(str(task)) for task in taken])
    )
    assert threads.free_cores() == [1, 3]
    taken[2] = every
    assert threads.free_cores() == [1, 2, 3]
    taken.clear()
    assert threads.free_cores() == [0, 1, 2, 3][torch.get_num_threads() :]
    monkeypatch.undo()
    mine = sorted(os.sched_getaffinity(0))
    background, found = proposer.Background(1, mine[:1]), list[set[int]]()
    background.start(lambda: found.append(os.sched_getaffinity(0)))
    background.close()
    assert found == [{mine[0]}]
    assert sorted(os.sched_getaffinity(0)) == mine


@pytest.mark.parametrize(
    ("overlap", "free", "expected"), [(None, [], False), (None, [3], None), (True, [], True), (False, [3], False)]
)
def test_where_no_core_is_left_the_draft_stops_beside_the_target(
    overlap: bool | None, free: list[int], expected: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    assert with_cores(overlap, free) == (expected, free)
    assert ("overlap is on, and vLLM computes on all cores" in caplog.text) == (overlap is True)


# ---- Faults


def test_a_fault_ends_the_drafts_of_one_text(
    requests: list[Request], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = FakeVllm(make_proposer())
    engine.rows = list(requests[:3])
    bad = requests[1]
    propose = ModelDrafter.place

    def broken(self: ModelDrafter, *args: Any, **kwargs: Any) -> Any:
        if self._text[: bad.prompt] == bad.whole[: bad.prompt] and len(self._text) > bad.prompt + 12:
            raise RuntimeError("made up")
        return propose(self, *args, **kwargs)

    monkeypatch.setattr(ModelDrafter, "place", broken)
    with caplog.at_level(logging.WARNING):
        engine.run()
    assert [each.getMessage() for each in caplog.records] == [
        f"a text of {len(each.tokens)} tokens gets no more drafts: RuntimeError: made up"
        for each in engine.proposer._proposer.texts
        if each.failed
    ] or len(caplog.records) == 1
    assert bad.over
    assert all(request.taken > bad.taken for request in (requests[0], requests[2]))


@pytest.mark.parametrize("where", ["measure", "stop"])
def test_a_fault_of_our_own_ends_all_drafts(
    requests: list[Request], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    engine = FakeVllm(make_proposer())
    engine.rows = list(requests[:2])
    engine.step()
    owner: Any = {"measure": Round, "stop": proposer.Background}[where]

    def broken(*args: Any, **kwargs: Any) -> None:
        raise KeyError("made up")

    monkeypatch.setattr(owner, where, broken)
    engine.run()
    assert all(request.over for request in requests[:2])
    assert sum(each.levelno >= logging.ERROR for each in caplog.records) == 1


# ---- Costs


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in (proposer, drafting):
            monkeypatch.setattr(module, "time", self)

    def perf_counter(self) -> float:
        return self.now


@pytest.mark.usefixtures("faultless")
@pytest.mark.parametrize(("draft_step", "row", "pays"), [(0.01, 0.02, True), (0.95, 0.02, False), (0.01, 1.0, False)])
@pytest.mark.parametrize("texts", [1, 4])
def test_nothing_is_proposed_where_it_does_not_pay(
    requests: list[Request], monkeypatch: pytest.MonkeyPatch, draft_step: float, row: float, pays: bool, texts: int
) -> None:
    """A step takes a second, and `row` more for each row behind the first, a draft's step `draft_step`."""
    clock = Clock(monkeypatch)
    propose = Together.propose

    def slow(self: Together, *args: Any) -> Any:
        drafted = propose(self, *args)
        clock.now += draft_step * max(len(each.steps) for each in drafted if not isinstance(each, Exception))
        return drafted

    def during(rows: int) -> None:
        clock.now += 1 + row * (rows - 1)

    monkeypatch.setattr(Together, "propose", slow)
    engine = FakeVllm(make_proposer(policy={}), during)
    for i in range(0, len(requests), texts):
        engine.rows = requests[i : i + texts]
        engine.run()
    steps = sum(request.steps for request in requests)
    plain = sum(1 + row * (min(texts, len(requests) - i) - 1) for i in range(0, len(requests), texts)) * NEW
    assert steps < 0.8 * NEW * len(requests) if pays else steps > 0.85 * NEW * len(requests)
    assert clock.now < (0.8 if pays else 1.08) * plain


# ---- Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft": ""}, "expected a draft"),
        ({"drafts": "x"}, "unknown option 'drafts'"),
        ({"overlap": "maybe"}, "overlap is 'maybe'"),
        ({"cache_gib": "much"}, "cache_gib is 'much'"),
        ({"draft_context": "most"}, "draft_context is 'most'"),
        ({"policy": {"kmax": 3}}, "unknown option 'kmax'"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecBranchError, match=message):
        SpecBranchProposer(vllm_config(**options))


def test_no_options_at_all() -> None:
    config = vllm_config()
    config.additional_config = {}
    with pytest.raises(SpecBranchError, match=r"expected a draft: --additional-config '\{\"specbranch\""):
        SpecBranchProposer(config)


def test_more_workers_than_one_are_refused() -> None:
    config = vllm_config()
    config.parallel_config.world_size = 2
    with pytest.raises(SpecBranchError, match="2 workers"):
        SpecBranchProposer(config)


def test_a_draft_that_is_not_there() -> None:
    with pytest.raises(SpecBranchError, match="draft /nowhere"):
        SpecBranchProposer(vllm_config(draft="/nowhere")).load_model(nn.Linear(1, 1))


def test_the_target_as_its_own_draft(requests: list[Request]) -> None:
    engine = FakeVllm(make_proposer(draft="self", draft_weights="keep"))
    engine.rows = [requests[0]]
    engine.run()
    assert requests[0].taken >= requests[0].drafted - 8 > NEW / 2  # but for those behind the end
