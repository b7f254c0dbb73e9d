"""Modules whose rows do not depend on each other: a row's bits do not change with the number of rows in its forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS

from specbranch.runtime.rotary import rotary_forward
from specbranch_ext import linear

ACTIVATIONS = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}

LINEAR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def exact_forward(module: nn.Module, device: torch.device) -> Callable[..., Any] | None:
    """What to run instead of a module's own forward; None where that is exact per row already, or not on the CPU."""
    if isinstance(module, nn.Linear) and _exact_linear_fits(module):
        return partial(_exact_linear, module)
    if device.type == "cpu" and type(module) in ACTIVATIONS and "forward" not in vars(module):
        return partial(_exact_activation, module)
    return rotary_forward(module, device)


def _exact_linear_fits(module: nn.Linear) -> bool:
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and module.weight.device.type == "cpu"
        and module.weight.dtype in LINEAR_DTYPES
    )


def _exact_linear(module: nn.Linear, input: Tensor) -> Tensor:
    return linear(input, module.weight, module.bias)


def _exact_activation(module: nn.Module, input: Tensor) -> Tensor:
    """Row by row: torch's vector loop ends in a tail with another exponential, which differs in the last bit."""
    rows = input.reshape(-1, input.shape[-1])
    if len(rows) == 1:
        alone: Tensor = type(module).forward(module, input)
        return alone
    return torch.stack([type(module).forward(module, row) for row in rows]).view(input.shape)
