"""packed_linear in plain torch."""

from torch import Tensor

from ..packed import PackedWeight
from .linear import linear
from .unpack_rows import unpack_weight


def packed_linear(input: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """As `specbranch_ext.packed_linear`, summed in float64."""
    return linear(input, unpack_weight(weight), bias)
