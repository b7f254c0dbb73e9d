"""draft_sample: the draft's best guesses of the token that the target is going to sample."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import checked
from ._library import check_matrix, register, seeds


class DraftSample(NamedTuple):
    """What `draft_sample` returns; candidates best first.

    tokens: int64 [b, k], -1 where the filters left fewer than k.
    scores: float32 [b, k], scaled logit + noise (at temperature 0 the logit); -inf where there is no token.
    confidence: float32 [b, k], the draft's probability of each candidate; 0 where there is no token.
    entropy: float32 [b], of that distribution, in nats.
    """

    tokens: Tensor
    scores: Tensor
    confidence: Tensor
    entropy: Tensor


def _outputs(draft_logits: Tensor, positions: Tensor, k: int, *_: Any) -> tuple[Tensor, ...]:
    check_matrix(draft_logits, "draft_logits")
    rows, vocabulary = draft_logits.shape
    if not 1 <= k <= max(vocabulary, 1):
        raise ValueError(f"k: expected 1 to V = {vocabulary}, got {k}")
    tokens = draft_logits.new_empty((rows, k), dtype=torch.int64)
    scores = draft_logits.new_empty((rows, k), dtype=torch.float32)
    return tokens, scores, torch.empty_like(scores), draft_logits.new_empty((rows,), dtype=torch.float32)


def _workspace(draft_logits: Tensor, positions: Tensor, k: int, seed: Tensor, *options: Any) -> tuple[Any, ...]:
    *numbers, in_memory, _allowed = options
    return *draft_logits.shape, k, *numbers, in_memory is not None


_op = register(
    "draft_sample(Tensor draft_logits, Tensor positions, int k, Tensor seed, float temperature, int top_k, "
    "float top_p, float min_p, Tensor? filters=None, Tensor? allowed=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _outputs,
    workspace=_workspace,
)


@checked
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
    """The k best tokens of the draft under the noise that the target will use, with their probabilities.

    Candidates are ordered by perturbed score z + g, where g is the noise of `verify` at the same seed and
    position: a draft whose logits are close to the target's then guesses the very token that the target samples.
    The first candidate alone is an exact sample of the draft's distribution, and k of them a sample without
    replacement (Kool, van Hoof, Welling, "Stochastic beams and where to find them", ICML 2019).

    Args:
        draft_logits: float32, bfloat16 or float16 [b, V]; rows may have any stride. -inf masks a token.
        positions: int64 [b], the absolute position of the token that each row predicts.
        k: how many candidates, 1 to V.
        seed: int or int64 [], or int64 [b] with one for each row.
        temperature: as in `verify`, and so are the next four. At 0 scores are the raw logits and confidence is their
            softmax, unfiltered.
        top_k: 0 is off.
        top_p: above 0; 1 is off.
        min_p: 0 is off.
        filters: float64 [4] in place of the four numbers above, or [b, 4] with those of each row.
        allowed: int32 [b, ceil(V / 32)], the tokens that may be candidates, as in `verify`. The logits of all other
            tokens count as -inf, for confidence and entropy too.

    Returns:
        A `DraftSample`. Confidence is renormalised over the tokens that the filters keep. A row's part has the bits
        that it has alone, with its seed and its filters as numbers.

    Raises:
        ValueError: wrong shape, dtype or range, NaN or +inf in the logits, or a row that masks every token (its
            logits, `allowed` or both); the message names the tensor and the row. With a seed or filters for each row,
            the rows are those of several texts, and one that cannot be sampled does not raise: it has tokens -1, scores
            -inf, confidence 0 and entropy NaN. On a CUDA device k is at most 256, and only shapes, dtypes and options
            raise: there such a row is always marked like that, and with filters out of range the rows that they are for
            are such rows.
    """
    return DraftSample(
        *_op(
            draft_logits,
            positions,
            k,
            seeds(seed, positions),
            temperature,
            top_k,
            top_p,
            min_p,
            filters,
            allowed,
        )
    )
