"""pack_weight and unpack_rows: the very values in fewer bytes, and back."""

import pytest
import torch
from bfloat16_weights import SHAPES, bits, make
from hypothesis import given, settings
from hypothesis import strategies as st

from specbranch_ext import pack_weight, reference, unpack_rows


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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


def test_no_rows_and_strides() -> None:
    weight = make(12, 70)
    packed = pack_weight(torch.cat([weight, weight], 1)[:, :70])
    assert torch.equal(packed.data, pack_weight(weight).data)
    assert unpack_rows(packed, torch.empty(0, dtype=torch.int64)).shape == (0, 70)


def bad_calls() -> dict[str, object]:
    weight = torch.zeros(4, 33, dtype=torch.bfloat16)
    packed = pack_weight(weight)
    return {
        "weight: expected bfloat16, got float32": lambda: pack_weight(weight.float()),
        r"weight: expected shape \[out, in\]": lambda: pack_weight(weight[0]),
        "weight: expected stride 1": lambda: pack_weight(weight.T),
        "format: expected lossless, got 'q8_0'": lambda: pack_weight(weight, "q8_0"),
        "rows: expected numbers from 0 to 3, got 4": lambda: unpack_rows(packed, torch.tensor([1, 4])),
        "rows: expected int64": lambda: unpack_rows(packed, torch.tensor([1], dtype=torch.int32)),
    }


@pytest.mark.parametrize("message", bad_calls())
def test_bad_input(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad_calls()[message]()  # type: ignore[operator]


def test_registration() -> None:
    packed = pack_weight(make(12, 40))
    torch.library.opcheck(
        torch.ops.specbranch.unpack_rows.default, (packed.data, "lossless", "exact", 12, 40, torch.tensor([3, 1]))
    )


@pytest.mark.parametrize("sizes", [(8, 4, 3), (12, 3), (0, 15), (15,), (4, 4, 4, 3)])
@pytest.mark.parametrize("close", [True, False])
def test_parts_of_a_packed_weight_are_packed_weights(sizes: tuple[int, ...], close: bool) -> None:
    weight = make(sum(sizes), 100)
    if close:
        weight = (torch.randn(sum(sizes), 100) * 0.02).bfloat16()
    packed = pack_weight(weight)
    for part, expected in zip(packed.split(sizes), weight.split(sizes), strict=True):
        assert part.data.untyped_storage().data_ptr() == packed.data.untyped_storage().data_ptr()
        assert part.shape == tuple(expected.shape)
        rows = torch.arange(len(expected))
        assert torch.equal(bits(unpack_rows(part, rows)), bits(expected))
        assert torch.equal(bits(reference.unpack_rows(part, rows)), bits(expected))


@pytest.mark.parametrize("sizes", [(5, 10), (8, 8), (-4, 19), (12,)])
def test_parts_that_there_are_not(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="sizes: expected multiples of 4 and a rest, 15 together, got "):
        pack_weight(make(15, 64)).split(sizes)
