"""Blocks of quantised weights as GGUF files have them: of any bytes, with sane scales."""

import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from specbranch_ext.reference.blocks import FORMATS

# Where a block has numbers of float16.
SCALES = {
    "q8_0": (0,),
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q4_k": (0, 2),
    "q5_k": (0, 2),
    "q6_k": (208,),
}


def make_blocks(format: str, size_out: int, size_in: int) -> Tensor:
    """uint8 [out, bytes of a row]: any codes, scales and minima; float16 scales of both signs, and 0."""
    blocks = FORMATS[format]
    assert size_in % blocks.weights == 0
    data = torch.randint(0, 256, (size_out, size_in // blocks.weights, blocks.bytes), dtype=torch.uint8)
    for offset in SCALES[format]:
        scales = torch.randn(data.shape[:2]) * 0.01
        scales[:: max(1, size_out // 3)] *= 30
        scales[size_out // 2 : size_out // 2 + 1] = 0
        data[..., offset : offset + 2] = scales.half()[..., None].view(torch.uint8)
    return data.flatten(1)


def decoded(blocks: Tensor, format: str) -> Tensor:
    """Their values by the gguf package, rounded to bfloat16."""
    kind = GGMLQuantizationType[format.upper()]
    values: np.ndarray = quants.dequantize(blocks.numpy(), kind)
    return torch.from_numpy(values).bfloat16()
