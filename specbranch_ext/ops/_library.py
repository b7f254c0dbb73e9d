"""How an op is registered with torch and run by the core, and the conversions that the typed functions share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _C

core: Any = _C
"""The compiled module that every op runs on. The tests put the emulated CUDA kernels here."""

# One fragment for all ops. `Library` rather than `custom_op`: its calls cost a few microseconds less.
_LIBRARY = torch.library.Library("specbranch", "FRAGMENT")


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define `torch.ops.specbranch.<op>` with one kernel for the CPU and CUDA, and a fake one; returns the overload."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CPU")
    _LIBRARY.impl(name, kernel, "CUDA")
    torch.library.register_fake(f"specbranch::{name}", fake, lib=_LIBRARY)
    overload: Callable[..., Any] = getattr(torch.ops.specbranch, name).default
    return overload


def launch_handle(tensor: Tensor) -> int:
    """What the core needs to start an op where `tensor` is: torch's threads on the CPU, its current stream on CUDA."""
    if tensor.is_cpu:
        return torch.get_num_threads()
    return torch.cuda.current_stream(tensor.device).cuda_stream


def workspace(tensor: Tensor, op: str, *sizes: Any) -> Tensor | None:
    """Uninitialised memory for a CUDA kernel, as many bytes as `<op>_workspace(*sizes)` says; None on the CPU."""
    if tensor.is_cpu and not core.emulated:
        return None
    if not core.emulated and not hasattr(core, f"{op}_workspace"):
        raise ValueError(f"{op}: this build has no CUDA kernels: {core.build_info()['cuda_reason']}")
    return torch.empty(getattr(core, f"{op}_workspace")(*sizes), dtype=torch.uint8, device=tensor.device)


def matrix_shape(tensor: Tensor, name: str) -> tuple[int, int]:
    """n and V of logits [n, V]."""
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected shape [n, V], got {describe(tensor)}")
    return tensor.shape[0], tensor.shape[1]


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
