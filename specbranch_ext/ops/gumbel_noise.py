"""gumbel_noise: the noise that `verify` and `draft_sample` add, as a tensor."""

from typing import Any

import torch
from torch import Tensor

from ._checks import checked, describe
from ._library import int64_scalar, register


def _outputs(positions: Tensor, vocabulary: int, *_: Any) -> Tensor:
    if positions.dim() != 1:
        raise ValueError(f"positions: expected int64 of shape [n], got {describe(positions)}")
    return positions.new_empty((positions.shape[0], vocabulary), dtype=torch.float32)


_op = register("gumbel_noise(Tensor positions, SymInt vocabulary, Tensor seed) -> Tensor", _outputs)


@checked
def gumbel_noise(positions: Tensor, vocabulary: int, *, seed: int | Tensor = 0) -> Tensor:
    """The standard Gumbel noise of every token at each position, for a seed.

    A pure function of (seed, position, token): a larger vocabulary only adds columns.

    Args:
        positions: int64 [n], absolute positions of the tokens to be predicted.
        vocabulary: V, the number of tokens.
        seed: int or int64 [].

    Returns:
        float32 [n, V].

    Raises:
        ValueError: a tensor has another shape or dtype, or vocabulary is not from 1 to 2^31 - 1; the message names it.
    """
    if not 1 <= vocabulary < 2**31:
        raise ValueError(f"vocabulary: expected 1 to 2^31 - 1, got {vocabulary}")
    noise: Tensor = _op(positions, vocabulary, int64_scalar(seed, "seed", positions.device))
    return noise
