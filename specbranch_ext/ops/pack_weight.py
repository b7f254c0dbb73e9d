"""pack_weight: a weight in fewer bytes."""

import torch
from torch import Tensor

from ..packed import PackedWeight
from . import _library
from ._checks import checked


@checked
def pack_weight(weight: Tensor, format: str = "lossless") -> PackedWeight:
    """Pack a weight, once, for `packed_linear` and `unpack_rows`.

    Args:
        weight: bfloat16 [out, in] on the CPU, last dimension contiguous. It is only read.
        format: "lossless".

    Returns:
        The packed weight, in memory of its own.

    Raises:
        ValueError: the weight has another shape, dtype, stride or device, or there is no such format.
    """
    if format != "lossless":
        raise ValueError(f"format: expected lossless, got {format!r}; quantize_weight rounds to others")
    threads = torch.get_num_threads()
    data = torch.empty(_library.core.packed_bytes(weight, format, threads), dtype=torch.uint8)
    _library.core.pack_weight(weight, format, data, threads)
    return PackedWeight(data, (weight.shape[0], weight.shape[1]), format)
