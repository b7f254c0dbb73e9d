"""Products of linear layers, without their modules' calls; those over one input as a single one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from specbranch.runtime.fused.joined import joined
from specbranch.runtime.packed import PackedLinear
from specbranch.runtime.rows.functions import LINEAR_DTYPES, is_plain
from specbranch.runtime.rows.routes import own_forward
from specbranch_ext import PackedWeight

_linear = torch.ops.specbranch.linear.default
_packed_linear = torch.ops.specbranch.packed_linear.default


@dataclass(frozen=True, slots=True)
class Dense:
    """weight [out, in], bias [out] or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, input: Tensor) -> Tensor:
        if input.is_cpu:
            output: Tensor = _linear(input, self.weight, self.bias)
            return output
        return functional.linear(input, self.weight, self.bias)

    @property
    def on_cpu(self) -> bool:
        return self.weight.is_cpu

    @property
    def bound(self) -> tuple[Any, ...]:
        """As the core's DecoderLayer takes it."""
        return self.weight, self.bias


@dataclass(frozen=True, slots=True)
class Packed:
    """weight: packed [out, in]; bias [out] or None."""

    weight: PackedWeight
    bias: Tensor | None

    def __call__(self, input: Tensor) -> Tensor:
        weight = self.weight
        output: Tensor = _packed_linear(
            input, weight.data, weight.format, weight.arithmetic, weight.shape[0], self.bias
        )
        return output

    @property
    def on_cpu(self) -> bool:
        return self.weight.data.is_cpu

    @property
    def bound(self) -> tuple[Any, ...]:
        """As the core's DecoderLayer takes it."""
        weight = self.weight
        return weight.data, self.bias, weight.format, weight.arithmetic, *weight.shape


Product = Dense | Packed | nn.Module


def is_bare(module: nn.Module) -> bool:
    """Whether a call of the module is its class's forward and nothing else."""
    return own_forward(module) is None and not module._forward_hooks and not module._forward_pre_hooks


def product_of(module: nn.Module) -> Product:
    """What a call of a linear layer comes to: the call itself where it is more than a product over plain weights."""
    if is_bare(module):
        if type(module) is PackedLinear:
            return Packed(module.packed_weight, module.bias)
        if type(module) is nn.Linear and _is_known(module):
            return Dense(module.weight.detach(), None if module.bias is None else module.bias.detach())
    return module


def joint_product(modules: Sequence[nn.Module]) -> Product | None:
    """One product for layers over the same input, whose results lie beside each other; None where their weights do not
    lie behind each other in memory (joined.py)."""
    first: Any = modules[0]
    if type(first) not in (nn.Linear, PackedLinear):
        return None
    if not all(type(module) is type(first) and is_bare(module) and _is_known(module) for module in modules):
        return None
    biases: list[Any] = [module.bias for module in modules]
    if any((bias is None) != (biases[0] is None) for bias in biases):
        return None
    weight = joined(modules)
    if weight is None:
        return None
    bias = None if first.bias is None else torch.cat([bias.detach() for bias in biases])
    if type(first) is nn.Linear:
        return Dense(weight, bias)
    size_out = sum(module.shape[0] for module in modules)  # type: ignore[index, misc]
    return Packed(PackedWeight(weight, (size_out, first.shape[1]), first.format, first.arithmetic), bias)


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
