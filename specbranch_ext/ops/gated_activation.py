"""gated_activation: act(gate) * up, between the two products of a feed-forward layer."""

import torch
from torch import Tensor

from . import _library
from ._checks import checked, describe
from ._library import register

ACTIVATIONS = ("silu", "gelu_tanh")


def _output(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected {' or '.join(ACTIVATIONS)}, got {describe(activation)}")
    if gate.dim() == 0:
        raise ValueError(f"gate: expected shape [..., I], got {describe(gate)}")
    if up is not None:
        if up.shape != gate.shape:
            raise ValueError(f"up: expected gate's shape {list(gate.shape)}, got {describe(up)}")
        return torch.empty_like(gate, memory_format=torch.contiguous_format)  # half the time of new_empty
    shape = gate.shape
    if shape[-1] % 2:
        raise ValueError(f"gate: expected shape [..., 2 I] without up, got {describe(gate)}")
    return gate.new_empty((*shape[:-1], shape[-1] // 2))


def _as_rows(tensor: Tensor) -> Tensor:
    """What the core takes: rows with one stride, each without gaps. A view where the tensor has such rows."""
    if tensor.dim() <= 4 and tensor.is_contiguous():
        return tensor
    rows = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _run(gate: Tensor, up: Tensor | None, activation: str, output: Tensor) -> None:
    up = None if up is None else _as_rows(up)
    _library.core.gated_activation(_as_rows(gate), up, activation, _as_rows(output), _library.launch_handle(gate))


_op = register("gated_activation(Tensor gate, Tensor? up, str activation) -> Tensor", _output, run=_run)


@checked
def gated_activation(gate: Tensor, up: Tensor | None = None, *, activation: str = "silu") -> Tensor:
    """`act(gate) * up`, as gated feed-forward layers have it.

    The activation is computed in float32 and rounded to the dtype, and so is its product with up. Bit for bit, an
    element's result depends on nothing but the element and is the same on every device. Where the activation's
    exponential is below e^-87, it counts as 0.

    Args:
        gate: float32, bfloat16 or float16 [..., I]; without up [..., 2 I], gate's columns and then up's. Rows that
            lie one stride apart are read in place, others are copied.
        up: shape and dtype of gate, rows as gate's, or None.
        activation: "silu": x / (1 + e^-x). "gelu_tanh": x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the
            approximation of GELU.

    Returns:
        [..., I], dtype of gate, contiguous.

    Raises:
        ValueError: a tensor has another shape, dtype or device, or the activation is another; the message names it.

    Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
    """
    result: Tensor = _op(gate, up, activation)
    return result
