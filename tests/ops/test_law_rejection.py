"""The law of verify_rejection: by exact enumeration of the reference's chances, and by draws of the op itself.

A model of vocabulary V is a table of logits per context. `Model` holds the rows of every text of up to `length`
tokens; a text's law is a product of rows. Enumeration goes through every draft, every number of accepted tokens and
every next token, lets the target go on from there, and compares the texts that come out with the target's own.
"""

import math
from itertools import product
from typing import Any

import pytest
import torch
from allowed_tokens import mask_others, pack
from torch import Tensor

from specbranch_ext import verify_rejection
from specbranch_ext.reference.verify_rejection import chances, weights

FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 2.5, "top_k": 2},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.3},
    {"temperature": 0.0},
]
MODES = [False, True]


class Model:
    """Logits of every context of fewer than `length` tokens: rows[d] is [V^d, V], contexts in base V. allowed: bool
    of the same shapes, the tokens that may be chosen."""

    def __init__(self, rows: list[Tensor], allowed: list[Tensor] | None = None, **options: float) -> None:
        self.rows = rows
        self.allowed = allowed
        self.vocabulary = rows[0].shape[1] if rows else 0
        self.options: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
        self.law = []
        for row in rows if allowed is None else map(mask_others, rows, allowed):
            weight, share = weights(row, *self.options.values())
            self.law.append(weight * share)

    def code(self, text: tuple[int, ...]) -> int:
        return sum(token * self.vocabulary**i for i, token in enumerate(reversed(text)))

    def logits(self, text: tuple[int, ...], steps: int) -> Tensor:
        """[steps, V]: the rows after the first 0, 1, … tokens of `text`."""
        return self.of_contexts(self.rows, text, steps)

    def of_contexts(self, rows: list[Tensor], text: tuple[int, ...], steps: int) -> Tensor:
        return torch.stack([rows[d][self.code(text[:d])] for d in range(steps)])

    def probability(self, text: tuple[int, ...]) -> float:
        return math.prod(float(self.law[d][self.code(text[:d]), token]) for d, token in enumerate(text))

    def rest(self, text: tuple[int, ...]) -> Tensor:
        """The law of the tokens that follow `text` up to the model's length, flat."""
        law = torch.ones(1, dtype=torch.float64)
        code = self.code(text)
        for d in range(len(text), len(self.rows)):
            width = self.vocabulary ** (d - len(text))
            law = (law.unsqueeze(1) * self.law[d][code * width : (code + 1) * width]).flatten()
        return law


def random_model(vocabulary: int, length: int, seed: int, masked: float, spread: float = 1.5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(vocabulary**d, vocabulary, generator=generator) * spread for d in range(length)]
    for row in rows:
        row[torch.rand(row.shape, generator=generator) < masked] = -torch.inf
        row[row.amax(dim=1) == -torch.inf] = 0.0
    return rows


def outcome_law(target: Model, draft: Model, drafted: int, block: bool) -> tuple[Tensor, float]:
    """The law of the texts that come out, flat over the target's length, and the mean number of accepted tokens."""
    vocabulary, length = target.vocabulary, len(target.rows)
    law = torch.zeros(vocabulary**length, dtype=torch.float64)
    mean = 0.0
    for text in product(range(vocabulary), repeat=drafted):
        chance = draft.probability(text)
        if chance == 0.0:
            continue
        accept, weight = chances(
            target.logits(text, drafted + 1),
            draft.logits(text, drafted) if drafted else torch.empty(0, vocabulary),
            torch.tensor([0, *text]),
            block=block,
            allowed=None if target.allowed is None else pack(target.of_contexts(target.allowed, text, drafted + 1)),
            **target.options,
        )
        yes = accept.tolist()
        for kept in range(drafted + 1):
            if block:
                p = (yes[kept - 1] if kept else 1.0) * math.prod(1.0 - h for h in yes[kept:])
            else:
                p = math.prod(yes[:kept]) * (1.0 - yes[kept] if kept < drafted else 1.0)
            mean += chance * p * kept
            if p == 0.0:
                continue
            following = weight[kept].double() / weight[kept].sum()
            for token, q in enumerate(following.tolist()):
                if q > 0.0:
                    rest = target.rest((*text[:kept], token))
                    begin = target.code((*text[:kept], token)) * len(rest)
                    law[begin : begin + len(rest)] += chance * p * q * rest
    return law, mean


