"""unpack_rows: rows of a packed weight, as they were."""

import torch
from torch import Tensor

from ..packed import PackedWeight
from ._checks import checked, describe
from ._library import register


def _output(packed: Tensor, format: str, arithmetic: str, size_out: int, size_in: int, rows: Tensor) -> Tensor:
    if rows.dim() != 1:
        raise ValueError(f"rows: expected shape [n], got {describe(rows)}")
    return packed.new_empty((rows.shape[0], size_in), dtype=torch.bfloat16)


_op = register(
    "unpack_rows(Tensor packed, str format, str arithmetic, int size_out, int size_in, Tensor rows) -> Tensor", _output
)


@checked
def unpack_rows(weight: PackedWeight, rows: Tensor) -> Tensor:
    """Rows of a packed weight, bit for bit those that were packed (of blocks: in bfloat16): an embedding's look-up.

    Args:
        weight: what `pack_weight` or `pack_blocks` returned.
        rows: int64 [n], contiguous, numbers of rows in any order.

    Returns:
        bfloat16 [n, in].

    Raises:
        ValueError: a tensor has another shape, dtype or device, or there is no such row.
    """
    output: Tensor = _op(weight.data, weight.format, weight.arithmetic, *weight.shape, rows)
    return output
