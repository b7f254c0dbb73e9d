"""Modules over packed weights (specbranch_ext.PackedWeight), and where in a model they stand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specbranch_ext import PackedWeight, unpack_rows
from specbranch_ext.packed import BLOCKS

_multiply = torch.ops.specbranch.packed_linear.default
_rows = torch.ops.specbranch.unpack_rows.default


class _Packed(nn.Module):
    """A module whose weight [out, in] is packed. bias: [out] or None."""

    packed: Tensor

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.register_buffer("packed", weight.data)
        self.format, self.arithmetic, self.shape = weight.format, weight.arithmetic, weight.shape
        self.bias = bias

    @property
    def packed_weight(self) -> PackedWeight:
        return PackedWeight(self.packed, self.shape, self.format, self.arithmetic)

    def values(self, begin: int = 0, end: int | None = None) -> Tensor:
        """Rows of the weight in bfloat16."""
        rows = torch.arange(begin, self.shape[0] if end is None else min(end, self.shape[0]))
        weight: Tensor = unpack_rows(self.packed_weight, rows)
        return weight

    def extra_repr(self) -> str:
        return (
            f"shape={self.shape}, format={self.format!r}, arithmetic={self.arithmetic!r}, bias={self.bias is not None}"
        )


class PackedLinear(_Packed):
    """nn.Linear over a packed weight."""

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = _multiply(input, self.packed, self.format, self.arithmetic, self.shape[0], self.bias)
        return output


class PackedEmbedding(_Packed):
    """nn.Embedding over a packed weight: its own, or that of the output layer."""

    def forward(self, input: Tensor) -> Tensor:
        rows: Tensor = _rows(self.packed, self.format, self.arithmetic, *self.shape, input.flatten())
        return rows.view(*input.shape, self.shape[1])


@dataclass(frozen=True, slots=True)
class Place:
    """A module that holds a weight: where in the model, and of which name there."""

    parent: nn.Module
    name: str
    module: Any  # an nn.Module


def weight_format(model: nn.Module) -> str:
    """The format of a model's packed weights, "" for a model without; several as in q4_k+q6_k."""
    return "+".join(sorted({module.format for module in model.modules() if isinstance(module, _Packed)}))


def is_in_blocks(module: nn.Module) -> bool:
    """Whether it holds a weight that is packed in blocks."""
    return isinstance(module, _Packed) and module.format in BLOCKS


def holders_of(model: nn.Module) -> list[tuple[Tensor, list[Place]]]:
    """Every parameter with all modules that hold it, in the order of the model."""
    found: defaultdict[int, list[Place]] = defaultdict(list)
    weights: dict[int, Tensor] = {}
    for place in places_of(model):
        for weight in place.module.parameters(recurse=False):
            weights[id(weight)] = weight
            found[id(weight)].append(place)
    return [(weights[key], places) for key, places in found.items()]


def places_of(model: nn.Module) -> Iterator[Place]:
    """Every module of a model, the model itself under no name."""
    parents = {id(child): (module, name) for module in model.modules() for name, child in module.named_children()}
    for module in model.modules():
        yield Place(*parents.get(id(module), (module, "")), module)


def put(places: Sequence[Place], packed: PackedWeight) -> None:
    """Replace the modules that hold a weight by such that hold it packed, with the biases that they have by now."""
    for place in places:
        kind = PackedLinear if isinstance(place.module, (nn.Linear, PackedLinear)) else PackedEmbedding
        module = kind(packed, getattr(place.module, "bias", None))
        module.train(place.module.training)
        setattr(place.parent, place.name, module)
