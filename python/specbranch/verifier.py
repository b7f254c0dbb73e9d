"""The verifier: the target model scores the trunk and says how much of it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specbranch.hrad import Outlook, Predictor
from specbranch.model import CachedModel
from specbranch.sampling import Sampling
from specbranch.tree import Tree
from specbranch_ext import verify


@dataclass(frozen=True, slots=True)
class Verdict:
    """The target's word on a trunk: the accepted path, from the root down, and the token that follows it.

    outlook: what a predictor says of the next drafted tokens, where there is one.
    """

    path: tuple[int, ...]
    next_token: int
    outlook: Outlook | None = None

    @property
    def accepted(self) -> int:
        """Drafted tokens accepted: the path without the root."""
        return len(self.path) - 1


class Verifier:
    """The target samples every token itself; a drafted token stands while it equals the target's."""

    def __init__(self, model: CachedModel, sampling: Sampling, predictor: Predictor | None = None) -> None:
        """predictor: attached to the model; None for no outlooks."""
        self.model = model
        self.sampling = sampling
        self.predictor = predictor

    def prefill(self, tokens: Sequence[int]) -> None:
        self.model.prefill(tokens)

    def commit(self, path: Sequence[int]) -> None:
        """Keep the accepted path; drop the rest."""
        self.model.cache.commit(path)

    def verify(self, tree: Tree, trunk: Sequence[int]) -> Verdict:
        """One target forward over `trunk`: tree nodes, the root first, parents before children."""
        logits = self.model.score(tree, trunk)
        place = {node: i for i, node in enumerate(trunk)}
        rows = [tree.nodes[node] for node in trunk]
        columns = [
            [row.token for row in rows],
            [place.get(row.parent, -1) for row in rows],
            [tree.position + row.depth + 1 for row in rows],
        ]
        tokens, parents, positions = torch.tensor(columns, device=logits.device)
        verdict = verify(logits, tokens, parents, positions, **self.sampling.op_arguments)
        if verdict.next_token < 0:  # on a device, where a kernel cannot raise
            raise ValueError("target_logits: a row has NaN or +inf, or masks every token")
        path, next_token = verdict.path[: int(verdict.accepted)].tolist(), int(verdict.next_token)
        outlook = None if self.predictor is None else self.predictor.after(path[-1] if path else 0, next_token)
        return Verdict((trunk[0], *(trunk[i] for i in path)), next_token, outlook)
