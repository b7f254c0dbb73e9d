"""A tiny target with a draft that is nearly the same, and what tests ask of its captured steps."""

from typing import Any

import torch
from recording_device import RecordedGraph
from tiny import FAMILIES, tiny_model

from specbranch import METHODS, SpecBranch
from specbranch.policies.costs import Costs, CostsByTexts

SAMPLINGS: list[dict[str, Any]] = [{}, {"temperature": 0.9, "top_k": 12, "top_p": 0.95, "seed": 3}]


def tiny_pair(family: str = "llama", noise: float = 0.003, dtype: torch.dtype = torch.float32) -> SpecBranch:
    """A target, and a draft that is the same model with a little noise on its weights; without, it is always right. It
    reads every prompt, whether or not that pays on this machine."""
    sizes: dict[str, Any] = {**FAMILIES.get(family, {}), "max_position_embeddings": 2048}
    target, draft = (tiny_model(family.split("-")[0], **sizes) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(noise * torch.randn(weight.shape, generator=generator))
    pair = SpecBranch(target.to(dtype), draft.to(dtype), draft_context="all")  # type: ignore[arg-type]
    for method in METHODS:
        for name in (
            f"{method}{free}{under}" for free in ("", " with retrieval") for under in ("", " under a constraint")
        ):
            pair.decoder._costs[name] = CostsByTexts(Costs())  # which take it for a small one: as it is, it would rest
    return pair


def ends_in(graph: RecordedGraph, op: str) -> bool:
    return graph.calls[-1][0] is getattr(torch.ops.specbranch, op).default


def rows_of(graph: RecordedGraph, op: str) -> int:
    """Rows of a captured step, by its op."""
    return next(
        int(args[0].shape[0]) for func, args, _, _ in graph.calls if func is getattr(torch.ops.specbranch, op).default
    )
