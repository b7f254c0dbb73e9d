"""rms_norm against the modules of transformers in plain torch, and to the bit against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import on_cpu
from torch import Tensor

from specbranch_ext import reference, rms_norm

pytestmark = pytest.mark.usefixtures("implementation")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = [(False, True), (True, False), (False, False), (True, True)]
"""unit_offset, round_first: Llama, Gemma, OLMo 2, and the one that is left."""
SIZES = [
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    17,
    31,
    64,
    65,
    96,
    128,
    129,
    255,
    256,
    257,
    300,
    512,
    896,
    1023,
    1024,
    1025,
    1536,
    5000,
]


@pytest.fixture
def threads():
    """Sets torch's thread count; the old one comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def module(x: Tensor, weight: Tensor, eps: float, unit_offset: bool, round_first: bool) -> Tensor:
    """LlamaRMSNorm, GemmaRMSNorm and Olmo2RMSNorm of transformers."""
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if round_first and not unit_offset:
        return weight * normed.to(x.dtype)
    if round_first:
        normed = normed.to(x.dtype).float()
    factor = 1.0 + weight.float() if unit_offset else weight.float()
    return (normed * factor).to(x.dtype)


def assert_same_bits(ours: Tensor, expected: Tensor) -> None:
    """NaN counts as NaN."""
    bits = {4: torch.int32, 2: torch.int16}[ours.element_size()]
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.view(bits)[~ours.isnan()], expected.view(bits)[~ours.isnan()])


def check(x: Tensor, weight: Tensor, residual: Tensor | None, **options) -> Tensor:
    output, total = rms_norm(x, weight, residual, **options)
    expected, expected_total = reference.rms_norm(x, weight, residual, **options)
    assert_same_bits(output, expected)
    assert_same_bits(total, expected_total)
    assert output.is_contiguous()
    assert total.is_contiguous()
    return output


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_bits_of_the_reference_and_values_of_the_modules(data):
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    leading = data.draw(st.lists(st.integers(1, 4), max_size=4))
    size = data.draw(st.sampled_from(SIZES) | st.integers(1, 600))
    dtype = data.draw(st.sampled_from(DTYPES))
    unit_offset, round_first = data.draw(st.sampled_from(FORMS))
    scale = data.draw(st.sampled_from([1.0, 1e-3, 100.0]))
    eps = data.draw(st.sampled_from([1e-6, 1e-5, 0.1]))
    x, residual = (torch.randn(2, *leading, size) * scale).to(dtype)
    weight = torch.randn(size).to(dtype)
    options = {"eps": eps, "unit_offset": unit_offset, "round_first": round_first}
    for other in (None, residual):
        output = check(x, weight, other, **options)
        expected = module(x if other is None else other + x, weight, eps, unit_offset, round_first)
        # The module's sum and root are off by float32 roundings, which may turn a rounding to the dtype.
        tolerance = torch.finfo(dtype).eps * (2 if round_first else 1) + 2e-6
        torch.testing.assert_close(output, expected, rtol=tolerance, atol=torch.finfo(dtype).smallest_normal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_sizes_at_vector_and_block_boundaries(dtype, size):
    torch.manual_seed(size)
    for rows in (1, 5):
        x, residual = torch.randn(2, rows, size).to(dtype)
        weight = torch.randn(size).to(dtype)
        for unit_offset, round_first in FORMS:
            check(x, weight, residual, unit_offset=unit_offset, round_first=round_first)
            check(x, weight, None, unit_offset=unit_offset, round_first=round_first)


def test_the_sum_is_the_next_residual_and_nothing_without_one():
    x, residual = torch.randn(2, 3, 40).bfloat16()
    result = rms_norm(x, torch.ones(40).bfloat16(), residual)
    assert torch.equal(result.sum, residual + x)
    assert torch.equal(result.output, rms_norm(result.sum, torch.ones(40).bfloat16()).output)
    alone = rms_norm(x, torch.ones(40).bfloat16())
    assert alone.sum.shape == (0,)
    assert alone.sum.dtype == x.dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 128, 200, 1536, 2051])
