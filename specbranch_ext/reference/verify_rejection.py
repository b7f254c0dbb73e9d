"""verify_rejection in plain torch."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.verify_rejection import RejectionVerification
from .noise import noise_words
from .processed import only_allowed, process

ACCEPT, RESIDUAL = 2, 3  # purposes of random words, as in noise.py


class Chances(NamedTuple):
    """What the coins and the final draw decide about; m drafted tokens could have been drawn from the draft.

    accept: float64 [m]; coin i says yes with this chance. Token-wise, the drafted tokens before the first no are
        accepted; with block verification, those up to the last yes.
    weights: int64 [m + 1, V]; row i holds the law of the next token when i drafted tokens are accepted, up to a
        factor.
    """

    accept: Tensor
    weights: Tensor


def chances(
    target_logits: Tensor,
    draft_logits: Tensor,
    tokens: Tensor,
    *,
    block: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    allowed: Tensor | None = None,
) -> Chances:
    """The chances of one chain; see `specbranch_ext.ops.verify_rejection`."""
    target_logits = only_allowed(target_logits, allowed)
    draft_logits = only_allowed(draft_logits, None if allowed is None else allowed[:-1])
    options = (temperature, top_k, top_p, min_p)
    drafted = tokens[1:].tolist()
    drawn = [0 <= token < target_logits.shape[1] for token in drafted]
    drafted = drafted[: (*drawn, False).index(False)]  # padding ends the chain
    m = len(drafted)
    target, target_share = weights(target_logits[: m + 1], *options)
    draft, draft_share = weights(draft_logits[:m], *options)
    for i in range(m):
        if draft[i, drafted[i]] == 0:  # so does a token that the draft cannot have drawn
            m = i
            break

    # path[i]: the chance to keep drafted token i or, with block verification, the path up to it.
    path = torch.ones(m + 1, dtype=torch.float64)
    scale = target_share[: m + 1].clone()
    for i in range(m):
        ratio = scale[i] * target[i, drafted[i]] / (draft_share[i] * draft[i, drafted[i]])
        path[i + 1] = ratio.clamp(max=1.0)
        if block and i + 1 < m:
            scale[i + 1] *= path[i + 1]
    excess = scale * target[: m + 1]
    excess[:m] -= draft_share[:m] * draft[:m]
    residual = (excess.clamp(min=0.0) * 2.0**60).to(torch.int64)

    accept = path[1:].clone()
    if block:
        # A path of chance p goes on as a residual of mass r, or was lost before: 1 - p.
        for i in range(1, m):
            r = residual[i].sum().to(torch.float64) * 2.0**-60
            if path[i] < 1.0:
                accept[i - 1] = r / (r + (1.0 - path[i]))
    for i in range(m):
        if residual[i].sum() == 0:  # draft and target are equal up to rounding, so a rejection is rounding too
            residual[i, target_logits[i].argmax()] = 1
    return Chances(accept, residual)


def weights(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """floor(2^40 * exp(z - max z)) of the kept tokens, 0 elsewhere: float64 [n, V]; and one over their sum, [n, 1].

    At temperature 0, the lowest of the largest logits alone is kept.
    """
    processed = process(logits, temperature, top_k, top_p, min_p)
    fixed = torch.where(processed.kept, (processed.weight.to(torch.float64) * 2.0**40).to(torch.int64), 0)
    if temperature == 0:
        fixed = torch.nn.functional.one_hot(logits.argmax(dim=1), logits.shape[1]) * 2**40
    return fixed.to(torch.float64), 1.0 / fixed.sum(dim=1, keepdim=True).to(torch.float64)


def random_integers(position: Tensor, count: int, seed: int | Tensor, purpose: int) -> list[int]:
    """Uniform integers of 64 bits from pairs of words."""
    words = noise_words(position.reshape(1), 2 * count, seed, purpose)[0].tolist()
    return [high << 32 | low for high, low in zip(words[0::2], words[1::2], strict=True)]


def verify_rejection(
    target_logits: Tensor,
    draft_logits: Tensor,
    tokens: Tensor,
    positions: Tensor,
    *,
    block: bool = False,
    seed: int | Tensor = 0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    allowed: Tensor | None = None,
) -> RejectionVerification:
    """See `specbranch_ext.ops.verify_rejection`."""
    accept, weight = chances(
        target_logits,
        draft_logits,
        tokens,
        block=block,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        allowed=allowed,
    )
    coins = random_integers(positions[0], len(accept), seed, ACCEPT)
    yes = [coin < int(chance * 2.0**64) for coin, chance in zip(coins, accept.tolist(), strict=True)]
    last_yes = max((i + 1 for i, said in enumerate(yes) if said), default=0)
    first_no = (*yes, False).index(False)
    accepted = last_yes if block else first_no

    sums = weight[accepted].cumsum(dim=0)
    (uniform,) = random_integers(positions[accepted], 1, seed, RESIDUAL)
    reached = uniform * int(sums[-1]) >> 64
    next_token = torch.searchsorted(sums, reached, right=True)  # the first sum above
    return RejectionVerification(torch.tensor(accepted), next_token)
