"""Temperature, top-k, top-p and min-p from memory: to the bit what the same numbers give, read when the kernel runs."""

from typing import Any

import pytest
import torch
from filters import FILTERS, in_memory
from implementations import NAMES, on_cpu
from torch import Tensor

from specbranch_ext import draft_sample, reference, verify

pytestmark = pytest.mark.usefixtures("implementation")

# Where the bits of a derived number could differ: quotients and square roots that are rounded, thresholds at the end.
ODD: list[dict[str, Any]] = [
    {"temperature": 0.3, "top_k": 1},
    {"temperature": 1.1, "top_k": 4999, "top_p": 0.999},
    {"temperature": 0.9, "top_k": 2**40},
    {"temperature": 1e-3, "top_p": 0.01},
    {"temperature": 3.0, "min_p": 1.0},
    {"temperature": 0.7, "min_p": 1e-7},
    {"temperature": 1e-38},
    {"top_k": 7, "top_p": 0.5, "min_p": 0.5},  # temperature 0: not applied
]
BAD = {
    "temperature": (-1.0, torch.nan, torch.inf, 1e-39, 1e39),
    "top_k": (-1.0, 2.5, torch.nan, torch.inf),
    "top_p": (0.0, 1.5, -0.5, torch.nan),
    "min_p": (-0.1, 1.1, torch.nan),
}


def rows_of(n: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = torch.randn(n, vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * 2
    tokens = logits.argmax(dim=1).roll(1)  # at a low temperature a part of the chain is accepted
    return logits.to(dtype), tokens, torch.arange(n) - 1, torch.arange(n) + 1000


def assert_equal(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b), f"{a} instead of {b}"


@pytest.mark.parametrize("options", [*FILTERS, *ODD], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [1, 7, 1001, 5000, 16_403])
def test_equal_to_numbers(options, dtype, vocabulary):
    logits, tokens, parents, positions = rows_of(3, vocabulary, dtype)
    if options.get("temperature") == 1e-38:
        logits *= 0.1  # or it overflows
    filters = in_memory(options)
    verification = verify(logits, tokens, parents, positions, seed=3, filters=filters)
    assert_equal(verification, verify(logits, tokens, parents, positions, seed=3, **options))
    assert_equal(verification, reference.verify(logits, tokens, parents, positions, seed=3, filters=filters))
    for k in {1, min(vocabulary, 5)}:
        sample = draft_sample(logits, positions, k, seed=3, filters=filters)
        assert_equal(sample, draft_sample(logits, positions, k, seed=3, **options))
        assert_equal(sample[:2], reference.draft_sample(logits, positions, k, seed=3, filters=filters)[:2])


@pytest.mark.parametrize(("n", "vocabulary"), [(1, 40_000), (67, 500)])
def test_other_shapes_and_one_call_after_another(n, vocabulary):
    """As a captured graph has it: the same tensors in all calls, filled anew in between."""
    logits, tokens, parents, positions = rows_of(n, vocabulary)
    filters = torch.empty(9, dtype=torch.float64)[5:]
    for options in (FILTERS[8], {}, FILTERS[1], FILTERS[3], {}, {}, FILTERS[2], FILTERS[5], ODD[7], FILTERS[6]):
        filters.copy_(in_memory(options))
        verdict = verify(logits, tokens, parents, positions, seed=1, filters=filters)
        assert_equal(verdict, verify(logits, tokens, parents, positions, seed=1, **options))
        sample = draft_sample(logits, positions, 4, seed=1, filters=filters)
        assert_equal(sample, draft_sample(logits, positions, 4, seed=1, **options))


@on_cpu  # the module that is built, on the device itself
@pytest.mark.cuda
def test_a_captured_graph_takes_the_filters_of_each_replay():
    logits, tokens, parents, positions = (part.cuda() for part in rows_of(9, 20_000))
    filters, seed = in_memory({}).cuda(), torch.tensor(5, device="cuda")

    def step(**options):
        return (
            *verify(logits, tokens, parents, positions, seed=seed, **options),
            *draft_sample(logits, positions, 4, seed=seed, **options),
        )

    step(filters=filters)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(filters=filters)
    for options in (*FILTERS, *ODD[:6], {}):
        filters.copy_(in_memory(options))
        graph.replay()
        assert_equal(captured, step(**options))
    with pytest.raises(ValueError, match=r"^filters: expected a tensor on CUDA device 0"):
        step(filters=in_memory({}))


@pytest.mark.parametrize("options", [{}, FILTERS[1], FILTERS[4]], ids=str)
def test_rows_of_unused_nodes_may_hold_anything(options):
    logits, tokens, parents, positions = rows_of(5, 3000)
    parents[3] = -1
    logits[3] = torch.nan
    ours = verify(logits, tokens, parents, positions, filters=in_memory(options))
    assert_equal(ours, reference.verify(logits, tokens, parents, positions, **options))
    assert ours.target_tokens[3] == -1


@on_cpu
@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD for value in BAD[name]])
def test_the_cpu_names_a_value_that_is_out_of_range(name, value):
    logits, tokens, parents, positions = rows_of(2, 9)
    filters = in_memory({"temperature": 1.0, name: value})
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        verify(logits, tokens, parents, positions, filters=filters)
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        draft_sample(logits, positions, 2, filters=filters)


