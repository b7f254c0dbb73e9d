"""Several texts of one call: all of them checked before the first is begun, then decoded at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from specbranch.core.errors import SpecBranchError
from specbranch.core.generation import Generation, GenerationFailed, GenerationInterrupted
from specbranch.core.stats import Stats
from specbranch.decoder import Decoder
from specbranch.request import Request
from specbranch.runtime.model import rows_for
from specbranch.scheduler import Scheduler, Ticket


def is_several(prompt: object) -> bool:
    """Whether it is meant as a list of prompts: of texts, of ids, of chats or of a tokenizer's outputs."""
    if not isinstance(prompt, (list, tuple)) or not prompt:
        return False
    first = prompt[0]
    tokenized = isinstance(first, Mapping) and "input_ids" in first
    return tokenized or isinstance(first, (str, list, tuple, range)) or (isinstance(first, Tensor) and first.dim() > 0)


class Several:
    """The texts of one call. most: at once. cache_tokens: rows that they share; None: what so many of them need."""

    def __init__(
        self, decoder: Decoder, asks: Sequence[Callable[[], Request]], most: int, cache_tokens: int | None
    ) -> None:
        requests = [_checked(ask, place) for place, ask in enumerate(asks)]
        largest = sorted((rows_for(request.tokens) for request in requests), reverse=True)
        rows = sum(largest[: most + decoder.pair.prompt_cache]) if cache_tokens is None else cache_tokens
        self.tickets = [Ticket(request) for request in requests]
        self.scheduler = Scheduler(decoder, most, rows)
        for place, ticket in enumerate(self.tickets):
            with _named(place):
                self.scheduler.add(ticket)

    def advance(self) -> list[int]:
        """One round. Returns the places of the texts to which something happened; none when all are over.

        Raises GenerationInterrupted for Ctrl-C, with what was committed of each.
        """
        if not self.scheduler.busy:
            return []
        try:
            touched = self.scheduler.advance()
        except KeyboardInterrupt as interrupt:
            raise self.interrupted() from interrupt
        return [place for place, ticket in enumerate(self.tickets) if ticket in touched]

    def interrupted(self) -> GenerationInterrupted:
        """For an interrupt: ends all texts where they stand."""
        open_ones = [place for place, ticket in enumerate(self.tickets) if ticket.outcome is None]
        self.scheduler.close("interrupted")
        generations = [_generation(ticket, "interrupted") for ticket in self.tickets]
        return GenerationInterrupted(generations[open_ones[0] if open_ones else 0], generations)

    def generations(self) -> list[Generation]:
        """When all are over. Raises GenerationFailed where one has failed, with what was committed of each."""
        generations = [_generation(ticket, "error") for ticket in self.tickets]
        for place, ticket in enumerate(self.tickets):
            if isinstance(error := ticket.outcome, Exception):
                cause = error.__cause__ if isinstance(error, GenerationFailed) else error
                raise GenerationFailed(f"prompt {place}: {error}", generations[place], generations) from cause
        return generations

    def close(self) -> None:
        """Stop generating; what was committed is dropped."""
        self.scheduler.close("interrupted")


class TextStreams(Iterator[tuple[int, str]]):
    """Iterates over pieces of several texts as they are committed, each with the place of its prompt; `generations`
    fills as texts end. A context manager too, which closes it."""

    def __init__(self, start: Callable[[], Several]) -> None:
        self._start = start
        self._several: Several | None = None
        self._pieces: list[tuple[int, str]] = []
        self.generations: dict[int, Generation] = {}

    def __next__(self) -> tuple[int, str]:
        if self._several is None:
            self._several = self._start()
        while not self._pieces:
            places = self._several.advance()
            if not places:
                self._several.generations()  # which raises what went wrong
                raise StopIteration
            for place in places:
                ticket = self._several.tickets[place]
                if piece := ticket.fresh():
                    self._pieces.append((place, piece))
                if isinstance(ticket.outcome, Generation):
                    self.generations[place] = ticket.outcome
        return self._pieces.pop(0)

    def __enter__(self) -> TextStreams:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating; what was committed is dropped."""
        if self._several is not None:
            self._several.close()


def _checked(ask: Callable[[], Request], place: int) -> Request:
    with _named(place):
        return ask()


@contextmanager
def _named(place: int) -> Iterator[None]:
    """An error says which prompt it is about."""
    try:
        yield
    except SpecBranchError as error:
        raise SpecBranchError(f"prompt {place}: {error}") from error


def _generation(ticket: Ticket, reason: str) -> Generation:
    """What there is of a text. reason: where it has not ended by itself."""
    outcome = ticket.outcome
    if isinstance(outcome, (GenerationFailed, GenerationInterrupted)):
        return outcome.generation
    return outcome if isinstance(outcome, Generation) else Generation("", [], Stats(), reason)
