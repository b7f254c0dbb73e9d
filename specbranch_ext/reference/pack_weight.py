"""pack_weight in plain torch."""

import torch
from torch import Tensor
from torch.nn import functional

from ..packed import PackedWeight
from .unpack_rows import HALF, LINE, PAGE, QUAD, RAW, RUN, TOPS, ZERO, line_places, quad_bytes


def pack_weight(weight: Tensor, format: str = "lossless") -> PackedWeight:
    """As `specbranch_ext.pack_weight`, to the byte; csrc/linear/lossless.h says how the bytes lie."""
    size_out, size_in = weight.shape
    lines, quads = -(-size_in // RUN), -(-size_out // QUAD)
    bits = weight.contiguous().view(torch.int16).int() & 0xFFFF
    exponents = bits >> 7 & 255
    in_runs = (0, lines * RUN - size_in, 0, quads * QUAD - size_out)
    exponents = functional.pad(exponents, in_runs).view(quads * QUAD, lines, RUN)
    tops = exponents.amax(-1)
    least = torch.where(exponents == 0, RAW, exponents).amin(-1)
    raw = (tops - least >= ZERO) | (tops == RAW)
    codes = torch.where(exponents == 0, ZERO, tops[..., None] - exponents)
    codes[raw] = 0
    codes[size_out:] = 0  # nobody's
    parts = functional.pad((bits & 127) << 1 | bits >> 15, in_runs).view(quads * QUAD, lines, RUN)
    places = line_places(size_in) + (torch.arange(quads * QUAD) // QUAD * quad_bytes(size_in))[:, None]
    distance = torch.zeros_like(places)
    behind = quads * quad_bytes(size_in) + torch.arange(int(raw.sum())) * 2 * RUN
    distance[raw] = (behind - places[raw]) // (2 * RUN)
    counted = torch.stack([distance >> shift & 255 for shift in (0, 8, 16, 24)], -1)
    parts = torch.where(raw[..., None], functional.pad(counted, (0, RUN - 4)), parts)
    # [outputs, lines, ...] to [quads, lines, ..., outputs of the quad, 16]
    split = parts.view(quads, QUAD, lines, 2, HALF).permute(0, 2, 3, 1, 4)
    joined = (codes[..., :HALF] | codes[..., HALF:] << 4).view(quads, QUAD, lines, HALF).permute(0, 2, 1, 3)
    body = torch.cat([split.flatten(2), joined.flatten(2)], -1)
    assert body.shape[-1] == LINE
    heads = torch.where(raw, RAW, tops).view(quads, QUAD, lines).permute(0, 2, 1)
    pages = []
    for begin in range(0, lines, PAGE):
        head = heads[:, begin : begin + PAGE].flatten(1)
        pages += [functional.pad(head, (0, TOPS - head.shape[1])), body[:, begin : begin + PAGE].flatten(1)]
    packed = torch.cat(pages, 1).flatten().to(torch.uint8) if pages else torch.empty(0, dtype=torch.uint8)
    values = functional.pad(bits, in_runs).view(quads * QUAD, lines, RUN)[raw]
    raw_bytes = torch.stack([values & 255, values >> 8], -1).flatten().to(torch.uint8)
    return PackedWeight(torch.cat([packed, raw_bytes]), (size_out, size_in), format)
