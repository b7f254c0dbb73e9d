"""verify in plain torch."""

import torch
from torch import Tensor

from ..ops.verify import Verification
from .processed import numbers, perturbed_scores, process


def verify(
    target_logits: Tensor,
    tokens: Tensor,
    parents: Tensor,
    positions: Tensor,
    *,
    seed: int | Tensor = 0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    filters: Tensor | None = None,
) -> Verification:
    """See `specbranch_ext.ops.verify`."""
    temperature, top_k, top_p, min_p = numbers(filters, temperature, top_k, top_p, min_p)
    processed = process(target_logits, temperature, top_k, top_p, min_p)
    scores = perturbed_scores(processed, positions, seed, temperature)
    usable = processed.z.amax(dim=1).isfinite()
    for row in range(len(usable)):
        if not usable[row] and (row == 0 or parents[row] >= 0):
            raise ValueError(f"target_logits: row {row} cannot be sampled")
    target_tokens = scores.argmax(dim=1).masked_fill(~usable, -1)  # the first of equal ones

    path = torch.full_like(positions, -1)
    node, accepted = 0, 0
    for child in range(1, len(tokens)):
        if parents[child] == node and tokens[child] == target_tokens[node]:
            path[accepted] = node = child
            accepted += 1
    return Verification(target_tokens, path, torch.tensor(accepted), target_tokens[node].clone())
