"""gumbel_noise: the noise that `verify` and `draft_sample` add, as a tensor."""

from typing import Any

import torch
from torch import Tensor

from ._library import int64_scalar, register


def _outputs(positions: Tensor, vocabulary: int, *_: Any) -> Tensor:
    return positions.new_empty((positions.shape[0], vocabulary), dtype=torch.float32)


_op = register("gumbel_noise(Tensor positions, SymInt vocabulary, Tensor seed) -> Tensor", _outputs)


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
        ValueError: a tensor has another shape or dtype, or vocabulary is below 1; the message names it.
    """
    if vocabulary < 1:
        raise ValueError(f"vocabulary: expected at least 1, got {vocabulary}")
    noise: Tensor = _op(positions, vocabulary, int64_scalar(seed, "seed", positions.device))
    return noise
