"""A server of `specbranch serve` in this process, and requests to it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai

from specbranch import SpecBranch
from specbranch.serve.answers import Answers
from specbranch.serve.app import Service
from specbranch.serve.queue import Queue
from specbranch.serve.server import Server, bound, line, url

TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


class Served:
    """An engine being served. lines: of its log."""

    def __init__(
        self,
        engine: Any,
        at_once: int = 1,
        most_waiting: int = 64,
        max_new_tokens: int | None = None,
        whitespace: bool = False,
    ) -> None:
        self.engine, self.queue, self.lines = engine, Queue(at_once, most_waiting), list[str]()
        answers = Answers(
            engine,
            self.queue,
            max_new_tokens,
            done=lambda answer: self.lines.append(line(answer)),
            whitespace=whitespace,
        )
        listening, begun = bound("127.0.0.1", 0), threading.Event()
        self.url = url(listening)
        server = Server(Service(answers, "bundled", self.lines.append), begun.set, lambda told: None)
        self._thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
        self._thread.start()
        assert begun.wait(30)

    def close(self) -> None:
        self.queue.closed = True
        self._thread.join(60)
        assert not self._thread.is_alive()

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120, **options)

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=120)

    def wait(self, condition: Callable[[], bool]) -> float:
        """Seconds until it holds."""
        begin = time.perf_counter()
        while not condition():
            assert time.perf_counter() - begin < 60
            time.sleep(0.005)
        return time.perf_counter() - begin

    @property
    def idle(self) -> bool:
        """Nobody runs or waits, and no generation has a slot."""
        return self.queue.running + self.queue.waiting == 0 and all(slot.free for slot in self.engine.pair._slots)


@contextmanager
def served(engine: SpecBranch | Any, **options: Any) -> Iterator[Served]:
    server = Served(engine, **options)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def chat_template(engine: SpecBranch, template: str | None = TEMPLATE) -> Iterator[None]:
    assert engine.tokenizer is not None
    before, engine.tokenizer.chat_template = engine.tokenizer.chat_template, template
    try:
        yield
    finally:
        engine.tokenizer.chat_template = before