def assert_exact(
    target_rows: list[Tensor], draft_rows: list[Tensor], drafted: int, allowed: list[Tensor] | None = None, **options
) -> None:
    target, draft = Model(target_rows, allowed, **options), Model(draft_rows, allowed, **options)
    means = []
    for block in MODES:
        law, mean = outcome_law(target, draft, drafted, block)
        assert (law - target.rest(())).abs().max() < 1e-12
        assert law[target.rest(()) == 0].sum() == 0  # what the target never says never comes out
        means.append(mean)
    assert means[1] > means[0] - 1e-12  # block verification accepts no fewer on average


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize(
    ("vocabulary", "drafted", "seeds"),
    [(2, 0, 2), (2, 1, 6), (2, 2, 4), (2, 3, 3), (2, 4, 2), (3, 1, 4), (3, 2, 2), (3, 3, 1), (4, 1, 3), (4, 2, 2)],
)
def test_exact_law_of_random_models(vocabulary, drafted, seeds, options):
    for seed in range(seeds):
        for masked in (0.0, 0.3):
            target = random_model(vocabulary, drafted + 1, seed, masked)
            draft = random_model(vocabulary, drafted, seed + 1000, masked)
            assert_exact(target, draft, drafted, **options)


def test_exact_law_on_a_grid():
    """Every pair of rows of a grid after no and after one token: certain, impossible, equal and ordinary tokens."""
    grid = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0], [0.0, 0.0], [0.0, 1.0], [50.0, 0.0]])
    third = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0], [-1.0, 0.0]])
    for rows in product(range(5), repeat=4):
        a, b, c, d = grid[list(rows)]
        target = [a[None], torch.stack([b, a]), third]
        draft = [c[None], torch.stack([d, c])]
        if rows[0] <= rows[1]:  # the mirrored half adds nothing
            assert_exact(target, draft, 2, temperature=1.0)


def test_exact_law_of_close_models():
    """Hardly any rejection, and residuals of little more than rounding."""
    target = random_model(3, 3, 0, 0.0)
    for distance in (0.0, 1e-7, 1e-6, 1e-4):
        draft = [row + distance * torch.randn(row.shape) for row in target[:2]]
        assert_exact(target, draft, 2, temperature=1.0)
        if distance == 0.0:
            assert outcome_law(Model(target), Model(draft), 2, True)[1] == pytest.approx(2.0, abs=1e-12)


def test_exact_law_of_far_models():
    """Probabilities down to 2^-40, and 0 below."""
    for seed in range(3):
        assert_exact(random_model(3, 3, seed, 0.0, 15.0), random_model(3, 2, seed + 9, 0.0, 15.0), 2, temperature=1.0)


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize(("vocabulary", "drafted", "step"), [(2, 0, 1), (2, 1, 1), (2, 2, 11), (3, 0, 1), (3, 1, 47)])
def test_exact_law_under_every_mask(vocabulary, drafted, step, options):
    """Every choice of allowed tokens for every context, or every `step`-th; what is not allowed is no number."""
    masks = [mask for mask in product([False, True], repeat=vocabulary) if any(mask)]
    contexts = sum(vocabulary**d for d in range(drafted + 1))
    for i, chosen in enumerate(product(masks, repeat=contexts)):
        if i % step != 0:
            continue
        rows = iter(torch.tensor(chosen).split([vocabulary**d for d in range(drafted + 1)]))
        allowed = list(rows)
        target = random_model(vocabulary, drafted + 1, i, 0.0)
        draft = random_model(vocabulary, drafted, i + 1000, 0.0)
        for model in (target, draft):
            for row, tokens in zip(model, allowed, strict=False):
                row[~tokens] = (torch.nan, torch.inf, 50.0)[i % 3]
        assert_exact(target, draft, drafted, allowed, **options)


