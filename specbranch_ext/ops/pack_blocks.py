"""pack_blocks: the blocks of a GGUF file's weight, for products."""

import torch
from torch import Tensor

from ..packed import ARITHMETICS, BLOCKS, PackedWeight
from . import _library
from ._checks import checked, describe


@checked
def pack_blocks(blocks: Tensor, format: str, arithmetic: str = "exact") -> PackedWeight:
    """Pack blocks of quantised weights anew, once, for `packed_linear` and `unpack_rows`.

    What they are worth does not change, and up to 4 % more bytes are needed than in the file.

    Args:
        blocks: uint8 [out, bytes of a row] on the CPU, last dimension contiguous: a row's blocks as a GGUF file has
            them. It is only read.
        format: of the blocks, by the gguf package's name for it in lower case.
        arithmetic: of the products; see PackedWeight.

    Returns:
        The packed weight, in memory of its own.

    Raises:
        ValueError: the blocks have another shape, dtype, stride or device, or a scale that is not finite, or there is
            no such format or arithmetic.
    """
    for name, value, known in (("format", format, BLOCKS), ("arithmetic", arithmetic, ARITHMETICS)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    if blocks.dim() != 2:
        raise ValueError(f"blocks: expected shape [out, bytes of a row], got {describe(blocks)}")
    core = _library.core
    size_out, size_in = blocks.shape[0], core.weights_of_blocks(blocks.shape[1], format)
    data = torch.empty(core.packed_rows_bytes(size_out, size_in, format, arithmetic), dtype=torch.uint8)
    core.pack_blocks(blocks, format, arithmetic, data, torch.get_num_threads())
    return PackedWeight(data, (size_out, size_in), format, arithmetic)
