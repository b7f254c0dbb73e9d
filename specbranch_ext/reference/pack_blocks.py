"""pack_blocks in plain torch."""

import torch
from torch import Tensor

from ..packed import PackedWeight
from .blocks import FORMATS, read, width_of, write


def pack_blocks(blocks: Tensor, format: str, arithmetic: str = "exact") -> PackedWeight:
    """As `specbranch_ext.pack_blocks`, to the byte; csrc/linear/packed_blocks.h says how the bytes lie."""
    kind = FORMATS[format]
    shape = blocks.shape[0], blocks.shape[1] // kind.bytes * kind.weights
    empty = torch.empty(0, dtype=torch.uint8)
    data = write(read(blocks, format), kind, width_of(arithmetic)) if blocks.numel() else empty
    return PackedWeight(data, shape, format, arithmetic)
