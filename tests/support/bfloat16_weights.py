"""Weights of bfloat16 of all kinds, and their bits."""

import torch
from torch import Tensor

SHAPES = [(1, 1), (3, 5), (4, 32), (5, 33), (7, 540), (64, 512), (66, 63), (131, 896), (19, 4100)]


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16)


def make(size_out: int, size_in: int) -> Tensor:
    """Weights of all kinds: runs of close exponents, and runs that no 4 bits can tell apart."""
    weight = torch.randn(size_out, size_in) * 0.02
    weight[:, ::37] *= torch.randn(weight[:, ::37].shape).mul(30).exp2()
    weight[size_out // 2] = 0
    flat = weight.flatten()
    odd = [float("inf"), float("-inf"), float("nan"), -0.0, 1e-39, -3e38]
    flat[torch.randperm(len(flat))[: len(odd)]] = torch.tensor(odd)[: len(flat)]
    return flat.view(size_out, size_in).bfloat16()
