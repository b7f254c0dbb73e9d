"""Products of linear layers, without their modules' calls; those over one input as a single one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import specbranch_ext  # noqa: F401  (it registers the ops)
from specbranch.runtime.fused.joined import joined
from specbranch.runtime.packed import PackedLinear
from specbranch.runtime.rows.functions import LINEAR_DTYPES, is_plain
from specbranch.runtime.rows.routes import own_forward

Product = Callable[[Tensor], Tensor]

_linear = torch.ops.specbranch.linear.default
_packed_linear = torch.ops.specbranch.packed_linear.default


def is_bare(module: nn.Module) -> bool:
    """Whether a call of the module is its class's forward and nothing else."""
    return own_forward(module) is None and not module._forward_hooks and not module._forward_pre_hooks


def product_of(module: nn.Module) -> Product:
    """What a call of a linear layer comes to: the call itself where it is more than a product over plain weights."""
    if is_bare(module):
        if type(module) is PackedLinear:
            return _packed(module.packed, module, module.shape[0], module.bias)
        if type(module) is nn.Linear and _is_known(module):
            return _dense(module.weight, module.bias)
    return module


def joint_product(modules: Sequence[nn.Module]) -> Product | None:
    """One product for layers over the same input, whose results lie beside each other; None where their weights do not
    lie behind each other in memory (joined.py)."""
    first: Any = modules[0]
    if type(first) not in (nn.Linear, PackedLinear):
        return None
    if not all(type(module) is type(first) and is_bare(module) and _is_known(module) for module in modules):
        return None
    biases = [module.bias for module in modules]
    if any((bias is None) != (biases[0] is None) for bias in biases):
        return None
    weight = joined(modules)
    if weight is None:
        return None
    bias = None if first.bias is None else torch.cat([bias.detach() for bias in biases if isinstance(bias, Tensor)])
    if type(first) is PackedLinear:
        return _packed(weight, first, sum(module.shape[0] for module in modules), bias)  # type: ignore[index, misc]
    return _dense(weight, bias)


def _is_known(module: Any) -> bool:
    """Whether its weights are plain ones."""
    if type(module) is PackedLinear:
        return True
    weight, bias = module.weight, module.bias
    tensors = [weight] if bias is None else [weight, bias]
    return (
        all(is_plain(tensor) and tensor.dtype == weight.dtype for tensor in tensors)
        and weight.dtype in LINEAR_DTYPES
        and weight.stride(1) == 1
    )


def _dense(weight: Tensor, bias: Tensor | None) -> Product:
    if weight.is_cpu:
        return lambda input: _linear(input, weight, bias)
    return lambda input: functional.linear(input, weight, bias)


def _packed(packed: Tensor, module: PackedLinear, size_out: int, bias: Tensor | None) -> Product:
    format, arithmetic = module.format, module.arithmetic
    return lambda input: _packed_linear(input, packed, format, arithmetic, size_out, bias)
