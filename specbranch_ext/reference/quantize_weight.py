"""quantize_weight in plain torch."""

import torch
from torch import Tensor


def quantize_weight(weight: Tensor, format: str) -> Tensor:
    """As `specbranch_ext.quantize_weight`, to the byte."""
    blocks = weight.float().view(weight.shape[0], weight.shape[1] // 32, 32)
    if not blocks.numel():
        return torch.empty(blocks.shape[0], blocks.shape[1] * (34 if format == "q8_0" else 18), dtype=torch.uint8)
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    if format == "q8_0":
        scale = extreme.abs() / 127
        codes = torch.where(scale == 0, 0, blocks / scale).round().to(torch.int8).view(torch.uint8)
        return torch.cat([scale.half().view(torch.uint8), codes], -1).flatten(1)
    per_step = (-8 + 0.25 * torch.arange(-4, 8, dtype=torch.float32)) / extreme  # [out, blocks, tried]
    tried = (blocks[..., None, :] * per_step[..., None]).nan_to_num(0, 0, 0).round().clamp(-8, 7)
    with_codes, of_codes = _sum(blocks[..., None, :] * tried), _sum(tried.square())
    best = (with_codes.square() / of_codes).nan_to_num(0).argmax(-1, keepdim=True)
    empty = extreme.abs() <= 1e-30
    scale = torch.where(empty, 0, (with_codes / of_codes).gather(-1, best))
    codes = tried.gather(-2, best[..., None].expand(*best.shape, 32))[..., 0, :]
    codes = torch.where(empty, 0, codes).int() + 8
    both = (codes[..., :16] | codes[..., 16:] << 4).to(torch.uint8)
    return torch.cat([scale.half().view(torch.uint8), both], -1).flatten(1)


def _sum(x: Tensor) -> Tensor:
    """Over the last dimension, by halves."""
    while x.shape[-1] > 1:
        low, high = x.chunk(2, -1)
        x = low + high
    return x[..., 0]
