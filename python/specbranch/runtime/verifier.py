"""The target as the verifier: it scores a trunk and says how much of it is accepted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from specbranch.constrained import Constrained
from specbranch.core.messages import Trunk, Verdict
from specbranch.core.sampling import Sampling
from specbranch.runtime.hrad.predictor import Predictor
from specbranch.runtime.model import whole_chunks
from specbranch.runtime.rules import Walk
from specbranch.runtime.runner import Judged, PendingVerdict, PendingWalk, Runner
from specbranch.stages import Pending


class ModelVerifier:
    """The target samples every token itself; a drafted token is accepted if it equals the target's."""

    def __init__(
        self,
        runner: Runner,
        sampling: Sampling,
        predictor: Predictor | None = None,
        walk: Walk | None = None,
        constraint: Constrained | None = None,
    ) -> None:
        """predictor: its tap is attached to the model; None for no forecasts. walk: with the rules that there are.
        constraint: what the text may be; where there is a walk, it knows too."""
        self.runner = runner
        self.sampling = sampling
        self.predictor = predictor
        self.walk = walk
        self.constraint = constraint
        self._text: list[int] = []  # of the rows in the cache
        self._prompt = 0
        self._trunk = Trunk((), (), 0)

    @property
    def most_rows(self) -> int:
        return self.runner.most_rows

    def most_tokens(self, position: int) -> int:
        """See stages.Verifier."""
        return self.runner.model.most_tokens(position)

    def begin(self, prompt: Sequence[int]) -> int:
        """See stages.Verifier."""
        self._text, self._prompt = list(prompt[:-1]), len(prompt)
        self.runner.model.begin(prompt)
        return len(self._text) - self.runner.model.position

    def read(self, most: float) -> int:
        """See stages.Verifier."""
        unread = self._text[self.runner.model.position :]
        chunks = unread[: whole_chunks(most, len(unread))]
        self.runner.prefill(chunks)
        return len(chunks)

    def keep(self) -> None:
        """The text is over: its rows may serve a text that begins alike."""
        self.runner.model.keep(self._text, self._prompt - 1)

    def verify(self, trunk: Trunk) -> Pending:
        """One target forward over the trunk; it is waited for when the result is asked for."""
        (pending,) = self.runner.verify([self.place(trunk)])
        return self.pending(pending)

    def place(self, trunk: Trunk) -> Judged:
        """The trunk's part of a forward, whose rows it takes."""
        self._trunk = trunk
        model = self.runner.model
        if model.must_reread(trunk.position):
            with self.runner.device.running():
                model.reread([*self._text, trunk.tokens[0]], trunk.position)
        batch = model.place(range(len(trunk)), trunk.parents, trunk.tokens, trunk.positions)
        walk = None if self.walk is None else partial(self.walk, trunk)
        allowed = None if self.constraint is None else partial(_allowed, self.constraint, trunk)
        return Judged(model, batch, trunk.parents, self.sampling, walk, allowed)

    def pending(self, pending: PendingVerdict | PendingWalk) -> Pending:
        """With the forecast, if there is a predictor."""
        return pending if self.predictor is None else PendingForecast(pending, self.predictor)

    def commit(self, path: Sequence[int]) -> None:
        """Keep the trunk's root and the accepted path; drop the rest."""
        self.runner.commit([0, *path], {})
        self._text += [self._trunk.tokens[place] for place in (0, *path)]


def _allowed(constraint: Constrained, trunk: Trunk) -> list[bytes]:
    """The mask of each row."""
    paths: list[list[int]] = []
    for token, parent in zip(trunk.tokens, trunk.parents, strict=True):
        paths.append([] if parent < 0 else [*paths[parent], token])
    order = sorted(range(len(paths)), key=paths.__getitem__)  # depth first, where a matcher goes least
    masks = {place: constraint.allowed(paths[place]) for place in order}
    return [masks[place] for place in range(len(paths))]


@dataclass(frozen=True, slots=True)
class PendingForecast:
    """A pending verdict that comes with a forecast."""

    verdict: PendingVerdict | PendingWalk
    predictor: Predictor

    def done(self) -> bool:
        return self.verdict.done()

    def result(self) -> Verdict:
        verdict = self.verdict.result()
        last = verdict.path[-1] if verdict.path else 0
        return replace(verdict, forecast=self.predictor.after(last, verdict.next_token, self.verdict.hidden))
