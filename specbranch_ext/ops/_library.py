"""How an op is registered with torch, and the conversions that the typed functions share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# One fragment for all ops. `Library` rather than `custom_op`: its calls cost a few microseconds less.
_LIBRARY = torch.library.Library("specbranch", "FRAGMENT")


def register(schema: str, cpu: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define `torch.ops.specbranch.<op>` with a CPU and a fake kernel; returns the overload."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"specbranch::{name}", fake, lib=_LIBRARY)
    overload: Callable[..., Any] = getattr(torch.ops.specbranch, name).default
    return overload


def int64_scalar(value: int | Tensor, name: str, device: torch.device) -> Tensor:
    """An int as an int64 tensor of shape [] on `device`; a tensor is checked and passed through."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.dim() != 0:
            raise ValueError(f"{name}: expected an int or an int64 tensor of shape [], got {describe(value)}")
        return value
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an int of 64 bits, got {value}")
    return torch.scalar_tensor(value, dtype=torch.int64, device=device)  # half the time of torch.tensor


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {list(tensor.shape)}"
