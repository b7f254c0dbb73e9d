"""From raw logits to scaled logits, kept tokens and perturbed scores, as verify and draft_sample define them."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .gumbel_noise import gumbel_noise
from .noise import exp_nonpositive


class Processed(NamedTuple):
    """z: float32 [n, V], logit / temperature; weight: float32 [n, V], exp(z - max z); kept: bool [n, V]."""

    z: Tensor
    weight: Tensor
    kept: Tensor


def only_allowed(logits: Tensor, allowed: Tensor | None) -> Tensor:
    """The logits with -inf for tokens whose bit is not set: bit t % 32 of word t // 32 is token t's."""
    if allowed is None:
        return logits
    bits = allowed.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32) & 1
    return logits.masked_fill(bits.flatten(1)[:, : logits.shape[1]] == 0, -torch.inf)


def sampled(
    logits: Tensor, positions: Tensor, seed: int | Tensor, filters: Tensor | None, *options: Any
) -> tuple[Processed, Tensor]:
    """The rows processed, and their perturbed scores: each as it is alone, with its own seed and filters."""
    if by_row(seed, filters):
        seeds = torch.as_tensor(seed).expand(len(positions))
        each = [None] * len(positions) if filters is None else filters.expand(len(positions), 4)
        rows = [
            sampled(logits[i : i + 1], positions[i : i + 1], seeds[i], each[i], *options) for i in range(len(positions))
        ]
        processed, scores = zip(*rows, strict=True)
        return Processed(*(torch.cat(part) for part in zip(*processed, strict=True))), torch.cat(scores)
    temperature, top_k, top_p, min_p = numbers(filters, *options)
    processed = process(logits, temperature, top_k, top_p, min_p)
    return processed, perturbed_scores(processed, positions, seed, temperature)


def by_row(seed: int | Tensor, filters: Tensor | None) -> bool:
    """Whether rows have a seed or filters of their own."""
    return (isinstance(seed, Tensor) and seed.dim() == 1) or (filters is not None and filters.dim() == 2)


def numbers(
    filters: Tensor | None, temperature: float, top_k: int, top_p: float, min_p: float
) -> tuple[float, int, float, float]:
    """Temperature, top-k, top-p and min-p as given, or from the tensor `filters`."""
    if filters is None:
        return temperature, top_k, top_p, min_p
    temperature, most, top_p, min_p = filters.tolist()
    scales = temperature == 0 or 1e-38 <= temperature <= 1e38
    if not (scales and 0 <= most < math.inf and most == int(most) and 0 < top_p <= 1 and 0 <= min_p <= 1):
        raise ValueError(f"filters: expected values in range, got {filters.tolist()}")
    return temperature, int(most), top_p, min_p


def process(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Processed:
    """Scale by the temperature and apply top-k, top-p and min-p, each as a threshold on z.

    Weights are summed as integers floor(2^40 * weight), so that no sum depends on its order.
    """
    inverse_temperature = torch.tensor(1.0 / temperature if temperature > 0 else 1.0, dtype=torch.float32)
    z = logits.to(torch.float32) * inverse_temperature
    weight = exp_nonpositive(z - z.amax(dim=1, keepdim=True))
    kept = z > -torch.inf
    if temperature == 0:
        return Processed(z, weight, kept)
    vocabulary = z.shape[1]
    if 0 < top_k < vocabulary:
        kept &= z >= z.topk(top_k, dim=1).values[:, -1:]
    if top_p < 1.0:
        fixed = torch.where(kept, (weight.to(torch.float64) * 2.0**40).to(torch.int64), 0)
        ordered, order = z.sort(dim=1, descending=True)
        sums = fixed.gather(1, order).cumsum(dim=1)
        # Of all tokens strictly above a token: the sum just before the first one equal to it.
        first_equal = torch.searchsorted(-ordered, -ordered, right=False)
        larger = torch.nn.functional.pad(sums, (1, 0)).gather(1, first_equal)
        target = top_p * sums[:, -1:].to(torch.float64)
        kept &= torch.zeros_like(kept).scatter(1, order, larger.to(torch.float64) < target)
    if min_p > 0.0:
        kept &= weight >= torch.tensor(min_p, dtype=torch.float32)
    return Processed(z, weight, kept)


def perturbed_scores(processed: Processed, positions: Tensor, seed: int | Tensor, temperature: float) -> Tensor:
    """z + noise for kept tokens, -inf for the others: float32 [n, V]. No noise at temperature 0."""
    z = processed.z
    if temperature > 0:
        z = z + gumbel_noise(positions, z.shape[1], seed=seed)
    return torch.where(processed.kept, z, -torch.inf)
