"""Which layers of a model are joined: those over the same input, in modules that are run with fewer kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from specbranch.runtime.fused.attention import attention_kind, input_layers
from specbranch.runtime.fused.joined import join
from specbranch.runtime.fused.mlp import gated_layers


def join_model(model: nn.Module) -> None:
    """Join them, in a model that nobody else holds: one by one, so that never much is held twice."""
    for layers in groups(model):
        join(layers)


def groups(model: nn.Module) -> Iterator[list[Any]]:
    """The linear layers over the same input, of every module that has several."""
    for module in model.modules():
        kind = attention_kind(module)
        layers = gated_layers(module) if kind is None else input_layers(module, kind)
        if len(layers) > 1:
            yield layers
