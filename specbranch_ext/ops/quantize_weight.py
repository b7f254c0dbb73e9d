"""quantize_weight: a weight rounded to blocks of 8 or 4 bits."""

import torch
from torch import Tensor

from . import _library
from ._checks import checked, describe

QUANTIZED = {"q8_0": 34, "q4_0": 18}  # bytes of 32 weights


@checked
def quantize_weight(weight: Tensor, format: str) -> Tensor:
    """Round a weight to blocks as GGUF files have them, for `pack_blocks`.

    q8_0 keeps a weight to within the 254th part of the largest of its block. q4_0 keeps, of several ways to space 16
    values evenly, the one that leaves the least square error in a block.

    Args:
        weight: bfloat16 [out, in] on the CPU, last dimension contiguous, `in` a multiple of 32. It is only read.
        format: "q8_0" or "q4_0".

    Returns:
        uint8 [out, bytes of a row].

    Raises:
        ValueError: the weight has another shape, dtype, stride or device, or numbers that are not finite or larger than
            a scale of float16 allows, or there is no such format.
    """
    if format not in QUANTIZED:
        raise ValueError(f"format: expected one of {', '.join(QUANTIZED)}, got {format!r}")
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape [out, in], got {describe(weight)}")
    blocks = torch.empty(weight.shape[0], weight.shape[1] // 32 * QUANTIZED[format], dtype=torch.uint8)
    _library.core.quantize_weight(weight, format, blocks, torch.get_num_threads())
    return blocks
