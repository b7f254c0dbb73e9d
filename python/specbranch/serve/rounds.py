"""The thread that decodes: it plays rounds while there are requests, and waits while there are none."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread

from specbranch.core.errors import SpecBranchError
from specbranch.scheduler import Scheduler, Ticket

Told = Callable[[Ticket], None]
"""What is told, in the thread that decodes, that there is more of a text, or that it is over."""


class Rounds:
    """scheduler: nobody else uses it. The thread ends with the process, or with the last reference."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._new: SimpleQueue[tuple[Ticket, Told] | None] = SimpleQueue()
        Thread(target=_play, args=(scheduler, self._new), name="decode", daemon=True).start()

    def begin(self, ticket: Ticket, told: Told) -> None:
        """Decode a request among the others."""
        self._new.put((ticket, told))

    def __del__(self) -> None:
        self._new.put(None)


def _play(scheduler: Scheduler, new: SimpleQueue[tuple[Ticket, Told] | None]) -> None:
    told: dict[Ticket, Told] = {}
    while True:
        while not new.empty() or not scheduler.busy:
            if (item := new.get()) is None:
                return
            ticket, tell = item
            try:
                scheduler.add(ticket)
                told[ticket] = tell
            except SpecBranchError as error:
                ticket.outcome = error
                tell(ticket)
        for ticket in scheduler.advance():
            told[ticket](ticket)
            if ticket.outcome is not None:
                del told[ticket]