def test_rows_are_bitwise_independent(dtype, size, threads):
    x, residual = torch.randn(2, 67, size).to(dtype)  # enough for several threads from 1536 on
    weight = torch.randn(size).to(dtype)
    threads(1)
    alone = [rms_norm(x[i : i + 1], weight, residual[i : i + 1]) for i in range(67)]
    output, total = (torch.cat(parts) for parts in zip(*alone, strict=True))
    order = torch.randperm(67)
    for count in (1, 3):
        threads(count)
        for rows in (slice(0, 67), slice(3, 67), slice(20, 31), order):
            result = rms_norm(x[rows], weight, residual[rows])
            assert torch.equal(result.output, output[rows])
            assert torch.equal(result.sum, total[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_and_leading_dimensions(dtype):
    x, residual = torch.randn(2, 24, 80).to(dtype)
    weight = torch.randn(80).to(dtype)
    expected = rms_norm(x, weight, residual)
    for shape in [(24,), (2, 12), (2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 2, 2)]:
        result = rms_norm(x.view(*shape, 80), weight, residual.view(*shape, 80))
        assert torch.equal(result.output, expected.output.view(*shape, 80))
        assert torch.equal(result.sum, expected.sum.view(*shape, 80))
    assert torch.equal(rms_norm(x[3], weight, residual[3]).output, expected.output[3])
    wide = torch.full((24, 100), float("nan"), dtype=dtype)
    wide[:, 7:87] = x
    apart = residual.T.contiguous().T
    shifted = torch.cat([weight[:1], weight])[1:]  # not at an address of whole vectors
    for one, other in ((wide[:, 7:87], apart), (apart.clone().copy_(x), wide[:, 7:87].clone().copy_(residual))):
        result = rms_norm(one, shifted, other)
        assert torch.equal(result.output, expected.output)
        assert torch.equal(result.sum, expected.sum)
        assert result.output.is_contiguous()
    expanded = x[:1].expand(5, 80)
    assert torch.equal(rms_norm(expanded, weight).output, rms_norm(x[:1], weight).output.expand(5, 80))


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_stay_and_results_have_memory_of_their_own(dtype):
    x, residual = torch.randn(2, 3, 300).to(dtype)
    weight = torch.randn(300).to(dtype)
    before = [tensor.clone() for tensor in (x, weight, residual)]
    results = [*rms_norm(x, weight, residual), *rms_norm(x, weight)]
    assert all(torch.equal(a, b) for a, b in zip((x, weight, residual), before, strict=True))
    places = {tensor.untyped_storage().data_ptr() for tensor in (x, weight, residual)}
    assert not places & {result.untyped_storage().data_ptr() for result in results}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("unit_offset", "round_first"), FORMS)
def test_extreme_values(dtype, unit_offset, round_first):
    info = torch.finfo(dtype)
    rows = [
        [0.0, -0.0, 0.0, 0.0],
        [info.max, -info.max, 1.0, 0.0],
        [info.smallest_normal, info.smallest_normal / 4, -info.smallest_normal / 2, 0.0],
        [float("inf"), 1.0, -1.0, 0.0],
        [float("nan"), 1.0, -1.0, 0.0],
        [1.0, 2.0, -3.0, 0.5],
    ]
    x = torch.tensor(rows).to(dtype)
    for width in (4, 64, 300):
        wide = x.repeat(1, width // 4)
        weight = torch.linspace(-2, 2, width).to(dtype)
        for eps in (0.0, 1e-6, 3e38):
            for residual in (None, wide, wide.flip(0)):
                options = {"eps": eps, "unit_offset": unit_offset, "round_first": round_first}
                output = check(wide, weight, residual, **options)
                if residual is None:
                    assert_same_bits(output[5:], rms_norm(wide[5:], weight, **options).output)


def test_empty():
    for shape in [(0, 8), (3, 0), (0,), (2, 0, 5)]:
        x = torch.empty(shape)
        weight = torch.ones(shape[-1])
        assert rms_norm(x, weight).output.shape == shape
        assert rms_norm(x, weight).sum.shape == (0,)
        assert rms_norm(x, weight, x).sum.shape == shape


def bad_inputs():
    x, w = torch.randn(2, 6), torch.randn(6)
    return {
        r"input: expected shape \[\.\.\., H\], got float32 of shape \[\]": (torch.tensor(1.0), w, None),
        "input: expected float32, bfloat16 or float16, got float64": (x.double(), w.double(), None),
        "input: expected float32, bfloat16 or float16, got int64": (x.long(), w.long(), None),
        r"weight: expected shape \[H\] = \[6\], got \[5\]": (x, w[:5], None),
        r"weight: expected shape \[H\] = \[6\], got \[1, 6\]": (x, w[None], None),
        "weight: expected float32, got bfloat16": (x, w.bfloat16(), None),
        "weight: expected a contiguous tensor": (x, torch.randn(12)[::2], None),
        r"residual: expected the input's shape \[2, 6\], got float32 of shape \[1, 6\]": (x, w, x[:1]),
        "residual: expected float32, got float16": (x, w, x.half()),
        "weight: expected a tensor on cpu": (x, w.to("meta"), None),
        "residual: expected a tensor on cpu": (x, w, x.to("meta")),
    }


@on_cpu
@pytest.mark.parametrize("message", bad_inputs())
def test_bad_input(message):
    with pytest.raises(ValueError, match=message):
        rms_norm(*bad_inputs()[message])


@on_cpu
@pytest.mark.parametrize("eps", [-1e-6, float("nan"), float("inf"), 1e39])
def test_bad_eps(eps):
    with pytest.raises(ValueError, match="eps: expected a finite float32 of at least 0, got"):
        rms_norm(torch.ones(2, 3), torch.ones(3), eps=eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(dtype):
    x, weight = torch.randn(2, 5, 24).to(dtype), torch.randn(24).to(dtype)
    for arguments in [
        (x, weight, None, 1e-6, False, True),
        (x.transpose(0, 1), weight, x.transpose(0, 1), 0.0, True, False),
    ]:
        torch.library.opcheck(torch.ops.specbranch.rms_norm.default, arguments)
