"""draft_sample in plain torch."""

import torch
from torch import Tensor

from ..ops.draft_sample import DraftSample
from .processed import by_row, only_allowed, sampled


def draft_sample(
    draft_logits: Tensor,
    positions: Tensor,
    k: int,
    *,
    seed: int | Tensor = 0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    filters: Tensor | None = None,
    allowed: Tensor | None = None,
) -> DraftSample:
    """See `specbranch_ext.ops.draft_sample`."""
    logits = only_allowed(draft_logits, allowed)
    processed, scores = sampled(logits, positions, seed, filters, temperature, top_k, top_p, min_p)
    usable = processed.z.amax(dim=1, keepdim=True).isfinite()
    if not usable.all() and not by_row(seed, filters):
        raise ValueError(f"draft_logits: row {int(usable.flatten().logical_not().nonzero()[0])} cannot be sampled")
    scores = scores.masked_fill(~usable, -torch.inf)
    # A stable sort leaves ties in the order of their tokens.
    best, tokens = (part[:, :k] for part in scores.sort(dim=1, descending=True, stable=True))
    found = best > -torch.inf

    weight = torch.where(processed.kept, processed.weight, 0.0).to(torch.float64)
    probability = weight / weight.sum(dim=1, keepdim=True)
    entropy = -torch.special.xlogy(probability, probability).sum(dim=1).masked_fill(~usable[:, 0], torch.nan)
    confidence = probability.gather(1, tokens)
    return DraftSample(
        tokens.masked_fill(~found, -1),
        best,
        confidence.masked_fill(~found, 0.0).to(torch.float32),
        entropy.to(torch.float32),
    )
