"""The verifier: the target model scores the trunk and says how much of it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specbranch.core.messages import Step
from specbranch.core.sampling import Sampling
from specbranch.core.tree import Tree
from specbranch.runtime.hrad.predictor import Outlook, Predictor
from specbranch.runtime.runner import PendingJudgement, Runner


@dataclass(frozen=True, slots=True)
class Verdict:
    """The target's word on a trunk: the accepted path, from the root down, and the token that follows it.

    step: what it took. outlook: what a predictor says of the next drafted tokens, where there is one.
    """

    path: tuple[int, ...]
    next_token: int
    step: Step
    outlook: Outlook | None = None

    @property
    def accepted(self) -> int:
        """Drafted tokens accepted: the path without the root."""
        return len(self.path) - 1


class Verifier:
    """The target samples every token itself; a drafted token stands while it equals the target's."""

    def __init__(self, runner: Runner, sampling: Sampling, predictor: Predictor | None = None) -> None:
        """predictor: attached to the model; None for no outlooks."""
        self.runner = runner
        self.sampling = sampling
        self.predictor = predictor

    @property
    def most_rows(self) -> int:
        return self.runner.most_rows

    def prefill(self, tokens: Sequence[int]) -> None:
        self.runner.prefill(tokens)

    def commit(self, path: Sequence[int]) -> None:
        """Keep the accepted path; drop the rest."""
        self.runner.commit(path, {})

    def verify(self, tree: Tree, trunk: Sequence[int]) -> Verdict:
        """One target forward over `trunk`: tree nodes, the root first, parents before children."""
        return self.start(tree, trunk).result()

    def start(self, tree: Tree, trunk: Sequence[int]) -> PendingVerdict:
        """`verify`, whose result can be waited for later where the target runs on a device."""
        place = {node: i for i, node in enumerate(trunk)}
        parents = [place.get(tree.nodes[node].parent, -1) for node in trunk]
        batch = self.runner.model.place(tree, trunk)
        tap = None if self.predictor is None else self.predictor.tap
        return PendingVerdict(self.runner.verify(batch, parents, self.sampling, tap), tuple(trunk), self.predictor)


@dataclass(frozen=True, slots=True)
class PendingVerdict:
    """A verdict that is being made."""

    judgement: PendingJudgement
    trunk: tuple[int, ...]
    predictor: Predictor | None

    def done(self) -> bool:
        return self.judgement.done()

    def result(self) -> Verdict:
        judgement = self.judgement.result()
        if judgement.next_token < 0:  # on a device, where a kernel cannot raise
            raise ValueError("target_logits: a row has NaN or +inf, or masks every token")
        path, next_token = judgement.path, judgement.next_token
        outlook = None
        if self.predictor is not None:
            outlook = self.predictor.after(path[-1] if path else 0, next_token, judgement.hidden)
        return Verdict((self.trunk[0], *(self.trunk[i] for i in path)), next_token, judgement.step, outlook)
