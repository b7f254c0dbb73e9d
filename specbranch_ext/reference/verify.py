"""verify in plain torch."""

import torch
from torch import Tensor

from ..ops.verify import Verification
from .processed import only_allowed, sampled


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
    roots: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Verification:
    """See `specbranch_ext.ops.verify`."""
    logits = only_allowed(target_logits, allowed)
    processed, scores = sampled(logits, positions, seed, filters, temperature, top_k, top_p, min_p)
    usable = processed.z.amax(dim=1).isfinite()
    target_tokens = scores.argmax(dim=1).masked_fill(~usable, -1)  # the first of equal ones
    path = torch.full_like(positions, -1)

    def walk(root: int, end: int) -> tuple[int, int]:
        """How many nodes of the tree in these rows are accepted, and the token behind them."""
        for row in range(root, end):
            if not usable[row] and (row == root or parents[row] >= 0):
                if roots is None:
                    raise ValueError(f"target_logits: row {row} cannot be sampled")
                return 0, -1
        node, accepted = root, 0
        for child in range(root + 1, end):
            if parents[child] == node and tokens[child] == target_tokens[node]:
                path[root + accepted] = node = child
                accepted += 1
        return accepted, int(target_tokens[node])

    if roots is None:
        accepted, next_token = walk(0, len(tokens))
        return Verification(target_tokens, path, torch.tensor(accepted), torch.tensor(next_token))
    begins = [root for root in roots.tolist() if root >= 0]
    ends = [*begins[1:], len(tokens)]
    verdicts = [walk(root, end) for root, end in zip(begins, ends, strict=False)]
    verdicts += [(0, -1)] * (len(roots) - len(begins))  # of texts that are not there
    accepted_nodes, next_tokens = torch.tensor(verdicts, dtype=torch.int64).view(-1, 2).unbind(dim=1)
    return Verification(target_tokens, path, accepted_nodes.contiguous(), next_tokens.contiguous())
