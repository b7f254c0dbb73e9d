"""Cases of linear and packed_linear: the linear layers of Qwen2.5-Coder 0.5B and 1.5B, with weights from memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import cycle
from typing import Any

import torch
from op_case import Built, Case, Function, Peer
from torch import Tensor
from torch.nn import functional

from specbranch_ext import (
    PackedWeight,
    linear,
    pack_blocks,
    pack_weight,
    packed_linear,
    quantize_weight,
    unpack_rows,
)

VOCABULARY = 151_936
# Name: (hidden size, intermediate size, width of K and V, layers).
MODELS = {"1.5B": (1536, 8960, 256, 28), "0.5B": (896, 4864, 128, 24)}
# More than the caches hold, so that a layer's weights are gone when its turn comes again.
RING_BYTES = 200 << 20
# Format and arithmetic of packed weights.
KINDS = (("lossless", "exact"), ("q4_0", "exact"), ("q4_0", "fast"), ("q8_0", "fast"))


Shapes = tuple[tuple[int, int], ...]
"""[out, in] of the products that are timed together."""


def layer_shapes(hidden: int, intermediate: int, kv: int) -> Shapes:
    """A layer's products: Q, K, V, output, gate, up, down."""
    attention = ((hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden))
    return (*attention, (intermediate, hidden), (intermediate, hidden), (hidden, intermediate))


def linear_cases(device: str) -> Iterator[Case]:
    if device != "cpu":
        return  # torch's own product serves there
    for name, (hidden, intermediate, kv, layers) in MODELS.items():
        layer = layer_shapes(hidden, intermediate, kv)
        for dtype in (torch.bfloat16, torch.float32):
            for rows in (1, 2, 4, 6, 8, 16, 64, 256):
                quick = name == "0.5B" and rows in (1, 6)
                yield linear_case(f"{name}: one of {layers} layers", layer, rows, dtype, quick)
            for rows in (1, 2, 6, 16):
                yield linear_case(f"{name}: output layer", ((VOCABULARY, hidden),), rows, dtype, quick=False)


def packed_linear_cases(device: str) -> Iterator[Case]:
    if device != "cpu":
        return
    for name, (hidden, intermediate, kv, layers) in MODELS.items():
        layer = layer_shapes(hidden, intermediate, kv)
        for kind in KINDS:
            for rows in (1, 2, 4, 6, 8, 16, 64, 256):
                quick = name == "0.5B" and (kind[0], rows) in (("lossless", 1), ("lossless", 6), ("q4_0", 1))
                yield packed_linear_case(f"{name}: one of {layers} layers", layer, rows, kind, quick)
            yield packed_linear_case(f"{name}: output layer", ((VOCABULARY, hidden),), 1, kind, quick=False)


@lru_cache(maxsize=1)  # for the cases of these weights, which follow each other
def make_ring(shapes: Shapes, dtype: torch.dtype) -> list[list[Tensor]]:
    """Copies of the weights of these shapes, together larger than the caches."""
    nbytes = count(shapes) * dtype.itemsize
    return [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(RING_BYTES // nbytes + 1)]


def count(shapes: Shapes) -> int:
    return sum(a * b for a, b in shapes)


def linear_case(what: str, shapes: Shapes, rows: int, dtype: torch.dtype, quick: bool) -> Case:
    def build() -> Built:
        ring = make_ring(shapes, dtype)
        inputs = [torch.randn(rows, width).to(dtype) for _, width in shapes]

        def run(op: Callable[[Tensor, Tensor], Tensor]) -> Function:
            turns = cycle(ring)

            def products() -> None:
                for x, weight in zip(inputs, next(turns), strict=True):
                    op(x, weight)

            return products

        def check() -> None:
            for x, weight in zip(inputs, ring[0], strict=True):
                expected = functional.linear(x, weight).float()
                difference = (linear(x, weight).float() - expected).norm() / expected.norm()
                assert difference < 1e-2, f"relative difference {difference:.2g} to torch's product"

        return Built(run(linear), {"torch.nn.functional.linear": Peer(run(functional.linear))}, check)

    return Case(
        op="linear",
        what=f"{what}, {rows} rows, {str(dtype).removeprefix('torch.')}",
        build=build,
        bytes=count(shapes) * dtype.itemsize,
        flops=2 * count(shapes) * rows,
        quick=quick,
    )


@lru_cache(maxsize=1)
def make_packed_ring(shapes: Shapes, kind: tuple[str, str]) -> list[list[PackedWeight]]:
    """Weights packed, scaled as those of a model; together larger than the caches."""
    first = [pack(torch.randn(shape).bfloat16() * 0.02, kind) for shape in shapes]
    copies = RING_BYTES // sum(weight.nbytes for weight in first) + 1
    return [first] + [[replace(weight, data=weight.data.clone()) for weight in first] for _ in range(copies)]


def pack(weight: Tensor, kind: tuple[str, str]) -> PackedWeight:
    format, arithmetic = kind
    if format == "lossless":
        return pack_weight(weight)
    return pack_blocks(quantize_weight(weight, format), format, arithmetic)


def packed_linear_case(what: str, shapes: Shapes, rows: int, kind: tuple[str, str], quick: bool) -> Case:
    """The peer is our own product over weights in bfloat16; in the exact arithmetic the bits are the same."""

    def build() -> Built:
        packed_ring, ring = make_packed_ring(shapes, kind), make_ring(shapes, torch.bfloat16)
        inputs = [torch.randn(rows, width).bfloat16() for _, width in shapes]

        def run(op: Callable[[Tensor, Any], Tensor], weights: Sequence[Sequence[Any]]) -> Function:
            turns = cycle(weights)

            def products() -> None:
                for x, weight in zip(inputs, next(turns), strict=True):
                    op(x, weight)

            return products

        def check() -> None:
            for x, packed in zip(inputs, packed_ring[0], strict=True):
                expected = linear(x, unpack_rows(packed, torch.arange(packed.shape[0]))).float()
                difference = ((packed_linear(x, packed).float() - expected).norm() / expected.norm()).item()
                assert difference <= (0.0 if packed.arithmetic == "exact" else 0.01), f"difference {difference:.2g}"

        return Built(run(packed_linear, packed_ring), {"linear": Peer(run(linear, ring))}, check)

    return Case(
        op="packed_linear",
        what=f"{what}, {rows} rows, {kind[0]}, {kind[1]}",
        build=build,
        bytes=count(shapes) * torch.bfloat16.itemsize,  # of the weights as they were, so that rates can be compared
        flops=2 * count(shapes) * rows,
        quick=quick,
    )
