"""RMS norms of transformers' families, after an addition where there is one before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import specbranch_ext  # noqa: F401  (it registers the ops)
from specbranch.runtime.fused.code import same_class
from specbranch.runtime.fused.products import is_bare
from specbranch.runtime.rows.functions import LINEAR_DTYPES, is_plain

_rms_norm = torch.ops.specbranch.rms_norm.default

# Class: name of its epsilon, whether its weight is an offset from 1, whether it rounds before it multiplies by it.
KINDS = {
    "llama.LlamaRMSNorm": ("variance_epsilon", False, True),
    "gemma.GemmaRMSNorm": ("eps", True, False),
    "olmo2.Olmo2RMSNorm": ("variance_epsilon", False, False),
    "helium.HeliumRMSNorm": ("variance_epsilon", False, False),
}


@dataclass(frozen=True, slots=True)
class Norm:
    """weight [H]; see `specbranch_ext.rms_norm`."""

    weight: Tensor
    eps: float
    unit_offset: bool
    round_first: bool

    @property
    def bound(self) -> tuple[Any, ...]:
        """As the core's DecoderLayer takes it."""
        return self.weight, self.eps, self.unit_offset, self.round_first

    def __call__(self, input: Tensor) -> Tensor:
        output: Tensor = _rms_norm(input, self.weight, None, self.eps, self.unit_offset, self.round_first)[0]
        return output

    def of_sum(self, residual: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of residual + input, and the sum itself."""
        result: tuple[Tensor, Tensor] = _rms_norm(
            input, self.weight, residual, self.eps, self.unit_offset, self.round_first
        )
        return result


@dataclass(frozen=True, slots=True)
class OtherNorm:
    """A norm that is run as it is."""

    module: nn.Module

    def __call__(self, input: Tensor) -> Tensor:
        output: Tensor = self.module(input)
        return output

    def of_sum(self, residual: Tensor, input: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + input
        return self.module(total), total


def norm_of(module: nn.Module) -> Norm | None:
    """The fused norm; None for a module that is of no known kind."""
    known = known_norm(module)
    if known is None or not is_bare(module):
        return None
    weight: Any = module.weight
    if not is_plain(weight) or weight.dtype not in LINEAR_DTYPES or weight.dim() != 1 or not weight.is_contiguous():
        return None
    name, unit_offset, round_first = known
    return Norm(weight.detach(), float(getattr(module, name)), unit_offset, round_first)


def known_norm(module: nn.Module) -> tuple[str, bool, bool] | None:
    kind = type(module)
    if not kind.__name__.endswith("RMSNorm"):
        return None
    return next((values for exemplar, values in KINDS.items() if same_class(kind, exemplar)), None)
