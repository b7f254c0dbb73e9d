"""Inputs of tree_attention, its variants, and how close an implementation must come."""

from typing import Any

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"scale": 0.3},
    {"softcap": 2.0},
    {"sliding_window": 5},
    {"sliding_window": 1},
    {"sliding_window": 60, "softcap": 30.0},
    {"by_position": False},
    {"sliding_window": 5, "by_position": False},
]


def random_inputs(
    n: int,
    prefix: int,
    heads: tuple[int, int] = (6, 2),
    dims: tuple[int, int] = (32, 32),
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys, values; the cache has five rows more than it needs, and they hold NaN."""
    generator = torch.Generator().manual_seed(n * 1000 + prefix)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    query = normal(n, heads[0], dims[0])
    keys = normal(heads[1], prefix + n + 5, dims[0])
    values = normal(heads[1], prefix + n + 5, dims[1])
    keys[:, prefix + n :] = float("nan")
    values[:, prefix + n :] = float("nan")
    return query, keys, values


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)
