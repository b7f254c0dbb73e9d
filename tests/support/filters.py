"""Sampling options that the tests of verify and draft_sample go through."""

from typing import Any

import torch
from torch import Tensor

FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 1.5, "top_p": 0.3},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 3000, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 12_000, "top_p": 0.9},  # too many for a list: two searches
    {"temperature": 1.2, "top_k": 200, "top_p": 0.5, "min_p": 0.01},
]


def in_memory(options: dict[str, Any]) -> Tensor:
    """The same options as the tensor `filters`."""
    values = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
    return torch.tensor(list(values.values()), dtype=torch.float64)
