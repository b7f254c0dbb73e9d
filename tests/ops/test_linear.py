"""linear: right values, and rows that do not notice each other, not even in the last bit."""

import itertools

import pytest
import torch
from torch import Tensor

import specbranch_ext
from specbranch_ext import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# In units of the output's last place: the final rounding takes 0.5 (float32 sums add their own error, below).
EPSILON = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """Sets torch's thread count; the old one comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make(rows: int, size_in: int, size_out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(rows, size_in).to(dtype),
        (torch.randn(size_out, size_in) / max(size_in, 1) ** 0.5).to(dtype),
        torch.randn(size_out).to(dtype),
    )


def assert_close(actual: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    exact = input.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    # The error of a float32 sum of n products, added in at least 4 lanes, grows with sum |x w|.
    magnitude = input.double().abs() @ weight.double().abs().T + exact.abs()
    bound = magnitude * (weight.shape[1] / 4 + 8) * 2.0**-24 + exact.abs() * EPSILON[actual.dtype] + 2.0**-24
    error = (actual.double() - exact).abs()
    assert (error <= bound).all(), (error - bound).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size_in", "size_out"),
    [(1, 1), (3, 5), (7, 9), (8, 8), (16, 64), (33, 31), (63, 66), (896, 131), (1537, 70), (2048, 40), (4100, 19)],
)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 13, 70])
def test_values(dtype, size_in, size_out, rows):
    input, weight, bias = make(rows, size_in, size_out, dtype)
    for b in (None, bias):
        actual = specbranch_ext.linear(input, weight, b)
        assert actual.dtype == dtype
        assert actual.shape == (rows, size_out)
        assert_close(actual, input, weight, b)


def test_reference_is_the_float64_product():
    input, weight, bias = make(3, 40, 5, torch.float32)
    expected = torch.nn.functional.linear(input.double(), weight.double(), bias.double()).float()
    assert torch.equal(reference.linear(input, weight, bias), expected)


def test_more_rows_than_one_pass():
    input, weight, _ = make(500, 24, 40, torch.bfloat16)
    actual = specbranch_ext.linear(input, weight)
    assert_close(actual, input, weight, None)
    assert torch.equal(actual, torch.cat([specbranch_ext.linear(row[None], weight) for row in input]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size_in", "size_out"), [(5, 13), (100, 77), (1600, 150)])
def test_rows_are_bitwise_independent(dtype, size_in, size_out, threads):
    input, weight, bias = make(33, size_in, size_out, dtype)
    threads(1)
    alone = torch.cat([specbranch_ext.linear(input[i : i + 1], weight, bias) for i in range(33)])
    for rows, count in itertools.product(range(1, 34), (1, 2, 3)):
        threads(count)
        for begin in {0, (33 - rows) // 2, 33 - rows}:
            together = specbranch_ext.linear(input[begin : begin + rows], weight, bias)
            assert torch.equal(together, alone[begin : begin + rows]), (rows, begin, count)
    order = torch.randperm(33)
    assert torch.equal(specbranch_ext.linear(input[order], weight, bias), alone[order])


# One thread below 2**19 weights for up to 16 rows, and below 2**23 products for more; then all.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "size_in", "size_out"),
    [(1, 512, 1023), (1, 512, 1024), (6, 512, 1025), (17, 482, 1023), (17, 482, 1024), (32, 256, 1024)],
)
def test_bits_where_threads_begin_to_pay(rows, size_in, size_out, dtype, threads):
    input, weight, bias = make(rows, size_in, size_out, dtype)
    threads(1)
    expected = specbranch_ext.linear(input, weight, bias)
    for count in (2, 3):
        threads(count)
        assert torch.equal(specbranch_ext.linear(input, weight, bias), expected)


def test_a_bad_row_stays_alone():
    input, weight, _ = make(6, 50, 20, torch.float32)
    expected = specbranch_ext.linear(input, weight)
    input[2] = float("nan")
    actual = specbranch_ext.linear(input, weight)
    assert actual[2].isnan().all()
    keep = [0, 1, 3, 4, 5]
    assert torch.equal(actual[keep], expected[keep])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_what_lies_between_rows(dtype):
    input, weight, bias = make(9, 45, 21, dtype)
    wide_weight = torch.full((21, 64), float("nan"), dtype=dtype)
    wide_weight[:, 3:48] = weight
    wide_input = torch.full((9, 60), float("nan"), dtype=dtype)
    wide_input[:, 1:46] = input
    expected = specbranch_ext.linear(input, weight, bias)
    assert torch.equal(specbranch_ext.linear(wide_input[:, 1:46], wide_weight[:, 3:48], bias), expected)
    assert torch.equal(specbranch_ext.linear(input.T.contiguous().T, weight[:, :], bias), expected)
    every_other = torch.cat([weight, torch.full_like(weight, float("nan"))], 1).view(42, 45)[::2]
    assert torch.equal(specbranch_ext.linear(input, every_other, bias), expected)


def test_leading_dimensions():
    input, weight, bias = make(24, 10, 7, torch.float32)
    flat = specbranch_ext.linear(input, weight, bias)
    for shape in [(24,), (2, 12), (1, 2, 12), (2, 3, 1, 4), (1, 2, 3, 2, 2)]:
        assert torch.equal(specbranch_ext.linear(input.view(*shape, 10), weight, bias), flat.view(*shape, 7)), shape
    assert torch.equal(specbranch_ext.linear(input[3], weight, bias), flat[3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(dtype):
    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=dtype)

    bias = torch.randn(4).to(dtype)
    assert specbranch_ext.linear(empty(0, 3), empty(4, 3)).shape == (0, 4)
    assert specbranch_ext.linear(torch.randn(2, 3).to(dtype), empty(0, 3)).shape == (2, 0)
    for rows in (1, 2, 3, 20, 40):
        actual = specbranch_ext.linear(empty(rows, 0), empty(4, 0), bias)
        assert torch.equal(actual, bias.expand(rows, 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values(dtype):
    info = torch.finfo(dtype)
    values = torch.tensor(
        [0.0, -0.0, 1.0, info.max, -info.max, info.tiny, info.smallest_normal / 4, float("inf"), float("nan")]
    ).to(dtype)
    one = torch.ones(1, 1, dtype=dtype)
    expected = values[:, None] + 0.0
    if dtype == torch.bfloat16 and specbranch_ext.build_info()["isa"] in ("bf16", "amx"):
        expected[expected.abs() < info.smallest_normal] = 0  # so do these instructions count them
    assert torch.equal(specbranch_ext.linear(values[:, None], one).nan_to_num(7), expected.nan_to_num(7))
    # Sums beyond the largest finite value round to infinity as torch rounds them.
    large = torch.tensor([[info.max, info.max]]).to(dtype)
    total = specbranch_ext.linear(large, torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 2.0**-12]]).to(dtype))
    assert torch.equal(total[0], (large.double() @ torch.tensor([[1, 1, 1], [1, -1, 2.0**-12]]).double()).to(dtype)[0])


def bad_inputs():
    x, w, b = torch.randn(2, 3), torch.randn(4, 3), torch.randn(4)
    return {
        "input: expected shape": (x[:, :2], w, b),
        r"input: expected shape \[\.\.\., in\]": (torch.tensor(1.0), w, b),
        "input: expected float32, bfloat16 or float16": (x.double(), w.double(), b.double()),
        r"weight: expected shape \[out, in\]": (x, w[0], b),
        "weight: expected float32, got bfloat16": (x, w.bfloat16(), b),
        "weight: expected stride 1": (x, torch.randn(3, 4).T, b),
        "bias: expected float32, got float16": (x, w, b.half()),
        r"bias: expected shape \[out\]": (x, w, b[:3]),
        "bias: expected a contiguous": (x, w, torch.randn(8)[::2]),
        "weight: expected a tensor on cpu": (x, w.to("meta"), b),
        "bias: expected a tensor on cpu": (x, w, b.to("meta")),
    }


@pytest.mark.parametrize("message", bad_inputs())
def test_bad_input(message):
    with pytest.raises(ValueError, match=message):
        specbranch_ext.linear(*bad_inputs()[message])


def test_other_devices_go_to_torch():
    output = specbranch_ext.linear(torch.empty(2, 3, device="meta"), torch.empty(4, 3, device="meta"))
    assert output.device.type == "meta"
    assert output.shape == (2, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(dtype):
    input, weight, bias = make(5, 20, 12, dtype)
    for arguments in [(input, weight, bias), (input[None], weight, None)]:
        torch.library.opcheck(torch.ops.specbranch.linear.default, arguments)


def test_compile():
    input, weight, bias = make(4, 30, 9, torch.bfloat16)

    def twice(x: Tensor) -> Tensor:
        return specbranch_ext.linear(x, weight, bias) * 2

    compiled = torch.compile(twice, fullgraph=True, backend="eager")
    assert torch.equal(compiled(input), twice(input))
