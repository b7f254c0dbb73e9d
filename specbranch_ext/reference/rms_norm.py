"""rms_norm in plain torch."""

import torch
from torch import Tensor

from ..ops.rms_norm import RmsNorm

PARTIAL_SUMS = 1024


def rms_norm(
    input: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-6,
    unit_offset: bool = False,
    round_first: bool = True,
) -> RmsNorm:
    """As `specbranch_ext.rms_norm`, to the bit."""
    dtype = input.dtype
    total = input if residual is None else (residual.float() + input.float()).to(dtype)
    x = total.float()
    scaled = x * inverse_root_mean_square(x, eps)
    if round_first:
        scaled = scaled.to(dtype).float()
    factor = weight.float() + 1.0 if unit_offset else weight.float()
    return RmsNorm((scaled * factor).to(dtype), input.new_empty(0) if residual is None else total)


def inverse_root_mean_square(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) of each row of float32 [..., H]: [..., 1]."""
    mean = sum_of_squares(x) / torch.tensor(float(x.shape[-1]))
    # The root of a float64, rounded, is the correctly rounded root of a float32.
    return torch.ones(()) / (mean + float(eps)).double().sqrt().float()


def sum_of_squares(x: Tensor) -> Tensor:
    """Of each row of float32 [..., H]: [..., 1].

    Partial sum j takes the elements j, j + 1024, j + 2048, ... in this order; then the upper half of the partial sums
    is added to the lower, until one is left.
    """
    partial = torch.zeros(*x.shape[:-1], PARTIAL_SUMS)
    for squares in (x * x).split(PARTIAL_SUMS, -1):
        partial[..., : squares.shape[-1]] += squares
    while partial.shape[-1] > 1:
        lower, upper = partial.chunk(2, -1)
        partial = lower + upper
    return partial
