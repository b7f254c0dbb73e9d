"""Several requests at once: they join and leave between rounds, and share their forwards."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from specbranch.core.errors import SpecBranchError
from specbranch.core.generation import Generation, GenerationFailed
from specbranch.decoder import Decoder
from specbranch.decoding import Decoding, costs_name
from specbranch.job import Job
from specbranch.loop import DecodingLoop, Turn
from specbranch.request import Request
from specbranch.runtime.pool import Alone, Pool
from specbranch.runtime.rules import Said
from specbranch.together import Together


@dataclass(eq=False)
class Ticket:
    """One request that was handed to a Scheduler. said: what it has said so far. begin: when it was asked for. outcome:
    the Generation, or the error in place of it, once it is over."""

    request: Request
    said: Said = field(default_factory=Said)
    begin: float = field(default_factory=time.perf_counter)
    job: Job | None = None
    outcome: Generation | Exception | None = None
    left: bool = False

    def fresh(self) -> str:
        """Text not returned before."""
        return "" if self.job is None else self.job.builder.fresh(final=self.outcome is not None)

    def leave(self) -> None:
        """Nobody wants the rest. May be called from any thread; it ends before the next round."""
        self.left = True


class Scheduler:
    """Decodes what it is handed, at most so many texts at once, while there are rows for them; the others wait, first
    come, first served. Each text is what it is alone. One thread calls it."""

    def __init__(self, decoder: Decoder, most: int, rows: int, chunk: float = math.inf) -> None:
        """most: texts at once. rows: of the cache that they share, of each model. chunk: about how many tokens of
        prompts are read between two rounds; without a limit a long prompt keeps the others waiting, but a batch is
        ready sooner."""
        self.decoder, self.most = decoder, most
        self.pool: Pool | Alone
        if most == 1 and decoder.hrad is None:
            self.pool = Alone(decoder.pair, rows)  # whose captured steps are quicker
        else:
            self.pool = Pool(decoder.pair.first, rows, decoder.pair.prompt_cache)
        if decoder.hrad is not None:
            self.pool.tap = decoder.pair.first.tap
        self.loop = DecodingLoop(decoder.pair.workers, Together(), chunk)
        self.attachment = decoder.pair.attachment(self.pool.tap, draft=decoder.pair.draft is not None)
        self.waiting: deque[Ticket] = deque()
        self.running: list[Ticket] = []

    def add(self, ticket: Ticket) -> None:
        """Raises SpecBranchError for a text that can never have room."""
        self.pool.check(ticket.request.tokens)
        self.waiting.append(ticket)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def advance(self) -> list[Ticket]:
        """One round of all that run, those included that begin with it. Returns the tickets to which something
        happened: there is more of the text, or it is over."""
        self.decoder.pair.workers.wait()
        return self.attachment.turn(self._advance)

    def _advance(self) -> list[Ticket]:
        touched = [ticket for ticket in (*self.running, *self.waiting) if ticket.left]
        for ticket in touched:
            self._end(ticket, SpecBranchError("nobody wants the rest of the text"))
        touched += self._admit()
        jobs = {id(ticket.job.text): ticket for ticket in self.running if ticket.job is not None}
        if not jobs:
            return touched
        try:
            texts = [ticket.job.text for ticket in self.running if ticket.job is not None]
            self._price(texts)
            turns = self.loop.read(texts)
            self._price([turn.text for turn in turns if turn.ready])
            self.loop.play(turns)
        except Exception as error:  # of a forward, and so of all
            for ticket in list(self.running):
                self._fail(ticket, error)
            return touched + list(jobs.values())
        for turn in turns:
            self._take(jobs[id(turn.text)], turn)
        return touched + list(jobs.values())

    def _price(self, texts: Sequence[Decoding]) -> None:
        """What rounds of so many texts have cost is what they go by."""
        for text in texts:
            name = costs_name(text.policy, text.retriever, text.constraint)
            text.costs = self.decoder.costs_of(name, len(texts))

    def _admit(self) -> list[Ticket]:
        """Begin texts that wait, while there is room. Returns those that are over at once."""
        over: list[Ticket] = []
        while self.waiting and len(self.running) < self.most:
            ticket = self.waiting[0]
            try:
                if not self._begin(ticket, ticket.request):
                    break
            except Exception as error:
                ticket.outcome = error
                over.append(ticket)
            self.waiting.popleft()
        return over

    def _begin(self, ticket: Ticket, request: Request) -> bool:
        """False while there is no room."""
        builder = self.decoder.builder(request, ticket.said)
        slot = self.pool.take(builder, request.ids[:-1], request.tokens)
        if slot is None:
            return False
        try:
            ticket.job = self.decoder.open(request, ticket.said, builder, slot, ticket.begin)
            slot.target.model.tap = self.pool.tap
            ticket.job.text.begin(request.ids, request.new_tokens)
        except BaseException:
            ticket.job = None
            self.pool.give_back(slot)
            raise
        self.running.append(ticket)
        return True

    def _take(self, ticket: Ticket, turn: Turn) -> None:
        assert ticket.job is not None
        if turn.error is not None:
            self._fail(ticket, turn.error)
        elif ticket.job.take(turn.committed):
            self._end(ticket, ticket.job.result)

    def _fail(self, ticket: Ticket, error: Exception) -> None:
        assert ticket.job is not None
        if not ticket.job.builder.tokens:
            self._end(ticket, error)
            return
        failure = GenerationFailed(f"generation ended early: {error}", ticket.job.result("error"))
        failure.__cause__ = error
        self._end(ticket, failure)

    def _end(self, ticket: Ticket, outcome: Exception | Callable[[], Generation]) -> None:
        """Give back what a text had."""
        if ticket in self.waiting:
            self.waiting.remove(ticket)
        if ticket.job is not None and ticket in self.running:
            self.running.remove(ticket)
            ticket.job.text.learn()
            self.decoder.close(ticket.job)
            self.pool.give_back(ticket.job.slot)
        ticket.outcome = outcome if isinstance(outcome, Exception) else outcome()

    def close(self, reason: str) -> None:
        """End all that run where they stand, and forget those that wait."""
        self.decoder.pair.workers.wait()
        self.waiting.clear()
        for ticket in list(self.running):
            if ticket.job is not None:
                self._end(ticket, partial(ticket.job.result, reason))
