"""What the decoding loop asks of the two models and of the clock; real ones and replayed ones answer alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from specbranch.core.tree import Tree
from specbranch.drafters.model import Drafted
from specbranch.runtime.hrad.predictor import Outlook
from specbranch.runtime.verifier import Verdict


class Pending(Protocol):
    """A verdict that is being made."""

    def done(self) -> bool: ...

    def result(self) -> Verdict: ...


class Target(Protocol):
    """Judges drafted tokens: verifier.Verifier, replay.ReplayVerifier."""

    @property
    def most_rows(self) -> int:
        """Of a trunk."""

    def prefill(self, tokens: Sequence[int]) -> None: ...

    def verify(self, tree: Tree, trunk: Sequence[int]) -> Verdict: ...

    def start(self, tree: Tree, trunk: Sequence[int]) -> Pending: ...

    def commit(self, path: Sequence[int]) -> None: ...


class Draft(Protocol):
    """Guesses: drafter.Drafter, replay.ReplayDrafter."""

    @property
    def room(self) -> int: ...

    def prefill(self, tokens: Sequence[int]) -> None: ...

    @property
    def burst(self) -> int: ...

    def propose(
        self, tree: Tree, nodes: Sequence[int], text: Sequence[int], steps: int, going: Callable[[int], bool]
    ) -> Drafted: ...

    def commit(self, path: Sequence[int], survivors: Mapping[int, int]) -> None: ...

    def learn(self, tree: Tree, path: Sequence[int], next_token: int, outlook: Outlook | None) -> None: ...


class Workers(Protocol):
    """Runs the target beside the draft, and says what time it is: overlap.Threads and Streams, replay.VirtualTime."""

    def clock(self) -> float: ...

    def submit(self, target: Target, tree: Tree, trunk: Sequence[int]) -> Pending:
        """Start `target.verify(tree, trunk)`; the caller goes on."""

    def draft_threads(self) -> AbstractContextManager[None]: ...

    def wait(self) -> None:
        """Return when neither model has work."""
