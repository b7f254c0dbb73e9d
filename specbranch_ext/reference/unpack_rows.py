"""unpack_rows in plain torch."""

import torch
from torch import Tensor

from ..packed import PackedWeight
from .blocks import FORMATS, parse, width_of

RUN, HALF, QUAD, PAGE = 32, 16, 4, 16  # weights of a run and of half of one, outputs of a quad, lines of a page
TOPS, LINE = 64, 192  # bytes of a page's tops and of a line
RAW, ZERO = 255, 15  # the top of a run that is kept raw; the code of exponent 0


def quad_bytes(size_in: int) -> int:
    lines = -(-size_in // RUN)
    return -(-lines // PAGE) * TOPS + lines * LINE


def line_places(size_in: int) -> Tensor:
    """Where the lines of a quad lie in its bytes, int64 [lines]."""
    line = torch.arange(-(-size_in // RUN))
    return line // PAGE * (TOPS + PAGE * LINE) + TOPS + line % PAGE * LINE


def unpack_weight(weight: PackedWeight) -> Tensor:
    """All rows of a packed weight, bfloat16 [out, in]; csrc/linear/lossless.h and packed_blocks.h say how they lie."""
    size_out, size_in = weight.shape
    if weight.format in FORMATS:
        if not size_out * size_in:
            return torch.empty(weight.shape, dtype=torch.bfloat16)
        blocks = FORMATS[weight.format]
        return parse(weight.data, blocks, width_of(weight.arithmetic), size_out, size_in).weight(blocks)
    lines, quads = -(-size_in // RUN), -(-size_out // QUAD)
    each = quad_bytes(size_in)
    quad = weight.data[: quads * each].view(quads, each).int()
    line = torch.arange(lines)
    # [quads, lines, outputs], then with 16 elements in the last place
    tops = quad[:, (line // PAGE * (TOPS + PAGE * LINE) + line % PAGE * QUAD)[:, None] + torch.arange(QUAD)]
    at = line_places(size_in)
    body = quad[:, at[:, None] + torch.arange(LINE)].view(quads, lines, 3, QUAD, HALF)
    parts, codes = body[:, :, :2], body[:, :, 2]
    below = torch.stack([codes & 15, codes >> 4], 2)
    exponents = torch.where(below == ZERO, 0, tops[:, :, None, :, None] - below)
    bits = (parts & 1) << 15 | exponents << 7 | parts >> 1
    bits = bits.permute(0, 3, 1, 2, 4).reshape(quads * QUAD, lines, RUN)
    is_raw = tops.permute(0, 2, 1).reshape(quads * QUAD, lines) == RAW
    distance = parts[:, :, 0, :, :4].permute(0, 2, 1, 3).reshape(quads * QUAD, lines, 4)[is_raw]
    if len(distance):
        own = (torch.arange(quads * QUAD) // QUAD * each)[:, None] + at
        place = own[is_raw] + (distance.long() << torch.tensor([0, 8, 16, 24])).sum(1) * 2 * RUN
        raw = weight.data[place[:, None] + torch.arange(2 * RUN)].contiguous()
        bits[is_raw] = raw.view(torch.int16).int() & 0xFFFF
    signed = torch.where(bits >= 1 << 15, bits - (1 << 16), bits).to(torch.int16)
    return signed.view(torch.bfloat16).reshape(quads * QUAD, lines * RUN)[:size_out, :size_in]


def unpack_rows(weight: PackedWeight, rows: Tensor) -> Tensor:
    """As `specbranch_ext.unpack_rows`."""
    return unpack_weight(weight)[rows]
