"""Cases of linear: the linear layers of Qwen2.5-Coder 0.5B and 1.5B, with weights that come from memory."""

from collections.abc import Callable, Iterator
from itertools import cycle

import torch
from op_case import Case, Functions
from torch import Tensor
from torch.nn import functional

from specbranch_ext import linear

VOCABULARY = 151_936
# Name: (hidden size, intermediate size, width of K and V, layers).
MODELS = {"1.5B": (1536, 8960, 256, 28), "0.5B": (896, 4864, 128, 24)}
# More than the caches hold, so that a layer's weights are gone when its turn comes again.
RING_BYTES = 200 << 20


def layer_shapes(hidden: int, intermediate: int, kv: int) -> list[tuple[int, int]]:
    """[out, in] of a layer's products: Q, K, V, output, gate, up, down."""
    attention = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    return [*attention, (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]


def linear_cases(device: str) -> Iterator[Case]:
    if device != "cpu":
        return  # torch's own product serves there
    for name, (hidden, intermediate, kv, layers) in MODELS.items():
        shapes = layer_shapes(hidden, intermediate, kv)
        for dtype in (torch.bfloat16, torch.float32):
            for what, parts, all_rows in [
                (f"{name}: one of {layers} layers", shapes, (1, 2, 6, 16, 128)),
                (f"{name}: output layer", [(VOCABULARY, hidden)], (1, 2, 6, 16)),
            ]:
                weights = make_ring(parts, dtype)
                for rows in all_rows:
                    yield linear_case(what, weights, rows)


def make_ring(shapes: list[tuple[int, int]], dtype: torch.dtype) -> list[list[Tensor]]:
    """Copies of the weights of these shapes, together larger than the caches."""
    nbytes = sum(a * b for a, b in shapes) * dtype.itemsize
    return [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(RING_BYTES // nbytes + 1)]


def linear_case(what: str, ring: list[list[Tensor]], rows: int) -> Case:
    weights = ring[0]
    dtype = weights[0].dtype
    inputs = [torch.randn(rows, weight.shape[1]).to(dtype) for weight in weights]

    def run(op: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
        turns = cycle(ring)

        def products() -> None:
            for x, weight in zip(inputs, next(turns), strict=True):
                op(x, weight)

        return products

    size = sum(weight.numel() for weight in weights)

    def build() -> Functions:
        return {"ours": run(linear), "torch.nn.functional.linear": run(functional.linear)}

    return Case(
        op="linear",
        what=f"{what}, {rows} rows, {str(dtype).removeprefix('torch.')}",
        build=build,
        bytes=size * dtype.itemsize,
        flops=2 * size * rows,
    )
