"""The law: what verify and draft_sample draw, against distributions computed here in float64."""

import math
from typing import Any

import pytest
import torch
from filters import in_memory
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from specbranch_ext import draft_sample, verify

VOCABULARY, DRAWS = 16, 200_000
LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.0, 1.5, -2.0, 0.25, -0.5, 1.0, -3.0, 0.75, -1.5, 2.5, -0.25, -6.0, 1.25])
FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
]


def exact(logits: torch.Tensor, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> torch.Tensor:
    """The processed distribution, float64 [V], token by token as the definition says."""
    weight = (logits.double() / temperature).softmax(dim=0)
    kept = torch.ones(len(weight), dtype=torch.bool)
    if top_k:
        kept &= torch.tensor([int((weight > w).sum()) < top_k for w in weight])
    if top_p < 1.0:
        total = weight[kept].sum()
        kept &= torch.tensor([bool(weight[kept & (weight > w)].sum() < top_p * total) for w in weight])
    if min_p:
        kept &= weight >= min_p * weight.max()
    weight = weight * kept
    return weight / weight.sum()


def assert_law(draws: torch.Tensor, probability: torch.Tensor) -> None:
    """Chi-square with cells of fewer than ten expected draws merged; fails beyond five standard deviations."""
    counts = torch.bincount(draws.flatten(), minlength=probability.numel()).double()
    probability = probability.flatten()
    assert counts[probability == 0].sum() == 0
    expected = probability * counts.sum()
    small = expected < 10
    counts = torch.cat([counts[~small], counts[small].sum().reshape(1)])
    expected = torch.cat([expected[~small], expected[small].sum().reshape(1)])
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    if freedom == 0:
        return
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def target_tokens(logits: torch.Tensor, positions: torch.Tensor, seed: int, **options) -> torch.Tensor:
    n = len(positions)
    unused = torch.full((n,), -1)
    return verify(logits.expand(n, -1), unused, unused, positions, seed=seed, **options).target_tokens


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_verify_draws_the_processed_distribution(options):
    probability = exact(LOGITS, **options)
    tokens = target_tokens(LOGITS, torch.arange(DRAWS), 1, **options)
    assert_law(tokens, probability)
    # Neighbouring positions, and seeds, are independent: pairs have the product law.
    pairs = probability.unsqueeze(1) * probability
    assert_law(tokens[0::2] * VOCABULARY + tokens[1::2], pairs)
    other_seed = target_tokens(LOGITS, torch.arange(DRAWS), 2, **options)
    assert_law(tokens * VOCABULARY + other_seed, pairs)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_draft_sample_draws_without_replacement(options):
    probability = exact(LOGITS, **options)
    sample = draft_sample(LOGITS.expand(DRAWS, -1), torch.arange(DRAWS), 2, seed=3, **options)
    first, second = sample.tokens.unbind(dim=1)
    assert_law(first, probability)
    assert_law(
        first * VOCABULARY + second,
        probability.unsqueeze(1) * probability / (1 - probability).unsqueeze(1) * (1 - torch.eye(VOCABULARY)),
    )
    torch.testing.assert_close(sample.confidence[:, 0].double(), probability[first], rtol=1e-4, atol=1e-6)
    entropy = torch.special.entr(probability).sum().item()
    assert sample.entropy[0].item() == pytest.approx(entropy, rel=1e-5)


def test_large_vocabulary_draws_the_distribution():
    """The pruned search of large rows, against the exact law of 10,000 tokens gathered into 50 groups."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10_000, generator=generator) * 1.5
    group = torch.randint(0, 50, (10_000,), generator=generator)
    for options in ({"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}):
        probability = torch.zeros(50, dtype=torch.float64)
        weight = (logits.double()).softmax(dim=0)
        if "top_p" in options:
            ordered, order = weight.sort(descending=True)
            weight[order[ordered.cumsum(0) - ordered >= options["top_p"]]] = 0.0
        probability.index_add_(0, group, weight / weight.sum())
        tokens = target_tokens(logits, torch.arange(20_000), 5, **options)
        assert_law(group[tokens], probability)


FIRST = torch.tensor([0.5, 0.0, -0.5, 1.0])
SECOND = torch.tensor([[0.0, 1.0, 0.2, -1.0], [1.0, 0.0, 0.0, 0.5], [-1.0, 0.3, 2.0, 0.0], [0.0, 0.0, 0.7, 0.1]])
DRAFT = torch.tensor([[1.0, 0.5, -0.5, 0.0]])


def law_of_two_tokens(**options: Any) -> torch.Tensor:
    """[4, 4]: of texts whose first token has the logits FIRST, and the second one those of SECOND[first]."""
    return torch.stack([p * exact(row, **options) for p, row in zip(exact(FIRST, **options), SECOND, strict=True)])


def test_speculated_sequences_have_the_target_law():
    """Whole two-token texts, drafted by another distribution with shared noise, verified as a tree."""
    parents = torch.tensor([-1, 0, 0])
    options: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9}
    texts, hits = [], 0
    for seed in range(8000):
        drafted = draft_sample(DRAFT, torch.tensor([10]), 2, seed=seed, **options).tokens[0]
        logits = torch.stack([FIRST, *SECOND[drafted]])
        tokens = torch.cat([torch.tensor([0]), drafted])
        result = verify(logits, tokens, parents, torch.tensor([10, 11, 11]), seed=seed, **options)
        if result.accepted:
            hits += 1
            text = (tokens[result.path[0]], result.next_token)
        else:
            again = SECOND[result.next_token].unsqueeze(0)
            second = verify(again, tokens[:1], parents[:1], torch.tensor([11]), seed=seed, **options)
            text = (result.next_token, second.next_token)
        texts.append(int(text[0]) * 4 + int(text[1]))
    assert_law(torch.tensor(texts), law_of_two_tokens(**options))
    assert hits > 0.75 * len(texts)  # shared noise: far above the 0.5 of two uniform guesses


def test_texts_of_one_call_have_each_the_target_law():
    """The same for many texts, drafted together and verified together, each with its seed and filters."""
    each = 20_000
    texts = each * len(FILTERS)
    seed = torch.arange(texts)
    filters = torch.stack([in_memory(options) for options in FILTERS]).repeat(each, 1)
    positions = torch.full((texts,), 10)
    drafted = draft_sample(DRAFT.expand(texts, -1), positions, 2, seed=seed, filters=filters).tokens  # -1: the last one
    logits = torch.cat([FIRST.expand(texts, 1, 4), SECOND[drafted]], dim=1).flatten(0, 1)
    roots = 3 * torch.arange(texts)
    parents = torch.stack([torch.full_like(roots, -1), roots, roots], dim=1).flatten()
    tokens = torch.nn.functional.pad(drafted, (1, 0)).flatten()
    result = verify(
        logits,
        tokens,
        parents,
        (positions.unsqueeze(1) + torch.tensor([0, 1, 1])).flatten(),
        seed=seed.repeat_interleave(3),
        filters=filters.repeat_interleave(3, dim=0),
        roots=roots,
    )
    hit = result.accepted > 0
    assert hit.double().mean() > 0.75
    first = torch.where(hit, tokens[result.path[roots]], result.next_token)
    unused = torch.full_like(roots, -1)
    alone = verify(SECOND[first], unused, unused, positions + 1, seed=seed, filters=filters).target_tokens
    second = torch.where(hit, result.next_token, alone)
    assert torch.equal(second, alone)  # coupled: what the draft did changes no token
    for text in range(len(FILTERS)):
        drawn = (first * 4 + second)[text :: len(FILTERS)]
        assert_law(drawn, law_of_two_tokens(**FILTERS[text]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_k": 10},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.5, "top_p": 0.5},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    ],
    ids=str,
)
def test_filters_keep_what_transformers_keeps(options, seed):
    logits = torch.randn(2, 1000, generator=torch.Generator().manual_seed(seed)) * 3
    warped = TemperatureLogitsWarper(options["temperature"])(None, logits)
    if "top_k" in options:
        warped = TopKLogitsWarper(options["top_k"])(None, warped)
    if "top_p" in options:
        warped = TopPLogitsWarper(options["top_p"])(None, warped)
    if "min_p" in options:
        warped = MinPLogitsWarper(options["min_p"])(None, warped)  # type: ignore[arg-type]
    sample = draft_sample(logits, torch.arange(2), 1000, **options)  # every kept token, then -1
    for row, tokens in zip(warped, sample.tokens, strict=True):
        assert set(tokens[tokens >= 0].tolist()) == set((row > -torch.inf).nonzero().flatten().tolist())
    probability = warped.softmax(dim=1).gather(1, sample.tokens.clamp(min=0)) * (sample.tokens >= 0)
    torch.testing.assert_close(sample.confidence, probability, rtol=1e-4, atol=1e-6)
