"""packed_linear in plain torch."""

import torch
from torch import Tensor

from ..packed import PackedWeight
from .blocks import FORMATS, RUN, parse, width_of
from .linear import linear
from .unpack_rows import unpack_weight


def packed_linear(input: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """As `specbranch_ext.packed_linear`: in the exact arithmetic summed in float64, in the fast one to the bit."""
    if weight.arithmetic == "fast":
        return _fast(input, weight, bias)
    return linear(input, unpack_weight(weight), bias)


def _fast(input: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    size_out, size_in = weight.shape
    blocks = FORMATS[weight.format]
    parts = parse(weight.data, blocks, width_of(weight.arithmetic), size_out, size_in)
    scale, minimum = parts.values(blocks)
    runs = input.float().reshape(-1, size_in // RUN, RUN)
    most = runs.abs().amax(-1)
    small = most < 1e-30
    codes = torch.where(small[..., None], 0, runs * torch.full_like(most, 127).div(most)[..., None]).round()
    scales = torch.where(small, 0, most / 127.0)
    scales = torch.where(runs.isfinite().all(-1), scales, torch.nan)
    codes = codes.nan_to_num(0, 0, 0)
    of_input = codes.reshape(-1, size_in // blocks.scaled, blocks.scaled).double()
    of_weight = (parts.codes - blocks.zero).view(size_out, -1, blocks.scaled).double()
    sums = torch.einsum("rbe,obe->rob", of_input, of_weight)  # of integers
    y = torch.zeros(runs.shape[0], size_out)
    for i in range(size_in // blocks.scaled):
        run = i * blocks.scaled // RUN
        factor = scale[:, i] * scales[:, run, None]
        y = (sums[..., i] * factor.double() + y.double()).float()  # a product of two float32 is exact in float64
        if minimum is not None:
            total = scales[:, run] * codes[:, run].sum(-1)
            y = (y.double() - minimum[:, run].double() * total[:, None].double()).float()
    if bias is not None:
        y = y + bias.float()
    return y.bfloat16().view(*input.shape[:-1], size_out)
