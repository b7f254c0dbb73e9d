"""Weights in fewer bytes: what packed weights are, for all formats."""

from dataclasses import dataclass

from torch import Tensor

FORMATS = ("lossless",)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A packed weight [out, in]: `pack_weight` makes one, `packed_linear` multiplies by it, `unpack_rows` reads rows.

    data: uint8 [bytes], contiguous, aligned to 64 bytes (as torch allocates memory). shape: (out, in). format:
    "lossless": bfloat16 in 12 bits and a little, with the very values. Of each run of 32 weights along `in` a byte
    keeps the largest exponent; each weight keeps sign and mantissa, and in 4 bits how far its exponent lies below (15:
    it is 0). A run with an exponent more than 14 below, infinities or NaN is kept as it is.
    """

    data: Tensor
    shape: tuple[int, int]
    format: str

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {self.format!r}")
