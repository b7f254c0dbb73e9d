"""Masks of single tokens, in the layout of the ops' argument `allowed`."""

import torch
from torch import Tensor


def pack(tokens: Tensor, behind: int = 0) -> Tensor:
    """From bool [n, V] to int32 [n, ceil(V / 32)]; `behind`: the bit of tokens from V on."""
    n, vocabulary = tokens.shape
    words = -(-vocabulary // 32)
    bits = torch.full((n, words * 32), behind, dtype=torch.int64)
    bits[:, :vocabulary] = tokens
    values = (bits.view(n, words, 32) << torch.arange(32)).sum(dim=2)
    return torch.where(values >= 2**31, values - 2**32, values).to(torch.int32)


def mask_others(logits: Tensor, tokens: Tensor) -> Tensor:
    """What the ops' results with `allowed` must equal."""
    return logits.masked_fill(~tokens, -torch.inf)


def of_kind(kind: str, n: int, vocabulary: int, seed: int = 0) -> Tensor:
    """bool [n, V] with at least one token in every row: all, all but a few, half, ten, one, a range, or none but the
    last one."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(n, vocabulary, dtype=torch.bool)
    if kind in ("all", "dense", "half"):
        share = {"all": 2.0, "dense": 0.95, "half": 0.5}[kind]
        tokens = torch.rand(n, vocabulary, generator=generator) < share
    elif kind == "range":  # whole blocks with none, and with all
        tokens[:, vocabulary // 3 : vocabulary // 3 + vocabulary // 2 + 1] = True
    elif kind == "last":
        tokens[:, -1] = True
    one_or_more = torch.randint(vocabulary, (n, 10 if kind == "ten" else 1), generator=generator)
    return tokens if kind == "last" else tokens.scatter(1, one_or_more, True)


KINDS = ["all", "dense", "half", "range", "ten", "one", "last"]
