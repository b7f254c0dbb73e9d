"""The result of a generation, how one can end early, and a text that arrives while it is made."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass

from specbranch.core.stats import Stats


@dataclass(frozen=True)
class Generation:
    """What came out.

    text: without special tokens, and without a stop string. tokens: the new ids only; an end-of-sequence id is
    included. finish_reason: "stop" (end of sequence or a stop string), "length", "interrupted" or "error".
    """

    text: str
    tokens: list[int]
    stats: Stats
    finish_reason: str


class GenerationFailed(RuntimeError):
    """A generation ended early, for example by running out of memory; `generation` holds what was committed."""

    def __init__(self, message: str, generation: Generation) -> None:
        super().__init__(message)
        self.generation = generation


class GenerationInterrupted(KeyboardInterrupt):
    """Ctrl-C during a generation; `generation` holds what was committed so far."""

    def __init__(self, generation: Generation) -> None:
        super().__init__("generation interrupted")
        self.generation = generation


class TextStream(Iterator[str]):
    """Iterates over pieces of text as they are committed; `generation` is there when the iteration is over.

    A context manager too, which closes it. Several streams of one engine may be read in turn, or in several threads.
    """

    def __init__(self, pieces: Generator[str | Generation, None, None]) -> None:
        self._pieces = pieces
        self._stopped = False
        self.generation: Generation | None = None

    def __next__(self) -> str:
        while True:
            if self._stopped:
                self.close()
            try:
                piece = next(self._pieces)
            except GenerationInterrupted:
                raise
            except KeyboardInterrupt as interrupt:  # it came between two rounds: hand it in, so that the text is kept
                piece = self._pieces.throw(interrupt)
            if isinstance(piece, Generation):
                self.generation = piece
            elif piece:
                return piece

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating; what was committed is dropped."""
        self._pieces.close()

    def stop(self) -> None:
        """Close it before its next round, from whatever thread: the iteration ends there, without a `generation`."""
        self._stopped = True
