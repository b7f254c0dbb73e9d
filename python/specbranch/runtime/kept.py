"""What a cache still holds of a text that is over, for a text that begins alike.

A row of keys and values is a function of the tokens before it and of the model. On a CPU it has the same bits however
it was computed, so a text over kept rows is the same text. On other devices products choose their kernels by the number
of rows: there only whole chunks of an earlier prefill count.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

LEAST = 8  # tokens in common that are worth anything


@dataclass(frozen=True, eq=False)
class Kept:
    """tokens: of the cache's rows, from the first. state: of the model then; see `state_of`."""

    tokens: Sequence[int]
    state: object

    def is_continued(self, common: int) -> bool:
        """Whether a text with so many tokens in common is its next turn: little of it would be lost."""
        return len(self.tokens) - common <= max(LEAST, len(self.tokens) // 10)

    def common(self, text: Sequence[int]) -> int:
        """How many tokens a text begins with that are kept."""
        pairs = enumerate(zip(self.tokens, text, strict=False))
        return next((place for place, (mine, other) in pairs if mine != other), min(len(self.tokens), len(text)))


def state_of(model: nn.Module) -> object:
    """What changes when weights are written or replaced, or another adapter is chosen."""
    weights = [(id(tensor), _version(tensor)) for tensor in (*model.parameters(), *model.buffers())]
    return weights, _adapters(model) if "peft" in sys.modules else None


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _adapters(model: nn.Module) -> list[Any]:
    names = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    return [[repr(getattr(module, name)) for name in names if hasattr(module, name)] for module in model.modules()]
