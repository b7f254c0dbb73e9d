"""verify: which drafted tokens the target would have sampled itself, and the token that follows them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import checked
from ._library import check_matrix, register, seeds
from ._tickets import tickets


class Verification(NamedTuple):
    """What `verify` returns; all int64.

    target_tokens: [n], the target's own token after each node; -1 after an unused one whose row cannot be sampled.
    path: [n], the accepted nodes from the root's child down, padded with -1.
    accepted: [], how many nodes `path` holds.
    next_token: [], the target's token after the last accepted node (or the root).

    With `roots`, the accepted nodes of the text whose root is row r are path[r], path[r + 1], and so on, and `accepted`
    and `next_token` are [s]. A text with a row that cannot be sampled, and one that is not there, has 0 accepted and
    next_token -1.
    """

    target_tokens: Tensor
    path: Tensor
    accepted: Tensor
    next_token: Tensor


def _outputs(
    target_logits: Tensor, tokens: Tensor, parents: Tensor, positions: Tensor, seed: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    check_matrix(target_logits, "target_logits")
    *_, roots, _allowed = options
    texts = roots if roots is not None else seed if seed.dim() == 0 else positions.new_empty(())
    return torch.empty_like(positions), torch.empty_like(positions), torch.empty_like(texts), torch.empty_like(texts)


def _workspace(target_logits: Tensor, *arguments: Any) -> tuple[Any, ...]:
    *_, temperature, top_k, top_p, min_p, filters, _roots, _allowed = arguments
    return *target_logits.shape, temperature, top_k, top_p, min_p, filters is not None


_op = register(
    "verify(Tensor target_logits, Tensor tokens, Tensor parents, Tensor positions, Tensor seed, "
    "float temperature, int top_k, float top_p, float min_p, Tensor? filters=None, Tensor? roots=None, "
    "Tensor? allowed=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _outputs,
    workspace=_workspace,
    tickets=tickets,
)


@checked
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
    """Sample the target's token after every node of a speculation tree, and walk down while drafts equal them.

    The target's token is `argmax(z + g)` over the tokens that the filters keep: z is the logit divided by the
    temperature, g the Gumbel noise of (seed, position, token), see `gumbel_noise`. That is an exact sample from
    the target's processed distribution (Gumbel-max trick), and a pure function of the logits, the seed and the
    position, so nothing the draft does can change the text. At temperature 0 it is the plain argmax. Ties go to
    the lowest token.

    One call may verify the trees of several texts: `roots` says where each begins, and every row may have a seed and
    filters of its own. A row's token has the bits that it has alone, with its seed and its filters as numbers.

    Filters apply in transformers' order (temperature, top-k, top-p, min-p); tokens with equal logits stay or go
    together.

    Args:
        target_logits: float32, bfloat16 or float16 [n, V]; row i holds the logits after node i. Rows may have
            any stride. -inf masks a token.
        tokens: int64 [n]; a root's (node 0 without `roots`) is ignored.
        parents: int64 [n], nodes of the call, parents before children; -1 for a root. Another -1 marks an unused node,
            whose row may hold anything.
        positions: int64 [n], the absolute position of the token that row i predicts.
        seed: int or int64 [], or int64 [n] with one for each row.
        temperature: 0 (greedy, the filters are then not applied) or a number from 1e-38 to 1e38.
        top_k: 0 is off.
        top_p: above 0; 1 is off.
        min_p: 0 is off.
        filters: float64 [4] in place of the four numbers above, in that order, with the same results, or [n, 4] with
            those of each row. The kernel reads them when it runs, so that a captured graph need not be captured again
            for other ones.
        roots: int64 [s], ascending: the node where the tree of each text begins. Its nodes are those up to the next
            root; those before the first one are in no tree and unused. -1, at the end, is for a text that is not there,
            so that a captured graph serves fewer texts. Without it there is one tree, of all nodes.
        allowed: int32 [n, ceil(V / 32)], a bit for each token: row i's token may be t iff bit t % 32 of
            allowed[i, t // 32] is set, the lowest bit being bit 0. The result has the bits of a call where the logits
            of all other tokens, which may hold anything, are -inf. Bits of tokens from V on mean nothing. Rows may have
            any stride. The kernel reads it when it runs, as it does `filters`. None: all tokens are allowed.
            (The layout is the one of the masks that llguidance and xgrammar fill.)

    Returns:
        A `Verification`. Among equal siblings the first one is taken.

    Raises:
        ValueError: wrong shape, dtype or range, a parent after its child or in another tree, roots that do not ascend,
            and NaN or +inf in the logits or a row that masks every token (its logits, `allowed` or both), except in
            rows of unused nodes; the message names the tensor and the row. With `roots`, rows that cannot be sampled do
            not raise: such a row has target token -1, and a text with a node that is not unused and has such a row, has
            nothing accepted and next_token -1; the other texts are as they are without it. On a CUDA device only
            shapes, dtypes and options raise, and rows that cannot be sampled are marked like that, `roots` or not; a
            node whose parent is not an earlier one of its tree is never accepted; a root outside the call is of a text
            that is not there, and if the roots do not ascend none is. With filters out of range the rows that they are
            for cannot be sampled there.
    """
    return Verification(
        *_op(
            target_logits,
            tokens,
            parents,
            positions,
            seeds(seed, positions),
            temperature,
            top_k,
            top_p,
            min_p,
            filters,
            roots,
            allowed,
        )
    )
