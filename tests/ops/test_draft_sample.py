"""draft_sample: the reference's candidates and scores bit for bit, its confidence and entropy closely."""

import math

import pytest
import torch
from filters import FILTERS
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import on_cpu

from specbranch_ext import draft_sample, reference, verify

pytestmark = pytest.mark.usefixtures("implementation")


def assert_same(logits, positions, k, **options):
    ours = draft_sample(logits, positions, k, **options)
    expected = reference.draft_sample(logits, positions, k, **options)
    assert torch.equal(ours.tokens, expected.tokens)
    assert torch.equal(ours.scores, expected.scores)
    torch.testing.assert_close(ours.confidence, expected.confidence, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.entropy, expected.entropy, rtol=1e-4, atol=1e-4)
    return ours


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 16, 1001, 8193, 16_403])
def test_equals_the_reference(options, dtype, vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    spreads = (0.3, 1.0, 4.0) if vocabulary < 8000 or dtype == torch.float32 else (2.0,)
    for spread in spreads:
        logits = (torch.randn(2, vocabulary, generator=generator) * spread).to(dtype)
        positions = torch.tensor([5, 2**35])
        most = min(33, vocabulary)
        candidates = assert_same(logits, positions, most, seed=vocabulary, **options)
        for k in {1, min(4, most)}:
            ours = draft_sample(logits, positions, k, seed=vocabulary, **options)
            assert torch.equal(ours.tokens, candidates.tokens[:, :k])
            assert torch.equal(ours.scores, candidates.scores[:, :k])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_equals_the_reference_on_small_rows(data):
    vocabulary = data.draw(st.integers(1, 9))
    values = st.sampled_from([-torch.inf, -3.0, 0.0, 0.5, 2.0])
    rows = data.draw(st.lists(st.lists(values, min_size=vocabulary, max_size=vocabulary), min_size=1, max_size=4))
    logits = torch.tensor(rows)
    logits[logits.amax(dim=1) == -torch.inf] = 0.0
    k = data.draw(st.integers(1, vocabulary))
    options = data.draw(st.sampled_from(FILTERS))
    seed = data.draw(st.integers(-(2**63), 2**63 - 1))
    assert_same(logits, torch.arange(len(logits)), k, seed=seed, **options)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_first_candidate_is_the_target_token_of_equal_logits(options):
    logits = torch.randn(20, 9000, generator=torch.Generator().manual_seed(3))
    positions = torch.arange(20)
    tokens = draft_sample(logits, positions, 3, seed=8, **options).tokens[:, 0]
    zeros = torch.zeros(20, dtype=torch.int64)
    assert torch.equal(tokens, verify(logits, zeros, positions - 1, positions, seed=8, **options).target_tokens)


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_threads_and_strides_do_not_matter(options, implementation):
    base = torch.randn(4, 30_100, generator=torch.Generator().manual_seed(2))
    view, positions = base[::2, 50:30_050], torch.tensor([1, 2])
    expected = draft_sample(view.contiguous(), positions, 5, seed=3, **options)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5) if implementation == "cpu" else (1,):
            torch.set_num_threads(threads)
            ours = draft_sample(view, positions, 5, seed=3, **options)
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    finally:
        torch.set_num_threads(before)


def test_missing_candidates_are_padded():
    logits = torch.tensor([[0.0, 3.0, 1.0, -torch.inf]])
    sample = draft_sample(logits, torch.tensor([0]), 4, temperature=1.0, top_k=2)
    assert set(sample.tokens[0, :2].tolist()) == {1, 2}
    assert sample.tokens[0, 2:].tolist() == [-1, -1]
    assert sample.scores[0, 2:].tolist() == [-torch.inf, -torch.inf]
    assert sample.confidence[0, 2:].tolist() == [0.0, 0.0]
    assert sample.confidence.sum().item() == pytest.approx(1.0)
    greedy = draft_sample(logits, torch.tensor([0]), 4)
    assert greedy.tokens.tolist() == [[1, 2, 0, -1]]
    assert greedy.scores.tolist() == [[3.0, 1.0, 0.0, -torch.inf]]


def test_confidence_and_entropy_of_known_distributions():
    uniform = draft_sample(torch.zeros(1, 64), torch.tensor([0]), 2)
    assert uniform.entropy.item() == pytest.approx(math.log(64))
    assert uniform.confidence[0].tolist() == pytest.approx([1 / 64, 1 / 64])
    one = draft_sample(torch.tensor([[5.0, -torch.inf]]), torch.tensor([0]), 1, temperature=2.0)
    assert one.entropy.item() == pytest.approx(0.0, abs=1e-6)
    assert one.confidence.item() == pytest.approx(1.0)
    logits = torch.randn(3, 20_000, generator=torch.Generator().manual_seed(1)) * 3
    probability = (logits.double() / 0.7).softmax(dim=1)
    sample = draft_sample(logits, torch.arange(3), 4, seed=4, temperature=0.7)
    expected = probability.gather(1, sample.tokens)
    torch.testing.assert_close(sample.confidence.double(), expected, rtol=2e-5, atol=1e-7)
    torch.testing.assert_close(sample.entropy.double(), torch.special.entr(probability).sum(1), rtol=1e-5, atol=1e-5)


def bad(**changes):
    arguments = {"draft_logits": torch.zeros(2, 8), "positions": torch.arange(2), "k": 3}
    return {**arguments, **changes}


@on_cpu
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}], ids=str)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (bad(draft_logits=torch.tensor([[0.0] * 8, [torch.nan] * 8])), "draft_logits: row 1 has NaN"),
        (bad(draft_logits=torch.tensor([[torch.inf] + [0.0] * 7] * 2)), r"draft_logits: row 0 has \+inf"),
        (bad(draft_logits=torch.full((2, 8), -torch.inf)), "draft_logits: row 0 has only -inf"),
        (bad(draft_logits=torch.zeros(2, 8, dtype=torch.int64)), "draft_logits: expected float32"),
        (bad(draft_logits=torch.zeros(8)), "draft_logits: expected shape"),
        (bad(positions=torch.arange(3)), "positions: expected shape"),
        (bad(k=0), "k: expected"),
        (bad(k=9), "k: expected"),
        (bad(top_p=2.0), "top_p: expected"),
    ],
)
def test_bad_input_is_named(options, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        draft_sample(**{**options, **arguments})


def test_opcheck():
    arguments = (torch.randn(2, 40), torch.arange(2), 3, torch.tensor(3), 1.0, 10, 0.9, 0.01)
    torch.library.opcheck(torch.ops.specbranch.draft_sample.default, arguments)
