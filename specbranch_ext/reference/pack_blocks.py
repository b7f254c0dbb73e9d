"""pack_blocks in plain torch."""

from torch import Tensor

from ..packed import PackedWeight
from .blocks import FORMATS, read, width_of, write


def pack_blocks(blocks: Tensor, format: str, arithmetic: str = "exact") -> PackedWeight:
    """As `specbranch_ext.pack_blocks`, to the byte; csrc/linear/packed_blocks.h says how the bytes lie."""
    parts = read(blocks, format)
    data = write(parts, FORMATS[format], width_of(arithmetic))
    return PackedWeight(data, (parts.codes.shape[0], parts.codes.shape[1]), format, arithmetic)
