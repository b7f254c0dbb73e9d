"""gumbel_noise in plain torch."""

from torch import Tensor

from .noise import GUMBEL, GUMBEL_TAIL, gumbel, noise_words


def gumbel_noise(positions: Tensor, vocabulary: int, *, seed: int | Tensor = 0) -> Tensor:
    """See `specbranch_ext.ops.gumbel_noise`."""
    words = noise_words(positions, vocabulary, seed, GUMBEL)
    return gumbel(words, noise_words(positions, vocabulary, seed, GUMBEL_TAIL))
