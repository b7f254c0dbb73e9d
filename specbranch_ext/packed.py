"""Weights in fewer bytes: what packed weights are, for all formats."""

from dataclasses import dataclass

from torch import Tensor

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

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {self.format!r}")
        if self.arithmetic not in ARITHMETICS:
            raise ValueError(f"arithmetic: expected one of {', '.join(ARITHMETICS)}, got {self.arithmetic!r}")
