"""verify_rejection: classical speculative sampling, from the logits of target and draft. For other decoders."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import checked
from ._library import int64_scalar, register
from ._tickets import tickets


class RejectionVerification(NamedTuple):
    """What `verify_rejection` returns; both int64 [].

    accepted: how many drafted tokens are kept: tokens[1] to tokens[accepted].
    next_token: the token that follows them.
    """

    accepted: Tensor
    next_token: Tensor


def _outputs(
    target_logits: Tensor, draft_logits: Tensor, tokens: Tensor, positions: Tensor, seed: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return torch.empty_like(seed), torch.empty_like(seed)


def _workspace(
    target_logits: Tensor, draft_logits: Tensor, tokens: Tensor, positions: Tensor, seed: Tensor, *options: Any
) -> tuple[Any, ...]:
    *numbers, _block, _allowed = options
    return positions.numel(), target_logits.shape[-1:].numel(), *numbers


_op = register(
    "verify_rejection(Tensor target_logits, Tensor draft_logits, Tensor tokens, Tensor positions, Tensor seed, "
    "float temperature, int top_k, float top_p, float min_p, bool block, Tensor? allowed=None) "
    "-> (Tensor, Tensor)",
    _outputs,
    workspace=_workspace,
    tickets=tickets,
)


@checked
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
    """Accept drafted tokens so that the text has the target's law, and draw the token that follows them.

    An op for decoders that draft by sampling on their own. The engine of `specbranch` does not call it: it verifies by
    comparing drafted tokens with the target's own draw, see `verify`.

    Let P be the target's and D the draft's probabilities after the filters. Drafted token x is accepted with
    probability min(1, P(x) / D(x)). After the first rejection the next token is drawn from max(P - D, 0), scaled to a
    sum of 1; if all are accepted, from P (Leviathan, Kalman and Matias, arXiv 2211.17192; Chen et al., arXiv
    2302.01318).

    With `block` the whole path counts: p = min(1, p P(x) / D(x)) along it, and one coin is tossed at every token. Its
    probability is p at the last drafted token and r / (r + 1 - p) before, where r is the sum of max(p P - D, 0). The
    tokens up to the last successful coin are accepted, and the next one is drawn from that residual (Sun et al., arXiv
    2403.10444, algorithm 2). This accepts no fewer tokens on average, and often more.

    Unlike `verify`, the text for one seed depends on the draft; its law is the target's. Weights exp(z - max z) count
    in units of 2^-40, and a token below that has probability 0.

    This holds only if tokens[i + 1] was drawn from the filtered distribution of draft_logits[i], with randomness that
    nothing before depends on. `draft_sample` draws like that, but its noise at a position is the same in every call
    with one seed: after a rejection, draft the next tokens with another seed. The coins are keyed by (seed,
    positions[0], place in the chain) and the next token's draw by (seed, its position). So calls on one text share no
    randomness, as long as each starts behind the tokens of the one before.

    Args:
        target_logits: float32, bfloat16 or float16 [n, V] with V up to 2^22; row i holds the logits after node i of
            the chain (the root, then n - 1 drafted tokens). Rows may have any stride. -inf masks a token. On a CUDA
            device n is at most 1024.
        draft_logits: the same dtype [n - 1, V]; row i is what tokens[i + 1] was drawn from. (Where the two models pad
            their vocabularies differently, pass views of the tokens that both have.)
        tokens: int64 [n]; the root's is ignored. The first drafted token outside 0 to V - 1, such as -1 for padding,
            ends the chain: no row behind it is read, and the token in its place is drawn from P. A drafted token with
            D(x) = 0, which the draft cannot have drawn, is rejected in the same way.
        positions: int64 [n], the absolute position of the token that row i predicts.
        block: False verifies token by token, True the chain as a block.
        seed: int or int64 [].
        temperature: 0, or from 1e-38 to 1e38. At 0 both distributions are 1 on the lowest of the largest logits, and
            the filters are not applied.
        top_k: 0 is off.
        top_p: above 0; 1 is off.
        min_p: 0 is off.
        allowed: int32 [n, ceil(V / 32)], the tokens that may come after each node, as in `verify`; row i is for row i
            of both tensors of logits, which are about the same place of the text. P and D are then the probabilities
            of the allowed tokens alone: draw tokens[i + 1] under row i too.

    Returns:
        A `RejectionVerification`.

    Raises:
        ValueError: wrong shape, dtype or range, NaN or +inf in the logits, or a row that masks every token (its
            logits, `allowed` or both); the message names the tensor and the row. On a CUDA device bad values do not
            raise: next_token is then -1, with nothing accepted.
    """
    return RejectionVerification(
        *_op(
            target_logits,
            draft_logits,
            tokens,
            positions,
            int64_scalar(seed, "seed", positions.device),
            temperature,
            top_k,
            top_p,
            min_p,
            block,
            allowed,
        )
    )
