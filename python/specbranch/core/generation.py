"""The result of a generation, how one can end early, and a text that arrives while it is made."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from specbranch.core.stats import Stats


class TokenLogprob(NamedTuple):
    """The natural logarithm of a token's probability in the model's own distribution, before processors, temperature
    and filters. top: the likeliest tokens with theirs, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Generation:
    """What came out.

    text: without special tokens, and without a stop string. tokens: the new ids only; an end-of-sequence id is
    included. finish_reason: "stop" (end of sequence, a stop string or a stopping criterion), "length", "interrupted" or
    "error". logprobs: one for each token, where they were asked for.
    """

    text: str
    tokens: list[int]
    stats: Stats
    finish_reason: str
    logprobs: list[TokenLogprob] | None = None


class GenerationFailed(RuntimeError):
    """A generation ended early, for example by running out of memory; `generation` holds what was committed.

    generations: of all texts, where several were asked for together.
    """

    def __init__(self, message: str, generation: Generation, generations: Sequence[Generation] = ()) -> None:
        super().__init__(message)
        self.generation = generation
        self.generations = list(generations) or [generation]


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C during a generation; `generation` holds what was committed so far.

    generations: of all texts, where several were asked for together; `generation` is then the first that was not over.
    """

    def __init__(self, generation: Generation, generations: Sequence[Generation] = ()) -> None:
        super().__init__("generation interrupted")
        self.generation = generation
        self.generations = list(generations) or [generation]


class TextStream(Iterator[str]):
    """Iterates over pieces of text as they are committed; `generation` is there when the iteration is over.

    A context manager too, which closes it. Several streams of one engine may be read in turn, or in several threads.
    """

    def __init__(self, pieces: Generator[str | Generation, None, None], logprobs: Sequence[TokenLogprob] = ()) -> None:
        """logprobs: of the tokens so far, where they were asked for."""
        self._pieces = pieces
        self.logprobs = logprobs
        self.generation: Generation | None = None

    def __next__(self) -> str:
        while (piece := self.advance()) is not None:
            if piece:
                return piece
        raise StopIteration

    def advance(self) -> str | None:
        """The text of the next round, which may be empty; None when all is said."""
        while True:
            try:
                piece = next(self._pieces, None)
            except GenerationInterrupted:
                raise
            except KeyboardInterrupt as interrupt:  # it came between two rounds
                piece = self.hand_in(interrupt)
            if not isinstance(piece, Generation):
                return piece
            self.generation = piece

    def hand_in(self, interrupt: KeyboardInterrupt) -> str | Generation:
        """For an interrupt that came while somebody had a piece: it ends the stream as one within a round does, with a
        GenerationInterrupted that holds what was committed."""
        return self._pieces.throw(interrupt)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating; what was committed is dropped."""
        self._pieces.close()
