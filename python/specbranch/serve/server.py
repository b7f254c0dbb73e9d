"""The server around the app: its address, its log, and how it ends."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from specbranch.core.generation import Generation
from specbranch.serve.answers import Answer, Left
from specbranch.serve.app import Service
from specbranch.serve.queue import Queue
from specbranch.serve.refusal import refusal_of

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def bound(host: str, port: int) -> socket.socket:
    """A socket that nobody can connect to yet. Raises OSError that names the address, where it cannot be had."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        made = socket.socket(family, kind)
        try:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address)
        except OSError:
            made.close()
            raise
        return made
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from None


def url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if listening.family == socket.AF_INET6 else f"http://{host}:{port}"


def line(answer: Answer) -> str:
    """What the log says of an answer that is over."""
    outcome = answer.outcome
    if isinstance(outcome, Generation):
        speed = outcome.stats.as_dict()["tokens_per_second"]
        tokens = f"{answer.prompt_tokens} + {len(outcome.tokens)} tokens"
        return f"{answer.path}: {tokens}, {speed:.1f} tokens/s, {outcome.finish_reason}"
    assert outcome is not None
    refusal = refusal_of(outcome)
    told = str(outcome) if isinstance(outcome, Left) else f"{refusal.status}, {refusal}"
    return f"{answer.path}: {told}" + (f" (after {answer.characters} characters)" if answer.characters else "")


class Server(uvicorn.Server):
    """Ends on SIGTERM and SIGINT: new requests are refused, those that run and wait are answered. A second signal ends
    the process as if nothing were set for it.

    ready: is called when clients may connect. say: is told, once, that the server ends. ended_by: the signal.
    """

    def __init__(self, service: Service, ready: Callable[[], None], say: Callable[[str], None]) -> None:
        super().__init__(uvicorn.Config(service.app, log_config=None, access_log=False, lifespan="off"))
        self._queue: Queue = service.answers.queue
        self._ready, self._say = ready, say
        self.ended_by: int | None = None
        self._told = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        self.ended_by, self._queue.closed = sig, True

    async def on_tick(self, counter: int) -> bool:
        queue = self._queue
        if queue.closed and not self._told:
            self._told = True
            left = queue.running + queue.waiting
            self._say(f"shutting down: {left} requests are still answered; a second signal ends at once")
        # Until then it listens, so that new requests hear why they are refused.
        self.should_exit = self.should_exit or (queue.closed and not queue.running + queue.waiting)
        return await super().on_tick(counter)


def serve(service: Service, listening: socket.socket, ready: Callable[[], None], say: Callable[[str], None]) -> int:
    """Until a signal ends it; gives that signal."""
    server = Server(service, ready, say)
    asyncio.run(server.serve(sockets=[listening]))
    return server.ended_by or 0
