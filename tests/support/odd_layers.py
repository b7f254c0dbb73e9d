"""Layers whose rows depend on the rows beside them, one of each kind, to be put in the place of a tiny model's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

HIDDEN = 32


def with_layer(model: PreTrainedModel, layer: nn.Module) -> PreTrainedModel:
    """The model with this layer, [1, n, HIDDEN] to the same, instead of its first MLP."""
    layers: Any = model.model.layers
    layers[0].mlp = layer.to(model.dtype).eval()
    return model


class Weights(nn.Module):
    """A square matrix of its own."""

    def __init__(self, inner: int = HIDDEN) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HIDDEN, inner) / HIDDEN**0.5)


class Product(Weights):
    """A product that is no nn.Linear."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight


class Einsum(Weights):
    def forward(self, input: Tensor) -> Tensor:
        return torch.einsum("bnk,ko->bno", input, self.weight)


class Gate(Weights):
    """39 exponentials for each row: of one row seven are in the tail of a vector loop, of many rows others."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.silu(2 * torch.cat([input[..., :7], input], -1))[..., 7:]


class LinearSubclass(nn.Linear):
    def __init__(self) -> None:
        super().__init__(HIDDEN, HIDDEN)

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias)


class PickedExperts(Weights):
    """Every row goes to one of two experts, which get no others."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(LinearSubclass() for _ in range(2))

    def forward(self, input: Tensor) -> Tensor:
        rows, output = input[0], torch.zeros_like(input[0])
        picked = (rows[:, 0] > rows[:, 1]).long()
        for index, expert in enumerate(self.experts):
            places = (picked == index).nonzero()[:, 0]
            if len(places):
                output.index_copy_(0, places, expert(rows[places]))
        return output[None]


class CallInt8(Weights):
    """Activations are rounded to 8 bits by the range of the whole call."""

    def forward(self, input: Tensor) -> Tensor:
        scale = input.abs().amax() / 127
        return ((input / scale).round() * scale) @ self.weight


class Outliers(Weights):
    """As LLM.int8(): what exceeds a threshold in any row is not rounded in all of them."""

    def forward(self, input: Tensor) -> Tensor:
        columns = (input.abs() > 6).flatten(0, -2).any(0)
        return torch.where(columns, input, (input * 8).round() / 8) @ self.weight


class TokenConvolution(nn.Module):
    """Each token's values with those of the two before it in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, 3, groups=HIDDEN)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.conv(functional.pad(input.mT, (2, 0))).mT
        return output


class BatchNorm(nn.Module):
    """By statistics that were learned, or by those of the call."""

    def __init__(self, learned: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN, track_running_stats=learned)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.norm(input[0])
        return output[None]


class Shift(Weights):
    def forward(self, input: Tensor) -> Tensor:
        return input + 0.5 * functional.pad(input, (0, 0, 1, -1))


class CallStatistics(Weights):
    """Normalised over the tokens of the call."""

    def forward(self, input: Tensor) -> Tensor:
        return (input - input.mean(1, keepdim=True)) / (1 + input.std(1, keepdim=True, correction=0))
