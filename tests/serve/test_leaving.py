"""A client that goes away, whenever it does, stops its generation within a round and keeps nobody waiting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest
from serving import Served, served

from specbranch import Generation, SpecBranch, bundled
from specbranch.runtime.verifier import ModelVerifier
from specbranch.serve.answers import Answers, Piece
from specbranch.serve.queue import Queue
from specbranch.serve.refusal import Refusal
from specbranch.serve.requests import completion

PROMPT = bundled.prompts()[0]["prompt"]
LONG = {"prompt": PROMPT, "max_tokens": 900}  # more than a hundred rounds, and none of them short here
SHORT = {"prompt": PROMPT, "max_tokens": 4}


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When each round of any generation began. None is shorter than 50 ms."""
    verify, begun = ModelVerifier.place, list[float]()

    def slow(self, trunk):
        begun.append(time.perf_counter())
        time.sleep(0.05)
        return verify(self, trunk)

    monkeypatch.setattr(ModelVerifier, "place", slow)
    return begun


@pytest.fixture
def server(bundled_pair: SpecBranch) -> Iterator[Served]:
    with served(bundled_pair) as server:
        yield server


def leave_in_stream(server: Served) -> None:
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**LONG, "stream": True}, timeout=60) as response:
        next(response.iter_lines())


def leave_after(server: Served, seconds: float, body: dict) -> None:
    with suppress(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=httpx.Timeout(60, read=seconds))


def assert_free(server: Served, rounds: list[float]) -> None:
    """Its generation ends within two rounds (the one that runs, and one until the connection's end is noticed), and the
    next request has its turn."""
    seen = len(rounds)
    server.wait(lambda: server.idle)
    assert len(rounds) - seen <= 2
    answer = server.post("/v1/completions", SHORT)
    assert answer.json()["choices"][0]["text"] == server.engine.generate(PROMPT, max_new_tokens=4).text


def test_in_the_middle_of_a_stream(server, rounds):
    leave_in_stream(server)
    assert_free(server, rounds)
    assert server.lines[0].startswith("/v1/completions: the client left (after ")


def test_without_a_stream(server, rounds):
    leave_after(server, 0.5, LONG)
    assert_free(server, rounds)
    assert server.lines[0].startswith("/v1/completions: the client left (after ")


def test_while_no_text_is_shown(server, rounds):
    """All text may be the beginning of a stop string, so that none is handed on."""
    text = server.engine.generate(PROMPT, max_new_tokens=90).text
    leave_after(server, 0.5, {**LONG, "stop": text + "\0", "stream": True})
    assert_free(server, rounds)
    assert server.lines[0] == "/v1/completions: the client left"


def test_in_the_queue(server, rounds):
    with ThreadPoolExecutor() as pool:
        first = pool.submit(server.post, "/v1/completions", {**LONG, "max_tokens": 60})
        server.wait(lambda: server.queue.running == 1)
        left = pool.submit(leave_after, server, 0.3, LONG)
        server.wait(lambda: server.queue.waiting == 1)
        last = pool.submit(server.post, "/v1/completions", SHORT)
        left.result()
        server.wait(lambda: server.queue.waiting == 1)
        assert not first.done()
        texts = [answer.result().json()["choices"][0]["text"] for answer in (first, last)]
    assert texts == [server.engine.generate(PROMPT, max_new_tokens=most).text for most in (60, 4)]
    assert server.lines[0] == "/v1/completions: the client left"
    assert server.idle


def test_one_that_does_not_read_keeps_nobody_waiting(bundled_pair):
    """Its answer is kept for it, and the next one has its turn."""

    async def scenario() -> None:
        answers = Answers(bundled_pair, Queue())

        async def staying() -> None:
            await asyncio.sleep(60)

        unread, read = (answers.begin(completion(SHORT), "/", staying) for _ in range(2))
        events = [await read.event()]
        while isinstance(events[-1], Piece):
            events.append(await read.event())
        assert isinstance(events[-1], Generation)
        assert answers.queue.running == 0
        assert isinstance(unread.outcome, Generation)

    asyncio.run(scenario())


# ---- the queue


def test_turns_are_taken_in_order_of_arrival():
    async def scenario() -> None:
        queue, order = Queue(at_once=2, most_waiting=3), []
        places = [queue.enter() for _ in range(5)]
        assert (queue.running, queue.waiting) == (2, 3)
        with pytest.raises(Refusal) as refused:
            queue.enter()
        assert (refused.value.status, refused.value.code) == (429, "queue_full")

        async def turn(number: int) -> None:
            await places[number].turn()
            order.append(number)

        turns = [asyncio.create_task(turn(number)) for number in range(5)]
        await asyncio.sleep(0)
        places[3].leave()  # while it waits
        turns[3].cancel()
        for number in (0, 0, 2, 1):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            places[number].leave()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert order == [0, 1, 2, 4]
        assert (queue.running, queue.waiting) == (1, 0)
        queue.closed = True
        with pytest.raises(Refusal) as refused:
            queue.enter()
        assert refused.value.status == 503

    asyncio.run(scenario())


def test_a_place_left_as_its_turn_comes_is_free_again():
    async def scenario() -> None:
        queue = Queue()
        first, second = queue.enter(), queue.enter()
        task = asyncio.create_task(second.turn())
        await asyncio.sleep(0)
        task.cancel()
        first.leave()  # calls the second one, whose task is about to end
        with pytest.raises(asyncio.CancelledError):
            await task
        second.leave()
        assert (queue.running, queue.waiting) == (0, 0)

    asyncio.run(scenario())
