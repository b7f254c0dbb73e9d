"""Blocks of quantised weights in plain torch: what a file's bytes mean, and how packed ones lie."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

RUN, HALF, LINE, WIDEST = (
    32,
    16,
    64,
    16,
)  # weights of a run and of its halves, bytes of a cache line, outputs of a group


@dataclass(frozen=True, slots=True)
class Blocks:
    """bits: of a code. scaled: weights that share a scale. weights, bytes: of a block. zero: the code of 0. minimum:
    whether there is one. As csrc/linear/block_format.h has them."""

    bits: int
    scaled: int
    weights: int
    bytes: int
    zero: int
    minimum: bool = False

    @property
    def nested(self) -> bool:
        return self.weights > self.scaled


FORMATS = {
    "q8_0": Blocks(8, 32, 32, 34, 128),
    "q4_0": Blocks(4, 32, 32, 18, 8),
    "q4_1": Blocks(4, 32, 32, 20, 0, minimum=True),
    "q5_0": Blocks(5, 32, 32, 22, 16),
    "q5_1": Blocks(5, 32, 32, 24, 0, minimum=True),
    "q4_k": Blocks(4, 32, 256, 144, 0, minimum=True),
    "q5_k": Blocks(5, 32, 256, 176, 0, minimum=True),
    "q6_k": Blocks(6, 16, 256, 210, 32),
}


@dataclass(frozen=True, slots=True)
class Parts:
    """A weight's codes, int [out, in]; d and dmin, float16 [out, blocks]; and, of nested formats, scales [out, in /
    scaled] and minima [out, in / 32], int."""

    codes: Tensor
    d: Tensor
    dmin: Tensor | None = None
    scales: Tensor | None = None
    minima: Tensor | None = None

    def values(self, blocks: Blocks) -> tuple[Tensor, Tensor | None]:
        """Scales [out, in / scaled] and, if there are any, minima [out, in / 32], in float32."""
        repeat = blocks.weights // blocks.scaled
        scale = self.d.float().repeat_interleave(repeat, 1)
        if self.scales is not None:
            scale = scale * self.scales.float()
        if self.dmin is None:
            return scale, None
        minimum = self.dmin.float().repeat_interleave(blocks.weights // RUN, 1)
        return scale, minimum if self.minima is None else minimum * self.minima.float()

    def weight(self, blocks: Blocks) -> Tensor:
        """bfloat16 [out, in]."""
        scale, minimum = self.values(blocks)
        weight = scale.repeat_interleave(blocks.scaled, 1) * (self.codes - blocks.zero).float()
        if minimum is not None:
            weight = weight - minimum.repeat_interleave(RUN, 1)
        return weight.bfloat16()


def _half(bytes: Tensor) -> Tensor:
    return bytes.contiguous().view(torch.float16)


def _bits(bytes: Tensor, count: int) -> Tensor:
    """[..., n] to [..., 8 / count, n]: the lowest bits first."""
    shifts = torch.arange(0, 8, count)[:, None]
    return bytes.int()[..., None, :] >> shifts & (1 << count) - 1


def read(data: Tensor, format: str) -> Parts:
    """What the blocks uint8 [out, bytes of a row] of a GGUF file hold."""
    blocks = FORMATS[format]
    size_out = data.shape[0]
    block = data.reshape(size_out, -1, blocks.bytes)
    count = block.shape[1]

    def whole(codes: Tensor) -> Tensor:
        return codes.reshape(size_out, count * blocks.weights)

    if format == "q8_0":
        return Parts(whole(block[..., 2:].int() ^ 128), _half(block[..., :2])[..., 0])
    if blocks.weights == RUN:
        codes = _bits(block[..., -16:], 4).flatten(-2)
        if blocks.bits == 5:
            codes = codes | _bits(block[..., -20:-16], 1).transpose(-1, -2).flatten(-2) << 4
        dmin = -_half(block[..., 2:4])[..., 0] if blocks.minimum else None
        return Parts(whole(codes), _half(block[..., :2])[..., 0], dmin)
    if format == "q6_k":
        low = _bits(block[..., :128].reshape(size_out, count, 2, 2, RUN), 4).transpose(-2, -3)  # [.., 2, 2 nibbles, 2]
        tops = _bits(block[..., 128:192].reshape(size_out, count, 2, RUN), 2)
        codes = low.flatten(-3, -2) | tops << 4
        scales = block[..., 192:208].contiguous().view(torch.int8).int().reshape(size_out, -1)
        return Parts(whole(codes), _half(block[..., 208:])[..., 0], scales=scales)
    halves = _half(block[..., :4])
    six = block[..., 4:16].int()
    first, second, third = six[..., :4], six[..., 4:8], six[..., 8:]
    scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], -1).reshape(size_out, -1)
    minima = torch.cat([second & 63, third >> 4 | second >> 6 << 4], -1).reshape(size_out, -1)
    codes = _bits(block[..., -128:].reshape(size_out, count, 4, RUN), 4)
    if format == "q5_k":
        codes = codes.flatten(2, 3) | _bits(block[..., 16:48], 1) << 4
    return Parts(whole(codes), halves[..., 0], halves[..., 1], scales, minima)


def _lines(part: Tensor) -> Tensor:
    """[groups, bytes], padded to cache lines."""
    return functional.pad(part, (0, -part.shape[1] % LINE))


def places(bits: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where an element's code lies in those of its run: byte and shift of the lower bits, and of the upper ones.
    [width, 32] each; csrc/linear/packed_blocks.h says why."""
    o, e = torch.meshgrid(torch.arange(width), torch.arange(RUN), indexing="ij")
    h, i = e // HALF, e % HALF
    none = torch.zeros_like(o)
    if width == 4:
        natural = o * HALF + i
        split = (o % 2 * 2 + i % 8 // 4) * 16 + (i // 8 * 2 + o // 2) * 4 + i % 4
        return {
            4: (natural, 4 * h, none, none),
            5: (split, 4 * h, h * 8 + split // 8, split % 8),
            6: (split, 4 * h, split % 32, split // 32 * 2 + 4 * h),
            8: (h * 64 + split, none, none, none),
        }[bits]
    lane = o * 4 + i % 4
    return {
        4: (i // 4 * 64 + lane, 4 * h, none, none),
        5: (i // 4 * 64 + lane, 4 * h, lane, e // 4),
        6: (i // 4 * 64 + lane, 4 * h, h * 64 + lane, i // 4 * 2),
        8: (e // 4 * 64 + lane, none, none, none),
    }[bits]


def sizes(blocks: Blocks, width: int) -> tuple[int, int]:
    """Bytes of a run's codes and tops."""
    return width * (RUN if blocks.bits == 8 else HALF), {5: width * 4, 6: width * 8}.get(blocks.bits, 0)


def write(parts: Parts, blocks: Blocks, width: int) -> Tensor:
    """The packed bytes."""
    size_out, size_in = parts.codes.shape
    padding = (0, 0, 0, -size_out % WIDEST)
    groups, runs = (size_out + padding[3]) // width, size_in // RUN

    def grouped(part: Tensor) -> Tensor:
        """[out, n] to [groups, n, width]."""
        return functional.pad(part, padding).view(groups, width, part.shape[1]).transpose(1, 2)

    def as_bytes(part: Tensor) -> Tensor:
        return part.contiguous().view(torch.uint8)

    per = blocks.weights // RUN
    count = size_in // blocks.weights
    head = [as_bytes(grouped(parts.d).half())]
    if parts.dmin is not None:
        head.append(as_bytes(grouped(parts.dmin).half()))
    if parts.scales is not None:
        small = [grouped(parts.scales).reshape(groups, count, per, RUN // blocks.scaled * width)]
        if parts.minima is not None:
            small.append(grouped(parts.minima).reshape(groups, count, per, width))
        head.append((torch.cat(small, -1) & 255).to(torch.uint8).flatten(2))
    low, shift, top, top_shift = places(blocks.bits, width)
    codes = functional.pad(parts.codes, padding)
    codes[size_out:] = 0
    each = codes.view(groups, width, runs, RUN).transpose(1, 2).reshape(groups, runs, -1)
    code_bytes, top_bytes = sizes(blocks, width)
    lower = torch.zeros(groups, runs, code_bytes, dtype=torch.int32)
    lower.index_add_(2, low.flatten(), ((each if blocks.bits == 8 else each & 15) << shift.flatten()).int())
    upper = torch.zeros(groups, runs, top_bytes, dtype=torch.int32)
    if top_bytes:
        upper.index_add_(2, top.flatten(), (each >> 4 << top_shift.flatten()).int())
    heads = torch.cat(head, -1).reshape(groups, -1)
    planes = [heads, upper.to(torch.uint8).reshape(groups, -1), lower.to(torch.uint8).reshape(groups, -1)]
    return torch.cat([_lines(plane) for plane in planes], 1).flatten()


def parse(data: Tensor, blocks: Blocks, width: int, size_out: int, size_in: int) -> Parts:
    """The parts of packed bytes."""
    groups, runs, count = -(-size_out // WIDEST) * WIDEST // width, size_in // RUN, size_in // blocks.weights
    per = blocks.weights // RUN
    halves = RUN // blocks.scaled
    scale_bytes = width * (halves + blocks.minimum) if blocks.nested else 0
    d_bytes = 2 * width * (1 + blocks.minimum)
    code_bytes, top_bytes = sizes(blocks, width)
    lengths = [count * (d_bytes + per * scale_bytes), runs * top_bytes, runs * code_bytes]
    group = data.view(groups, -1)
    planes, begin = [], 0
    for length in lengths:
        planes.append(group[:, begin : begin + length])
        begin += -(-length // LINE) * LINE

    def each(part: Tensor) -> Tensor:
        """[groups, n, width] to [out, n]."""
        return part.transpose(1, 2).reshape(groups * width, part.shape[1])[:size_out]

    head = planes[0].reshape(groups, count, d_bytes + per * scale_bytes)
    d = each(_half(head[..., : 2 * width]))
    dmin = each(_half(head[..., 2 * width : d_bytes])) if blocks.minimum else None
    scales = minima = None
    if blocks.nested:
        small = head[..., d_bytes:].reshape(groups, runs, halves + blocks.minimum, width).int()
        scale = small[:, :, :halves].reshape(groups, runs * halves, width)
        scales = each(scale if blocks.minimum else (scale ^ 128) - 128)
        minima = each(small[:, :, halves]) if blocks.minimum else None
    low, shift, top, top_shift = (place.flatten() for place in places(blocks.bits, width))
    codes = planes[2].reshape(groups, runs, code_bytes)[..., low].int()
    codes = codes if blocks.bits == 8 else codes >> shift & 15
    if top_bytes:
        mask = (1 << blocks.bits - 4) - 1
        codes = codes | (planes[1].reshape(groups, runs, top_bytes)[..., top].int() >> top_shift & mask) << 4
    codes = codes.view(groups, runs, width, RUN).permute(0, 2, 1, 3).reshape(groups * width, size_in)[:size_out]
    return Parts(codes, d, dmin, scales, minima)


def width_of(arithmetic: str) -> int:
    return 16 if arithmetic == "fast" else 4
