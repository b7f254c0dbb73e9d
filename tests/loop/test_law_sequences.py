"""Whole short texts, drafted and verified with the real ops, against the target's law by exact enumeration.

A model of vocabulary 16 is a table of logits per context, so two-token texts have 256 outcomes of known
probability. Each draw decodes speculatively with its own seed; chi-square over 50,000 draws for each of four filters.
"""

import math

import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from specbranch.core.sampling import Sampling
from specbranch_ext import draft_sample, verify

VOCABULARY = 16
DRAWS = 50_000
PROMPT = [3, 7, 1]

FILTERS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.8, top_k=6),
    Sampling(temperature=1.0, top_p=0.8),
    Sampling(temperature=1.3, min_p=0.1),
]


def table(seed: int) -> Tensor:
    """Logits after the prompt (row 0) and after the prompt and each first token (rows 1 to 16): [17, 16]."""
    model = tiny_model(seed=seed, vocab_size=VOCABULARY, initializer_range=0.5)
    texts = [PROMPT, *([*PROMPT, token] for token in range(VOCABULARY))]
    with torch.no_grad():
        return torch.stack([model(torch.tensor([text])).logits[0, -1] for text in texts]) * 0.5


def law(logits: Tensor, sampling: Sampling) -> Tensor:
    """The target's distribution, written down anew in float64: temperature, top-k, top-p, min-p."""
    p = (logits.double() / sampling.temperature).softmax(-1)
    order = p.argsort(descending=True)
    keep = torch.zeros_like(p, dtype=torch.bool)
    if sampling.top_k:
        order = order[: sampling.top_k]
    ranked = p[order] / p[order].sum()
    before = ranked.cumsum(0) - ranked
    keep[order[before < sampling.top_p]] = True
    keep &= p >= sampling.min_p * p.max()
    return torch.where(keep, p, 0) / p[keep].sum()


@pytest.mark.parametrize("sampling", FILTERS, ids=["temperature", "top_k", "top_p", "min_p"])
def test_two_token_texts_follow_the_target(sampling: Sampling) -> None:
    target, draft = table(1), table(2)
    first = law(target[0], sampling)
    expected = torch.stack([first[token] * law(target[1 + token], sampling) for token in range(VOCABULARY)])
    options = {**sampling.op_arguments}
    positions = torch.tensor([3, 4])
    parents = torch.tensor([-1, 0, 0])
    tree_positions = torch.tensor([3, 4, 4])
    counts = torch.zeros(VOCABULARY, VOCABULARY)
    accepted = 0
    for seed in range(DRAWS):
        options["seed"] = seed
        guesses = draft_sample(draft[:1], positions[:1], 2, **options).tokens[0]
        one, two = guesses.tolist()
        if two < 0:
            two = one
        tokens = torch.tensor([0, one, two])
        verdict = verify(target[[0, 1 + one, 1 + two]], tokens, parents, tree_positions, **options)
        if int(verdict.accepted):
            accepted += 1
            text = int(verdict.target_tokens[0]), int(verdict.next_token)
        else:
            token = int(verdict.next_token)
            again = verify(target[1 + token][None], tokens[:1], parents[:1], positions[1:], **options)
            text = token, int(again.next_token)
        counts[text] += 1
    assert accepted > DRAWS // 10
    assert chi_square_p(counts.flatten(), expected.flatten() * DRAWS) > 1e-4


def chi_square_p(observed: Tensor, expected: Tensor) -> float:
    """Chance of a deviation this large, bins below 10 expected draws merged; impossible outcomes must not occur."""
    assert observed[expected == 0].sum() == 0
    small = (expected < 10) & (expected > 0)
    large = expected >= 10
    parts = [((observed[large] - expected[large]) ** 2 / expected[large]).sum()]
    bins = int(large.sum())
    if small.any() and expected[small].sum() >= 5:
        parts.append((observed[small].sum() - expected[small].sum()) ** 2 / expected[small].sum())
        bins += 1
    statistic, freedom = float(sum(parts)), bins - 1
    # Wilson-Hilferty: the cube root of a chi-square variable over its degrees is nearly normal.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))
