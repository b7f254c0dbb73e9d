"""pack_blocks, and what is multiplied by and read of packed blocks: every format, in both arithmetics."""

import itertools
from collections.abc import Callable

import pytest
import torch
from bfloat16_weights import bits
from gguf_blocks import decoded, make_blocks
from torch import Tensor

import specbranch_ext
from specbranch_ext import PackedWeight, linear, pack_blocks, packed_linear, reference, unpack_rows
from specbranch_ext.packed import ARITHMETICS, BLOCKS
from specbranch_ext.reference.blocks import FORMATS

SHAPES = [(1, 256), (17, 512), (40, 1280)]
SHAPES_OF_32 = [(5, 32), (33, 96), (40, 896), (70, 544)]  # of formats whose blocks have 32 weights


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def cases() -> list[tuple[str, int, int]]:
    return [
        (format, *shape)
        for format in BLOCKS
        for shape in SHAPES + (SHAPES_OF_32 if FORMATS[format].weights == 32 else [])
    ]


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize(("format", "size_out", "size_in"), cases())
def test_weights_are_those_of_the_gguf_package(format: str, size_out: int, size_in: int, arithmetic: str) -> None:
    blocks = make_blocks(format, size_out, size_in)
    packed = pack_blocks(blocks, format, arithmetic)
    expected = decoded(blocks, format)
    rows = torch.randint(0, size_out, (size_out + 3,))
    assert packed.shape == (size_out, size_in)
    assert torch.equal(bits(unpack_rows(packed, rows)), bits(expected[rows]))
    assert torch.equal(bits(reference.unpack_rows(packed, rows)), bits(expected[rows]))
    assert torch.equal(packed.data, reference.pack_blocks(blocks, format, arithmetic).data)


def check_rows(input: Tensor, packed: PackedWeight, bias: Tensor, expect: Callable[[Tensor | None], Tensor]) -> None:
    """The first rows, however many and on however many threads, have the bits of `expect(bias)`, which has all."""
    before = torch.get_num_threads()
    try:
        for b in (None, bias):
            expected = expect(b)
            for rows, threads in [*itertools.product((1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17, 40), (1, 3)), (300, 2)]:
                torch.set_num_threads(threads)
                ours = packed_linear(input[:rows], packed, b)
                assert torch.equal(bits(ours), bits(expected[:rows])), (rows, threads)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("format", "size_out", "size_in"), cases())
def test_exact_products_have_the_bits_of_linear(format: str, size_out: int, size_in: int) -> None:
    blocks = make_blocks(format, size_out, size_in)
    weight = decoded(blocks, format)
    input, bias = torch.randn(300, size_in).bfloat16(), torch.randn(size_out).bfloat16()
    check_rows(input, pack_blocks(blocks, format), bias, lambda b: linear(input, weight, b))


