"""Modules whose rows do not depend on each other: a row's bits do not change with the number of rows in its forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS, SiLUActivation
from transformers.pytorch_utils import Conv1D

import specbranch_ext  # noqa: F401  (it registers the op)
from specbranch.runtime.modes import no_grad
from specbranch.runtime.rotary import chooses_by_length, on_one_thread, row_by_row
from specbranch.runtime.rows.functions import fits_linear, in_whole_vectors
from specbranch.runtime.rows.routes import own_forward, replacement, routed_forward

linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = torch.ops.specbranch.linear.default
"""`specbranch_ext.linear` without the checks of its arguments: `known` has seen to the weights."""

SHARED_EVENLY: set[type[nn.Module]] = {nn.SiLU, SiLUActivation}
"""Activations whose loop torch shares among threads as in_whole_vectors says."""
ACTIVATIONS = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}

# Row-major copies of weights that lie otherwise. As many bytes again as those weights have, for as long as the model
# lives; written anew for every generation, since weights may change between two in ways that leave no trace.
_row_major: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


def exact_forward(module: nn.Module, device: torch.device) -> Callable[..., Any] | None:
    """What to run instead of a module's own forward; None where that is exact per row already, or not on the CPU.

    What the type of a module does not show is found by rows.probe, and run from here too.
    """
    run = known(module, device)
    if run is None:
        return routed_forward(module)
    if run is _exact_copied:
        return replacement(module, run, module, row_major(module))
    return replacement(module, run, module)


def known(module: nn.Module, device: torch.device) -> Callable[..., Any] | None:
    """How modules are run that are known by their type and their weights."""
    if chooses_by_length(module):
        return row_by_row
    kind = type(module)
    if own_forward(module) is not None:
        return None
    if kind in (nn.Linear, Conv1D):
        weight, bias = module.weight, module.bias
        if not fits_linear(weight, bias):
            return None
        assert isinstance(weight, Tensor)
        return _exact_linear if kind is nn.Linear and weight.stride(1) == 1 else _exact_copied
    if device.type == "cpu" and kind in ACTIVATIONS:
        return _exact_activation
    if device.type == "cpu" and kind.__name__.endswith("RotaryEmbedding"):
        return on_one_thread
    return None


@no_grad
def row_major(module: nn.Module) -> Tensor:
    """A contiguous copy [out, in] of the weight, in memory that is kept for it."""
    weight = module.weight.T if type(module) is Conv1D else module.weight
    assert isinstance(weight, Tensor)
    kept = _row_major.get(module)
    if kept is None or (kept.shape, kept.dtype) != (weight.shape, weight.dtype):
        kept = _row_major[module] = torch.empty(weight.shape, dtype=weight.dtype)
    return kept.copy_(weight)


def _exact_linear(module: nn.Linear, input: Tensor) -> Tensor:
    return linear(input, module.weight, module.bias)


def _exact_copied(module: nn.Linear | Conv1D, weight: Tensor, input: Tensor) -> Tensor:
    return linear(input, weight, module.bias)


def _exact_activation(module: nn.Module, input: Tensor) -> Tensor:
    """Row by row, unless torch's vector loop has no tail: that has another exponential, which differs in the last
    bit."""
    rows = input.reshape(-1, input.shape[-1])
    if len(rows) <= 1 or (type(module) in SHARED_EVENLY and input.is_contiguous() and in_whole_vectors(input)):
        whole: Tensor = type(module).forward(module, input)
        return whole
    return torch.stack([type(module).forward(module, row) for row in rows]).view(input.shape)
