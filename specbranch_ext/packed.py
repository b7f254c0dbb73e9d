"""Weights in fewer bytes: what packed weights are, for all formats."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import _C as _core

_C: Any = _core

BLOCKS = (
    "q8_0",
    "q4_0",
    "q4_1",
    "q4_k",
    "q5_0",
    "q5_1",
    "q5_k",
    "q6_k",
)  # of GGUF files, as the gguf package names them
FORMATS = ("lossless", *BLOCKS)
ARITHMETICS = ("exact", "fast")


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A packed weight [out, in].

    `pack_weight` and `pack_blocks` make one, `packed_linear` multiplies by it, `unpack_rows` reads rows of it.

    data: uint8 [bytes], contiguous, aligned to 64 bytes (as torch allocates memory). shape: (out, in).

    format: "lossless": bfloat16 in 12 bits and a little, with the very values. Of each run of 32 weights along `in` a
    byte keeps the largest exponent; each weight keeps sign and mantissa, and in 4 bits how far its exponent lies below
    (15: it is 0). A run with an exponent more than 14 below, infinities or NaN is kept as it is. The others are the
    formats of blocks of GGUF files: codes of 4, 5, 6 or 8 bits whose scales 16 or 32 of them share.

    arithmetic: "exact": a weight counts as its value, computed in float32, in bfloat16, so that products have the bits
    of `linear` over the weight unpacked. "fast", for blocks only: inputs are rounded to 8 bits, 32 along `in` with one
    scale, and codes are multiplied as integers:

        q = round(x 127 / largest |x|),  y = sum over runs of s (largest |x| / 127) sum of (c - z) q

    less the minimum times the sum of q, where the format has minima. c: codes, s: their scale, z: the code of 0.
    """

    data: Tensor
    shape: tuple[int, int]
    format: str
    arithmetic: str = "exact"

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def split(self, sizes: Sequence[int]) -> list["PackedWeight"]:
        """Packed weights of so many outputs each, one behind the other, in this one's memory.

        Raises:
            ValueError: the sizes are not all of the outputs, or one of them but the last is no multiple of
                `group(format)`.
        """
        whole = group(self.format)
        if sum(sizes) != self.shape[0] or min(sizes) < 0 or any(size % whole for size in sizes[:-1]):
            raise ValueError(
                f"sizes: expected multiples of {whole} and a rest, {self.shape[0]} together, got {list(sizes)}"
            )
        parts, begin = [], 0
        for size in sizes:
            end = begin + rows_bytes(size, self.shape[1], self.format, self.arithmetic)
            data = self.data[begin:] if self.format == "lossless" else self.data[begin:end]  # raw runs lie at the end
            parts.append(PackedWeight(data, (size, self.shape[1]), self.format, self.arithmetic))
            begin = end
        return parts

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {self.format!r}")
        if self.arithmetic not in ARITHMETICS:
            raise ValueError(f"arithmetic: expected one of {', '.join(ARITHMETICS)}, got {self.arithmetic!r}")


def group(format: str) -> int:
    """Outputs that packed weights of a format keep together."""
    size: int = _C.packed_group(format)
    return size


def rows_bytes(size_out: int, size_in: int, format: str, arithmetic: str) -> int:
    """Bytes that so many outputs take, less the raw runs of lossless ones, which lie behind all of them."""
    size: int = _C.packed_rows_bytes(size_out, size_in, format, arithmetic)
    return size