@pytest.mark.parametrize(("format", "size_out", "size_in"), cases())
def test_fast_products_have_the_bits_of_the_reference(format: str, size_out: int, size_in: int) -> None:
    blocks = make_blocks(format, size_out, size_in)
    packed = pack_blocks(blocks, format, "fast")
    input, bias = torch.randn(300, size_in).bfloat16(), torch.randn(size_out).bfloat16()
    input[3, : size_in // 2] = 0
    input[5] *= 1e-35
    check_rows(input, packed, bias, lambda b: reference.packed_linear(input, packed, b))


@pytest.mark.parametrize("format", BLOCKS)
def test_fast_products_are_near_exact_ones(format: str) -> None:
    blocks = make_blocks(format, 256, 1536)
    input = torch.randn(20, 1536).bfloat16()
    fast = packed_linear(input, pack_blocks(blocks, format, "fast")).float()
    exact = packed_linear(input, pack_blocks(blocks, format)).float()
    assert ((fast - exact).norm() / exact.norm()).item() < 0.01


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_what_is_not_finite_does_not_get_lost(arithmetic: str, odd: float) -> None:
    packed = pack_blocks(make_blocks("q4_k", 16, 512), "q4_k", arithmetic)
    input = torch.randn(5, 512).bfloat16()
    clean = packed_linear(input, packed)
    input[2, 77] = odd
    ours = packed_linear(input, packed)
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(ours[others], clean[others])
    assert not ours[2].isfinite().any()


def test_strides_and_no_rows() -> None:
    blocks = make_blocks("q6_k", 20, 512)
    twice = torch.cat([blocks, blocks], 1)
    packed = pack_blocks(twice[:, : blocks.shape[1]], "q6_k")
    assert torch.equal(packed.data, pack_blocks(blocks, "q6_k").data)
    assert packed_linear(torch.empty(0, 512).bfloat16(), packed).shape == (0, 20)
    assert pack_blocks(blocks[:0], "q6_k").shape == (0, 512)
    assert packed_linear(torch.ones(3, 512).bfloat16(), pack_blocks(blocks[:0], "q6_k", "fast")).shape == (3, 0)


@pytest.mark.parametrize("format", BLOCKS)
def test_packed_blocks_take_little_more_than_the_files(format: str) -> None:
    blocks = torch.zeros(1536, 1536 // FORMATS[format].weights * FORMATS[format].bytes, dtype=torch.uint8)
    for arithmetic in ARITHMETICS:
        assert pack_blocks(blocks, format, arithmetic).nbytes / blocks.nbytes < 1.04


def with_scale(format: str, value: float) -> Tensor:
    blocks = make_blocks(format, 4, 512)
    blocks[2, :2] = torch.tensor([value]).half().view(torch.uint8)
    return blocks


def bad_calls() -> dict[str, object]:
    blocks = make_blocks("q4_k", 4, 512)
    packed, x = pack_blocks(blocks, "q4_k"), torch.zeros(2, 512, dtype=torch.bfloat16)
    whole = PackedWeight(packed.data, (4, 500), "q4_k")
    return {
        "format: expected one of q8_0, .*, got 'q2_k'": lambda: pack_blocks(blocks, "q2_k"),
        "arithmetic: expected one of exact, fast, got 'exakt'": lambda: pack_blocks(blocks, "q4_k", "exakt"),
        r"blocks: expected shape \[out, bytes of a row\]": lambda: pack_blocks(blocks[0], "q4_k"),
        "blocks: expected uint8, got int64": lambda: pack_blocks(blocks.long(), "q4_k"),
        "blocks: expected rows of a multiple of 144 bytes, got 143": lambda: pack_blocks(blocks[:, :143], "q4_k"),
        "blocks: expected stride 1": lambda: pack_blocks(make_blocks("q4_k", 144, 256).T, "q4_k"),
        "blocks: expected finite scales, row 2 has another": lambda: pack_blocks(
            with_scale("q4_k", float("inf")), "q4_k"
        ),
        "blocks: expected finite scales, row 2 has": lambda: pack_blocks(with_scale("q8_0", float("nan")), "q8_0"),
        "packed: expected at least": lambda: packed_linear(x, PackedWeight(packed.data[:64].clone(), (4, 512), "q4_k")),
        "packed: expected a multiple of 256": lambda: packed_linear(x[:, :500], whole),
        "arithmetic: expected one of exact, fast": lambda: PackedWeight(packed.data, (4, 512), "q4_k", "other"),
        "arithmetic: expected exact for lossless weights": lambda: packed_linear(
            x, PackedWeight(packed.data, (4, 512), "lossless", "fast")
        ),
        r"input: expected shape \[..., 512\]": lambda: packed_linear(x[:, :7], packed),
    }


@pytest.mark.parametrize("message", bad_calls())
def test_bad_input(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad_calls()[message]()  # type: ignore[operator]


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_registration(arithmetic: str) -> None:
    packed = pack_blocks(make_blocks("q5_0", 12, 64), "q5_0", arithmetic)
    of_packed = (packed.data, "q5_0", arithmetic, 12)
    input = torch.randn(5, 64).bfloat16()
    torch.library.opcheck(torch.ops.specbranch.packed_linear.default, (input, *of_packed, None))
    torch.library.opcheck(torch.ops.specbranch.unpack_rows.default, (*of_packed, 64, torch.tensor([3, 1])))


def test_compile() -> None:
    packed, input = pack_blocks(make_blocks("q4_k", 9, 256), "q4_k", "fast"), torch.randn(4, 256).bfloat16()

    def twice(x: Tensor) -> Tensor:
        return specbranch_ext.packed_linear(x, packed) * 2

    compiled = torch.compile(twice, fullgraph=True, backend="eager")
    assert torch.equal(compiled(input), twice(input))


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("format", BLOCKS)
def test_parts_of_packed_blocks_are_packed_weights(format: str, arithmetic: str) -> None:
    sizes = (16, 32, 7)
    packed = pack_blocks(make_blocks(format, sum(sizes), 512), format, arithmetic)
    whole = unpack_rows(packed, torch.arange(sum(sizes)))
    input = torch.randn(3, packed.shape[1]).bfloat16()
    products = packed_linear(input, packed).split(sizes, 1)
    for part, values, product in zip(packed.split(sizes), whole.split(sizes), products, strict=True):
        assert part.data.untyped_storage().data_ptr() == packed.data.untyped_storage().data_ptr()
        assert torch.equal(bits(unpack_rows(part, torch.arange(len(values)))), bits(values))
        assert torch.equal(bits(packed_linear(input, part)), bits(product))
    with pytest.raises(ValueError, match="sizes: expected multiples of 16 and a rest, 55 together, got "):
        packed.split((8, 47))
