"""What can go wrong, under one base class."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from specbranch.core.generation import Generation


class SpecBranchError(ValueError):
    """Bad input or an unsupported model; the message names the thing and what was expected."""


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
