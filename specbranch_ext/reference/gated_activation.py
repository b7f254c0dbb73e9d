"""gated_activation in plain torch."""

import torch
from torch import Tensor

from .noise import exp_nonpositive


def times_sigmoid(x: Tensor, t: Tensor) -> Tensor:
    """x sigmoid(t) for float32 t of x's sign. The exponential is of -|t|: nothing overflows."""
    e = exp_nonpositive(-t.abs())
    return torch.where(t < 0, x * e, x) / (e + 1.0)


def silu(x: Tensor) -> Tensor:
    return times_sigmoid(x, x)


def gelu_tanh(x: Tensor) -> Tensor:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), as x sigmoid of twice tanh's argument."""
    return times_sigmoid(x, x * ((x * x) * 0.0713548163 + 1.59576912))


ACTIVATIONS = {"silu": silu, "gelu_tanh": gelu_tanh}


def gated_activation(gate: Tensor, up: Tensor | None = None, *, activation: str = "silu") -> Tensor:
    """As `specbranch_ext.gated_activation`, to the bit."""
    if up is None:
        gate, up = gate.chunk(2, -1)
    activated = ACTIVATIONS[activation](gate.float()).to(gate.dtype)
    return (activated.float() * up.float()).to(gate.dtype)
