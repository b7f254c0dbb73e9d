"""Packed weights: the very values in fewer bytes, and products with the very bits of `linear`."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import specbranch_ext
from specbranch_ext import PackedWeight, linear, pack_weight, packed_linear, reference, unpack_rows

SHAPES = [(1, 1), (3, 5), (4, 32), (5, 33), (7, 540), (64, 512), (66, 63), (131, 896), (19, 4100)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.int16)


def make(size_out: int, size_in: int) -> Tensor:
    """Weights of all kinds: runs of close exponents, and runs that no 4 bits can tell apart."""
    weight = torch.randn(size_out, size_in) * 0.02
    weight[:, ::37] *= torch.randn(weight[:, ::37].shape).mul(30).exp2()
    weight[size_out // 2] = 0
    flat = weight.flatten()
    odd = [float("inf"), float("-inf"), float("nan"), -0.0, 1e-39, -3e38]
    flat[torch.randperm(len(flat))[: len(odd)]] = torch.tensor(odd)[: len(flat)]
    return flat.view(size_out, size_in).bfloat16()


@pytest.mark.parametrize(("size_out", "size_in"), SHAPES)
def test_weights_come_back_as_they_were(size_out: int, size_in: int) -> None:
    weight = make(size_out, size_in)
    packed = pack_weight(weight)
    assert packed.shape == (size_out, size_in)
    rows = torch.randint(0, size_out, (2 * size_out,))
    assert torch.equal(bits(unpack_rows(packed, rows)), bits(weight[rows]))
    assert torch.equal(bits(reference.unpack_rows(packed, rows)), bits(weight[rows]))
    assert torch.equal(packed.data, reference.pack_weight(weight).data)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=200),
    size_in=st.integers(1, 70),
    close=st.booleans(),
)
def test_any_bits_come_back(values: list[int], size_in: int, close: bool) -> None:
    numbers = torch.tensor(values)
    if close:  # runs that are packed
        numbers = numbers & 0x87FF | 0x3800
    signed = torch.where(numbers >= 1 << 15, numbers - (1 << 16), numbers).to(torch.int16)
    weight = signed.repeat(size_in).view(-1, size_in).view(torch.bfloat16)
    packed = pack_weight(weight)
    assert torch.equal(packed.data, reference.pack_weight(weight).data)
    assert torch.equal(bits(unpack_rows(packed, torch.arange(len(weight)))), bits(weight))


def test_a_trained_layers_weights_take_three_quarters() -> None:
    weight = (torch.randn(896, 896) * 0.02).bfloat16()
    assert pack_weight(weight).nbytes / weight.nbytes < 0.79


@pytest.mark.parametrize(("size_out", "size_in"), SHAPES)
def test_products_have_the_bits_of_linear(size_out: int, size_in: int) -> None:
    weight = make(size_out, size_in)
    weight[~weight.isfinite()] = 1e30
    packed, bias = pack_weight(weight), torch.randn(size_out).bfloat16()
    input = torch.randn(300, size_in).bfloat16()
    before = torch.get_num_threads()
    try:
        for rows, threads in itertools.product((1, 2, 3, 5, 6, 7, 8, 9, 13, 16, 17, 40, 300), (1, 3)):
            torch.set_num_threads(threads)
            for b in (None, bias):
                ours = packed_linear(input[:rows], packed, b)
                assert torch.equal(bits(ours), bits(linear(input[:rows], weight, b))), (rows, threads)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(
        packed_linear(input[:3], packed, bias), reference.packed_linear(input[:3], packed, bias), rtol=0.02, atol=0.02
    )


def test_leading_dimensions_and_strides() -> None:
    weight = make(12, 70).nan_to_num(0, 0, 0)
    input = torch.randn(6, 140).bfloat16()[:, ::2]
    expected = linear(input, weight)
    packed = pack_weight(torch.cat([weight, weight], 1)[:, :70])
    for shape in [(6,), (2, 3), (1, 2, 3), (1, 2, 1, 3)]:
        assert torch.equal(packed_linear(input.reshape(*shape, 70), packed), expected.view(*shape, 12))
    assert packed_linear(input[:0], packed).shape == (0, 12)
    assert unpack_rows(packed, torch.empty(0, dtype=torch.int64)).shape == (0, 70)
    nothing, bias = pack_weight(torch.empty(4, 0, dtype=torch.bfloat16)), torch.randn(4).bfloat16()
    for rows in (1, 9, 20, 40):
        assert torch.equal(packed_linear(input[:1, :0].expand(rows, 0), nothing, bias), bias.expand(rows, 4))


def bad_calls() -> dict[str, object]:
    weight = torch.zeros(4, 33, dtype=torch.bfloat16)
    packed, x = pack_weight(weight), torch.zeros(2, 33, dtype=torch.bfloat16)
    short = PackedWeight(packed.data[:100].clone(), (4, 33), "lossless")
    crooked = PackedWeight(torch.zeros(packed.nbytes + 8, dtype=torch.uint8)[8:], (4, 33), "lossless")
    return {
        "weight: expected bfloat16, got float32": lambda: pack_weight(weight.float()),
        r"weight: expected shape \[out, in\]": lambda: pack_weight(weight[0]),
        "weight: expected stride 1": lambda: pack_weight(weight.T),
        "format: expected one of lossless, got 'int3'": lambda: pack_weight(weight, "int3"),
        "input: expected bfloat16, got float32": lambda: packed_linear(x.float(), packed),
        r"input: expected shape \[..., 33\]": lambda: packed_linear(x[:, :7], packed),
        r"bias: expected shape \[out\]": lambda: packed_linear(x, packed, x[0]),
        "packed: expected at least": lambda: packed_linear(x, short),
        "packed: expected memory aligned to 64 bytes": lambda: packed_linear(x, crooked),
        "rows: expected numbers from 0 to 3, got 4": lambda: unpack_rows(packed, torch.tensor([1, 4])),
        "rows: expected int64": lambda: unpack_rows(packed, torch.tensor([1], dtype=torch.int32)),
    }


@pytest.mark.parametrize("message", bad_calls())
def test_bad_input(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad_calls()[message]()  # type: ignore[operator]


def test_registration() -> None:
    packed = pack_weight(make(12, 40).nan_to_num(0, 0, 0))
    input = torch.randn(5, 40).bfloat16()
    torch.library.opcheck(torch.ops.specbranch.packed_linear.default, (input, packed.data, "lossless", 12, None))
    torch.library.opcheck(
        torch.ops.specbranch.unpack_rows.default, (packed.data, "lossless", 12, 40, torch.tensor([3, 1]))
    )


def test_compile() -> None:
    packed, input = pack_weight(make(9, 30).nan_to_num(0, 0, 0)), torch.randn(4, 30).bfloat16()

    def twice(x: Tensor) -> Tensor:
        return specbranch_ext.packed_linear(x, packed) * 2

    compiled = torch.compile(twice, fullgraph=True, backend="eager")
    assert torch.equal(compiled(input), twice(input))