def test_block_verification_accepts_more():
    """The example of Sun et al.: two tokens, 1.11 accepted token by token and 1.22 as a block."""
    target = [torch.tensor([1 / 3, 2 / 3]).log().expand(2**d, 2) for d in range(3)]
    draft = [torch.tensor([2 / 3, 1 / 3]).log().expand(2**d, 2) for d in range(2)]
    means = [outcome_law(Model(target), Model(draft), 2, block)[1] for block in MODES]
    assert means == [pytest.approx(10 / 9, abs=1e-6), pytest.approx(11 / 9, abs=1e-6)]


# ---- Draws of the op.


def assert_law(outcomes: Tensor, law: Tensor) -> None:
    """Chi-square with cells of fewer than ten expected draws merged; fails beyond five standard deviations."""
    counts = torch.bincount(outcomes, minlength=len(law)).double()
    assert counts[law == 0].sum() == 0
    expected = law * len(outcomes)
    small = expected < 10
    counts = torch.cat([counts[~small], counts[small].sum().reshape(1)])
    expected = torch.cat([expected[~small], expected[small].sum().reshape(1)])
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("block", MODES)
@pytest.mark.parametrize("options", FILTERS[:5], ids=str)
def test_drawn_texts_have_the_target_law(options, block):
    """Two drafted tokens of 16, one call for each draw; the target itself writes on until there are two tokens."""
    draws = 12_000
    generator = torch.Generator().manual_seed(3)
    target = Model(random_model(16, 2, 1, 0.1), **options)
    draft = Model([row + 0.7 * torch.randn(row.shape, generator=generator) for row in target.rows], **options)
    bonus = target.rows[0]  # after two tokens: not part of the text
    first = torch.multinomial(draft.law[0][0], draws, replacement=True, generator=generator)
    second = torch.multinomial(draft.law[1][first], 1, generator=generator)[:, 0]
    alone = torch.multinomial(target.law[1], draws, replacement=True, generator=generator)  # [16, draws]
    tokens = torch.stack([torch.zeros_like(first), first, second], dim=1)
    positions = torch.arange(5, 8)
    texts = []
    accepted = 0
    for seed, (chain, a, b) in enumerate(zip(tokens.unbind(), first.tolist(), second.tolist(), strict=True)):
        verdict = verify_rejection(
            torch.cat([target.rows[0], target.rows[1][a : a + 1], bonus]),
            torch.cat([draft.rows[0], draft.rows[1][a : a + 1]]),
            chain,
            positions,
            block=block,
            seed=seed,
            **options,
        )
        kept = int(verdict.accepted)
        accepted += kept
        text = (*(a, b)[:kept], int(verdict.next_token))
        if kept == 0:
            text = (text[0], int(alone[text[0], seed]))
        texts.append(text[0] * 16 + text[1])
    assert_law(torch.tensor(texts), target.rest(()))
    assert accepted > draws / 2  # close models


@pytest.mark.parametrize("block", MODES)
def test_drawn_tokens_have_the_masked_target_law(block):
    """A drafted token of six, for every second mask; what is not allowed is likelier than all the rest."""
    draws = 1_500
    generator = torch.Generator().manual_seed(5)
    target, draft = torch.randn(2, 6, generator=generator), torch.randn(1, 6, generator=generator)
    for code in range(3, 64, 2):
        tokens = torch.tensor([[code >> t & 1 == 1 for t in range(6)]])
        one, other = target + 9.0 * ~tokens, draft + 9.0 * ~tokens
        law, guess = (mask_others(logits, tokens).double().softmax(1)[0] for logits in (target[:1], draft))
        allowed = pack(tokens).expand(2, -1)
        drafted = torch.multinomial(guess, draws, replacement=True, generator=generator)
        drawn = []
        for seed, token in enumerate(drafted.tolist()):
            chain = (torch.tensor([0, token]), torch.arange(2))
            verdict = verify_rejection(one, other, *chain, block=block, seed=code * draws + seed, allowed=allowed)
            drawn.append(token if verdict.accepted else int(verdict.next_token))
        assert_law(torch.tensor(drawn), law)