@pytest.mark.parametrize("implementation", NAMES[1:], indirect=True, scope="module")
@pytest.mark.parametrize("vocabulary", [9, 9000])
@pytest.mark.parametrize(("name", "value"), [(name, value) for name in BAD for value in BAD[name]])
def test_a_device_can_sample_no_row_when_a_value_is_out_of_range(name, value, vocabulary):
    logits, tokens, parents, positions = rows_of(3, vocabulary)
    filters = in_memory({"temperature": 0.8, "top_k": 5, "top_p": 0.5, name: value})
    result = verify(logits, tokens, parents, positions, filters=filters)
    assert result.target_tokens.tolist() == result.path.tolist() == [-1] * 3
    assert (result.accepted, result.next_token) == (0, -1)
    sample = draft_sample(logits, positions, 2, filters=filters)
    assert sample.tokens.tolist() == [[-1] * 2] * 3
    assert sample.scores.tolist() == [[-torch.inf] * 2] * 3
    assert not sample.confidence.any()
    assert sample.entropy.isnan().all()


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_numbers_beside_the_tensor_are_refused(options):
    logits, tokens, parents, positions = rows_of(2, 9)
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name}: expected no number beside filters"):
        verify(logits, tokens, parents, positions, filters=in_memory({}), **options)
    with pytest.raises(ValueError, match=f"^{name}: expected no number beside filters"):
        draft_sample(logits, positions, 2, filters=in_memory({}), **options)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (torch.zeros(4), "filters: expected float64, got float32"),
        (torch.zeros(0, dtype=torch.float64), r"filters: expected shape \[4\]"),
        (torch.zeros(1, 4, dtype=torch.float64), r"filters: expected shape \[n, 4\] = \[2, 4\], got \[1, 4\]"),
        (torch.zeros(2, 3, dtype=torch.float64), r"filters: expected shape \[n, 4\] = \[2, 4\], got \[2, 3\]"),
        (torch.zeros(2, 8, dtype=torch.float64)[:, ::2], "filters: expected a contiguous"),
        (torch.zeros(8, dtype=torch.float64)[::2], "filters: expected a contiguous"),
    ],
)
def test_a_tensor_of_another_kind_is_refused(filters, message):
    logits, tokens, parents, positions = rows_of(2, 9)
    with pytest.raises(ValueError, match=f"^{message}"):
        verify(logits, tokens, parents, positions, filters=filters)
    with pytest.raises(ValueError, match=f"^{message}"):
        draft_sample(logits, positions, 2, filters=filters)


def test_opcheck():
    logits, tokens, parents, positions = rows_of(3, 40)
    numbers = (0.0, 0, 1.0, 0.0)
    filters, seed = in_memory({"temperature": 1.0, "top_k": 10, "top_p": 0.9}), torch.tensor(3)
    to_verify = (logits, tokens, parents, positions, seed, *numbers, filters)
    torch.library.opcheck(torch.ops.specbranch.verify.default, to_verify)
    to_sample = (logits, positions, 3, seed, *numbers, filters)
    torch.library.opcheck(torch.ops.specbranch.draft_sample.default, to_sample)


def test_torch_compile():
    def decode(logits, tokens, parents, positions, filters):
        result = verify(logits * 2, tokens, parents, positions, filters=filters)
        return result.target_tokens + 1, draft_sample(logits, positions, 2, filters=filters).tokens

    compiled = torch.compile(decode, backend="aot_eager", fullgraph=True)
    for options in (FILTERS[1], {}):
        arguments = (*rows_of(3, 40), in_memory(options))
        assert_equal(compiled(*arguments), decode(*arguments))
