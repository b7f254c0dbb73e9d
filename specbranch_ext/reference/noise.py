"""The noise in plain torch: csrc/core/philox.h and csrc/core/numerics.h step by step, giving the same bits.

Every float32 operation is a torch operation of its own, so nothing is fused or reordered; 32-bit words live in
int64 tensors.
"""

import torch
from torch import Tensor

GUMBEL, GUMBEL_TAIL = 0, 1  # purposes: the last counter word

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors holding 32-bit words (Salmon et al., "Parallel random numbers: as easy as
    1, 2, 3", SC 2011). Returns four tensors of words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product_0, product_1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]  # modulo 2^64
        high_0, high_1 = (product_0 >> 32) & _MASK, (product_1 >> 32) & _MASK
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, product_1 & _MASK, high_0 ^ c3 ^ k1, product_0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def noise_words(positions: Tensor, vocabulary: int, seed: int | Tensor, purpose: int) -> Tensor:
    """The random word of every token at each position: int64 [n, V] with values below 2^32."""
    seed = torch.as_tensor(seed, dtype=torch.int64)
    position = positions.unsqueeze(1)
    block = torch.arange((vocabulary + 3) // 4).unsqueeze(0).expand(len(positions), -1)
    counter = (
        block,
        (position & _MASK).expand_as(block),
        ((position >> 32) & _MASK).expand_as(block),
        torch.full_like(block, purpose),
    )
    words = philox(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return torch.stack(words, dim=2).flatten(1)[:, :vocabulary]


def exp_nonpositive(x: Tensor) -> Tensor:
    """e^x for float32 x <= 0; exactly 0 below -87."""
    clamped = x.clamp(min=-87.0)
    n = (clamped * 1.44269504 + 12582912.0) - 12582912.0  # rounds to an integer
    r = (clamped - n * 0.693359375) - n * -2.12194440e-4
    p = torch.full_like(r, 8.312498e-3)
    for coefficient in (4.189036e-2, 1.6667116e-1, 4.999923e-1):
        p = p * r + coefficient
    value = (p * (r * r) + r) + 1.0
    scale = ((n.to(torch.int32) + 127) << 23).view(torch.float32)
    return torch.where(x < -87.0, 0.0, value * scale)


def _split_for_log(x: Tensor) -> tuple[Tensor, Tensor]:
    bits = x.view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23
    return (bits - (exponent << 23)).view(torch.float32) - 1.0, exponent.to(torch.float32)


def _log_reduced(f: Tensor, e: Tensor) -> Tensor:
    square = f * f
    p = torch.full_like(f, 7.0376836292e-2)
    for coefficient in (
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    ):
        p = p * f + coefficient
    low = ((p * f) * square + e * -2.12194440e-4) - square * 0.5
    return (f + low) + e * 0.693359375


def _word_to_float(word: Tensor) -> Tensor:
    return (word >> 16).to(torch.float32) * 65536.0 + (word & 0xFFFF).to(torch.float32)


def gumbel(word: Tensor, tail_word: Tensor) -> Tensor:
    """Standard Gumbel noise -log(E), E = -log(1 - v), from words in int64 tensors; float32.

    v = (word + 1/2) / 2^32, and for words below 2^16, where that is too coarse, two words make 64 bits. Large v
    use the complement, so E is finite.
    """
    scaled = _word_to_float(word) * 2.0**-32
    tail = (scaled + _word_to_float(tail_word) * 2.0**-64) + 2.0**-65
    v = torch.where(word < 65536, tail, scaled + 2.0**-33)
    f, e = _split_for_log(_word_to_float(word ^ _MASK) * 2.0**-32 + 2.0**-33)
    small = scaled < 0.25
    exponential = -_log_reduced(torch.where(small, -v, f), torch.where(small, 0.0, e))
    return -_log_reduced(*_split_for_log(exponential))