@pytest.mark.parametrize("block", MODES)
def test_rounds_of_one_text_do_not_share_coins(block):
    """Texts of three tokens, of which the second round sees positions again whose coins the first one looked at."""
    target_law = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    target = target_law.float().log()
    draft = torch.tensor([0.2, 0.3, 0.5]).log()
    draws = 8_000
    generator = torch.Generator().manual_seed(3)
    guesses = torch.multinomial(draft.exp(), 5 * draws, replacement=True, generator=generator)
    drafts = guesses.reshape(draws, 5).tolist()
    texts = []
    for seed in range(draws):
        text: list[int] = []
        while len(text) < 3:
            drafted = [drafts[seed].pop() for _ in range(1 if text else 2)]
            n = len(drafted) + 1
            verdict = verify_rejection(
                target.expand(n, -1),
                draft.expand(n - 1, -1),
                torch.tensor([0, *drafted]),
                torch.arange(n) + len(text),
                block=block,
                seed=seed,
            )
            text += [*drafted[: int(verdict.accepted)], int(verdict.next_token)]
        texts.append(text[0] * 9 + text[1] * 3 + text[2])
    law = (target_law[:, None, None] * target_law[:, None] * target_law).flatten()
    assert_law(torch.tensor(texts), law)


def test_large_vocabulary_draws_the_residual():
    """A first token certain to be rejected, so that 20,000 tokens, gathered into 50 groups, show the residual."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, draws = 20_000, 3_000
    target = torch.randn(2, vocabulary, generator=generator)
    target[0, 7] = -torch.inf
    draft = target[:1] + torch.randn(1, vocabulary, generator=generator)
    draft[0, 7] = 5.0
    group = torch.randint(0, 50, (vocabulary,), generator=generator)
    excess = (target[0].double().softmax(0) - draft[0].double().softmax(0)).clamp(min=0.0)
    law = torch.zeros(50, dtype=torch.float64).index_add_(0, group, excess / excess.sum())
    arguments = (target, draft, torch.tensor([0, 7]), torch.tensor([3, 4]))
    drawn = [int(verify_rejection(*arguments, seed=seed, block=bool(seed % 2)).next_token) for seed in range(draws)]
    assert 7 not in drawn
    assert (excess[drawn] > 0).all()
    assert_law(group[drawn], law)


@pytest.mark.parametrize("block", MODES)
def test_one_chain_is_decided_as_its_chances_say(block):
    target = torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    draft = torch.tensor([[0.5, 0.0, 0.9], [0.0, 1.0, 0.0]])
    for tokens in (torch.tensor([0, 2, 1]), torch.tensor([0, 0, 0])):
        accept, weight = chances(target, draft, tokens, block=block)
        first, second = accept.tolist()
        if block:
            kept = [(1 - first) * (1 - second), first * (1 - second), second]
        else:
            kept = [1 - first, first * (1 - second), first * second]
        law = torch.tensor(kept).double().unsqueeze(1) * weight / weight.sum(dim=1, keepdim=True)
        outcomes = []
        for seed in range(10_000):
            verdict = verify_rejection(target, draft, tokens, torch.arange(3), seed=seed, block=block)
            outcomes.append(int(verdict.accepted) * 3 + int(verdict.next_token))
        assert_law(torch.tensor(outcomes), law.flatten())
