"""Numbers at the ends of their range: temperatures, logits, soft caps and scales."""

from typing import Any

import pytest
import torch
from attention_inputs import TOLERANCE, random_inputs
from implementations import on_cpu

from specbranch_ext import draft_sample, reference, tree_attention, verify, verify_rejection

pytestmark = pytest.mark.usefixtures("implementation")

TEMPERATURES = [1e-38, 1.2e-38, 1e-30, 1e30, 3e35, 1e36, 1e37, 9.9e37, 1e38]
FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 2},
    {"top_k": 99},
    {"top_p": 0.5},
    {"top_p": 1e-300},
    {"top_p": 1 - 2.0**-53},
    {"top_k": 50, "top_p": 0.7, "min_p": 1e-7},
]


def assert_equal(ours: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b), f"{a} instead of {b}"


def assert_the_references_draws(logits: torch.Tensor, **options: Any) -> None:
    n = len(logits)
    tokens, parents, positions = logits.argmax(1).roll(1), torch.arange(n) - 1, torch.arange(n) + 7
    tree = (logits, tokens, parents, positions)
    assert_equal(verify(*tree, **options), reference.verify(*tree, **options))
    ours = draft_sample(logits, positions, 3, **options)
    expected = reference.draft_sample(logits, positions, 3, **options)
    assert_equal(ours[:2], expected[:2])
    torch.testing.assert_close(tuple(ours[2:]), tuple(expected[2:]), rtol=1e-5, atol=1e-5)
    for block in (False, True):
        chain = (logits, logits[1:] * 0.9, tokens, positions)
        assert_equal(
            verify_rejection(*chain, block=block, **options), reference.verify_rejection(*chain, block=block, **options)
        )


@pytest.mark.parametrize("vocabulary", [100, 8193])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_temperatures_at_the_ends(temperature, vocabulary):
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    logits[1, ::2] = -torch.inf
    if temperature < 1:
        logits *= 0.3
    for filters in FILTERS if vocabulary < 1000 else FILTERS[1:4]:
        assert_the_references_draws(logits, temperature=temperature, **filters)


@pytest.mark.parametrize("vocabulary", [100, 8193])
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-38, 3e-36, 1e-30, 1e10, 1e36], ids=str)
def test_logits_at_the_ends(size, vocabulary):
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * size
    logits[1] -= 0.5
    for filters in FILTERS if vocabulary < 1000 else FILTERS[1:4]:
        assert_the_references_draws(logits, temperature=1.0, **filters)


@pytest.mark.parametrize("filters", FILTERS[1:], ids=str)
def test_a_range_from_the_lowest_to_the_largest_float(filters):
    logits = torch.linspace(-1, 1, 3000).repeat(2, 1) * 3.4e38
    logits[1] = logits[1].flip(0)
    assert_the_references_draws(
        logits[:, torch.randperm(3000, generator=torch.Generator().manual_seed(0))], temperature=1.0, **filters
    )


@on_cpu
@pytest.mark.parametrize(
    ("temperature", "came"),
    [(1e-39, "1e-39"), (5e-324, "4.94065646e-324"), (1.01e38, "1.01e+38"), (1e300, "1e\\+300"), (-1.0, "-1")],
)
def test_temperatures_that_float32_has_no_inverse_of_are_refused(temperature, came):
    logits, rows = torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64)
    line = f"^temperature: expected 0 or a number from 1e-38 to 1e38, got {came}".replace("e+", r"e\+")
    with pytest.raises(ValueError, match=line):
        verify(logits, rows, rows - 1, rows, temperature=temperature)
    with pytest.raises(ValueError, match=line):
        draft_sample(logits, rows, 1, temperature=temperature)
    with pytest.raises(ValueError, match=line):
        verify_rejection(logits, logits[:0], rows, rows, temperature=temperature)


# ---- Attention

CAPS = [1e-38, 1e-20, 1e-3, 0.3, 3.0, 50.0, 1e3, 1e4, 1e6, 4e9, 1e15, 1e30, 1e38, 3e38, 1e300, torch.inf]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("softcap", CAPS)
def test_a_soft_cap_keeps_the_score(softcap, dtype):
    query, keys, values = random_inputs(3, 70, dtype=dtype)
    for factor in (1, 8):
        actual = tree_attention(query * factor, keys, values, 70, softcap=softcap)
        expected = reference.tree_attention(query * factor, keys, values, 70, softcap=softcap)
        tolerance = TOLERANCE[dtype] if dtype != torch.float32 else 4e-6
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    if softcap >= 1e15:
        without = tree_attention(query * factor, keys, values, 70)
        torch.testing.assert_close(actual, without, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [0.0, -0.0, -0.5, 1e-40, 5e-324, 1e-20, 30.0])
@pytest.mark.parametrize("softcap", [None, 2.0, 1e9])
def test_scales_at_the_ends(scale, softcap):
    inputs = random_inputs(3, 70)
    actual = tree_attention(*inputs, 70, scale=scale, softcap=softcap)
    expected = reference.tree_attention(*inputs, 70, scale=scale, softcap=softcap)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("size", "key", "scale"), [(3.38e38, 0.0, 1.0), (3.38e38, 0.0, 1e30), (1e33, 1e-37, 1e6)])
def test_a_query_that_overflows_with_its_scale_alone(size, key, scale, dtype):
    """Where neither its products nor the scores do."""
    query, keys, values = random_inputs(3, 70, dtype=dtype)
    query, keys = torch.full_like(query, size), torch.full_like(keys, key)
    actual = tree_attention(query, keys, values, 70, scale=scale)
    expected = reference.tree_attention(query, keys, values, 70, scale=scale)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_windows_as_large_as_integers_go():
    inputs = random_inputs(3, 70)
    expected = tree_attention(*inputs, 70)
    for window in (73, 2**31, 2**62, 2**63 - 1):
        assert torch.equal(tree_attention(*inputs, 70, sliding_window=window), expected)
