"""packed_linear: products over packed weights with the very bits of `linear`."""

import itertools

import pytest
import torch
from bfloat16_weights import SHAPES, bits, make
from torch import Tensor

import specbranch_ext
from specbranch_ext import PackedWeight, linear, pack_weight, packed_linear, reference


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
    nothing, bias = pack_weight(torch.empty(4, 0, dtype=torch.bfloat16)), torch.randn(4).bfloat16()
    for rows in (1, 9, 20, 40):
        assert torch.equal(packed_linear(input[:1, :0].expand(rows, 0), nothing, bias), bias.expand(rows, 4))


def bad_calls() -> dict[str, object]:
    weight = torch.zeros(4, 33, dtype=torch.bfloat16)
    packed, x = pack_weight(weight), torch.zeros(2, 33, dtype=torch.bfloat16)
    short = PackedWeight(packed.data[:100].clone(), (4, 33), "lossless")
    crooked = PackedWeight(torch.zeros(packed.nbytes + 8, dtype=torch.uint8)[8:], (4, 33), "lossless")
    return {
        "input: expected bfloat16, got float32": lambda: packed_linear(x.float(), packed),
        r"input: expected shape \[..., 33\]": lambda: packed_linear(x[:, :7], packed),
        r"bias: expected shape \[out\]": lambda: packed_linear(x, packed, x[0]),
        "packed: expected at least": lambda: packed_linear(x, short),
        "packed: expected memory aligned to 64 bytes": lambda: packed_linear(x, crooked),
    }


@pytest.mark.parametrize("message", bad_calls())
def test_bad_input(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad_calls()[message]()  # type: ignore[operator]


def test_registration() -> None:
    packed = pack_weight(make(12, 40).nan_to_num(0, 0, 0))
    input = torch.randn(5, 40).bfloat16()
    torch.library.opcheck(
        torch.ops.specbranch.packed_linear.default, (input, packed.data, "lossless", "exact", 12, None)
    )


def test_compile() -> None:
    packed, input = pack_weight(make(9, 30).nan_to_num(0, 0, 0)), torch.randn(4, 30).bfloat16()

    def twice(x: Tensor) -> Tensor:
        return specbranch_ext.packed_linear(x, packed) * 2

    compiled = torch.compile(twice, fullgraph=True, backend="eager")
    assert torch.equal(compiled(input), twice(input))
