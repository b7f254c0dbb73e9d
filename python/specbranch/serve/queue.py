"""Who generates and who waits: first come, first served, so many at once, and so many waiting."""

from __future__ import annotations

import asyncio
from collections import deque

from specbranch.serve.refusal import Refusal


class Place:
    """A request's place in the queue, from its arrival until its generation is over."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self.called: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def turn(self) -> None:
        """Wait until it is this request's turn."""
        await asyncio.shield(self.called)

    def leave(self) -> None:
        """Make room, whether it was this request's turn or not yet; a second time does nothing."""
        self._queue._left(self)


class Queue:
    """at_once: generations that run together. most_waiting: requests that may wait beside them."""

    def __init__(self, at_once: int = 1, most_waiting: int = 64) -> None:
        self.at_once, self.most_waiting = at_once, most_waiting
        self.closed = False  # a signal may set it
        self._running: set[Place] = set()
        self._waiting: deque[Place] = deque()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def enter(self) -> Place:
        """Raises Refusal when the queue is full, and when the server is about to end."""
        if self.closed:
            raise Refusal(503, "the server is shutting down", code="shutting_down")
        if self.running >= self.at_once and self.waiting >= self.most_waiting:
            message = f"{self.running} requests run and {self.waiting} wait; the server takes no more: try again later"
            raise Refusal(429, message, code="queue_full")
        place = Place(self)
        self._waiting.append(place)
        self._call()
        return place

    def _call(self) -> None:
        while self._waiting and self.running < self.at_once:
            place = self._waiting.popleft()
            self._running.add(place)
            place.called.set_result(None)

    def _left(self, place: Place) -> None:
        self._running.discard(place)
        if place in self._waiting:
            self._waiting.remove(place)
        self._call()
