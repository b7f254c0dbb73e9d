"""Gated feed-forward layers: one product for gate and up, and the gate applied by one op."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations

import specbranch_ext  # noqa: F401  (it registers the ops)
from specbranch.runtime.fused.code import same_class
from specbranch.runtime.fused.products import Product, is_bare, joint_product, product_of

_gated_activation = torch.ops.specbranch.gated_activation.default

APART = "llama.LlamaMLP"  # gate and up are two layers
TOGETHER = "phi3.Phi3MLP"  # they are one


@dataclass(frozen=True, slots=True)
class Mlp:
    """gate, up: products; up is None where gate's holds both. activation: see `specbranch_ext.gated_activation`."""

    gate: Product
    up: Product | None
    down: Product
    activation: str

    def __call__(self, input: Tensor) -> Tensor:
        up = None if self.up is None else self.up(input)
        output: Tensor = self.down(_gated_activation(self.gate(input), up, self.activation))
        return output


def mlp_of(module: nn.Module) -> Mlp | None:
    """The fused layer; None for a module that is of no known kind."""
    layers = gated_layers(module)
    if not layers or not is_bare(module):
        return None
    kind = activation_of(activation_module(module))
    if kind is None:
        return None
    down = product_of(module.down_proj)  # type: ignore[arg-type]
    if len(layers) == 1:
        return Mlp(product_of(layers[0]), None, down, kind)
    if (both := joint_product(layers)) is not None:
        return Mlp(both, None, down, kind)
    return Mlp(product_of(layers[0]), product_of(layers[1]), down, kind)


def gated_layers(module: nn.Module) -> list[Any]:
    """The linear layers of gate and up, in this order; nothing for a module of another kind."""
    if not hasattr(module, "down_proj"):
        return []
    if same_class(type(module), APART):
        return [module.gate_proj, module.up_proj]
    return [module.gate_up_proj] if same_class(type(module), TOGETHER) else []


def activation_module(module: Any) -> nn.Module:
    found: nn.Module = module.act_fn if hasattr(module, "act_fn") else module.activation_fn
    return found


def activation_of(module: nn.Module) -> str | None:
    """What `gated_activation` calls it; None for one that it does not know."""
    if not is_bare(module):
        return None
    if type(module) in (nn.SiLU, activations.SiLUActivation):
        return "silu"
    if type(module) is activations.GELUTanh and isinstance(module.act, partial):  # else it rounds more
        return "gelu_tanh"
    if type(module) is nn.GELU and module.approximate == "tanh":
        return "gelu_tanh"
    return None
