"""rotary_commit in plain torch, which rounds after every operation as the kernels do."""

import torch
from torch import Tensor
from torch.nn.functional import pad

PARTIAL_SUMS = 32


def sum_of_squares(x: Tensor) -> Tensor:
    """Of the last dimension, which stays with extent 1; float32. Partial sum i takes the elements i, i + 32, ... in
    order, then the upper half is added to the lower one until one is left."""
    squares = pad(x * x, (0, -x.shape[-1] % PARTIAL_SUMS)).unflatten(-1, (-1, PARTIAL_SUMS))
    sums = torch.zeros_like(squares[..., 0, :])
    for part in squares.unbind(-2):
        sums = sums + part
    while sums.shape[-1] > 1:
        lower, upper = sums.chunk(2, -1)
        sums = lower + upper
    return sums


def normed(heads: Tensor, weight: Tensor | None, eps: float, unit_offset: bool, round_first: bool) -> Tensor:
    """RMS norm of [n, H, D] over D; None leaves it out."""
    if weight is None:
        return heads
    x = heads.float()
    # Of float64, because torch's float32 square root is now and then off by a last bit.
    root = (sum_of_squares(x) / x.shape[-1] + float(eps)).double().sqrt().float()
    scaled = x * (torch.ones_like(root) / root)
    if round_first:
        scaled = scaled.to(heads.dtype).float()
    factor = 1.0 + weight.float() if unit_offset else weight.float()
    return (factor * scaled).to(heads.dtype)


def rotated(heads: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """[n, H, D] by cos and sin [n, R]: the first R elements of each head are turned."""
    x, rest = heads.split([cos.shape[1], heads.shape[2] - cos.shape[1]], -1)
    if interleaved:
        other = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    else:
        first, second = x.chunk(2, -1)
        other = torch.cat([-second, first], -1)
    turned = x * cos.unsqueeze(1) + other * sin.unsqueeze(1)
    return torch.cat([turned.to(heads.dtype), rest], -1)


def rotary_commit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    *,
    eps: float = 1e-6,
    unit_offset: bool = False,
    round_first: bool = True,
    interleaved: bool = False,
) -> Tensor:
    """As `specbranch_ext.rotary_commit`: returns the embedded query [n, Hq, D] and writes `keys` and `values`."""
    if (query_norm is None) != (key_norm is None):
        raise ValueError("key_norm: expected a tensor if and only if query_norm is one")
    if len(rows) > 0 and not 0 <= int(rows.min()) <= int(rows.max()) < keys.shape[1]:
        raise ValueError(f"rows: expected rows from 0 to {keys.shape[1] - 1}")
    query = normed(query, query_norm, eps, unit_offset, round_first)
    key = normed(key, key_norm, eps, unit_offset, round_first)
    keys[:, rows] = rotated(key, cos, sin, interleaved).transpose(0, 1)
    values[:, rows] = value.transpose(0, 1)
    return rotated(query, cos, sin, interleaved)
