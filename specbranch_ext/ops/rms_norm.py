"""rms_norm: root mean square normalisation, after the residual's addition where there is one."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _library
from ._checks import checked, describe
from ._library import register


class RmsNorm(NamedTuple):
    """What `rms_norm` returns."""

    output: Tensor
    """As input: the normalised rows times the weight."""
    sum: Tensor
    """As input: residual + input, the next residual. Without a residual a new tensor of shape [0]."""


def _outputs(input: Tensor, weight: Tensor, residual: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    if input.dim() == 0:
        raise ValueError(f"input: expected shape [..., H], got {describe(input)}")
    output = torch.empty_like(input, memory_format=torch.contiguous_format)  # half the time of new_empty
    if residual is None:
        return output, input.new_empty(0)
    if residual.shape != input.shape:
        raise ValueError(f"residual: expected the input's shape {list(input.shape)}, got {describe(residual)}")
    return output, torch.empty_like(output)


def _run(
    input: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    eps: float,
    unit_offset: bool,
    round_first: bool,
    output: Tensor,
    sum: Tensor,
) -> None:
    rows = input.contiguous()
    if residual is not None:
        residual = residual.contiguous()
    if output.dim() > 4:  # the core knows no more dimensions, and the leading ones do not matter to it
        rows, output = rows.flatten(0, -2), output.flatten(0, -2)
        if residual is not None:
            residual, sum = residual.flatten(0, -2), sum.flatten(0, -2)
    launch = _library.launch_handle(rows)
    _library.core.rms_norm(rows, weight, residual, eps, unit_offset, round_first, output, sum, launch)


_op = register(
    "rms_norm(Tensor input, Tensor weight, Tensor? residual, float eps, bool unit_offset, bool round_first)"
    " -> (Tensor, Tensor)",
    _outputs,
    run=_run,
)


@checked
def rms_norm(
    input: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-6,
    unit_offset: bool = False,
    round_first: bool = True,
) -> RmsNorm:
    """Rows scaled to a mean square of 1, then by a weight: `x / sqrt(mean(x^2) + eps) * weight` for each row x.

    With a residual, x is `residual + input`, rounded to their dtype. All else is float32, rounded to the dtype at the
    end and where round_first says so. In transformers' models: Llama, Qwen and Mistral have round_first; Gemma
    unit_offset without round_first; OLMo 2 and GPT-OSS neither.

    Bit for bit, a row's result depends on nothing but the row, the weight and the options, and is the same on every
    device.

    Args:
        input: float32, bfloat16 or float16 [..., H]; copied when it is not contiguous.
        weight: [H], dtype of input, contiguous.
        residual: shape and dtype of input, copied when it is not contiguous, or None.
        eps: added to the mean square; a finite float32 of at least 0.
        unit_offset: the factor is 1 + weight, added in float32.
        round_first: the scaled row is rounded to the dtype before it is multiplied by the factor.

    Returns:
        RmsNorm of [..., H] and, with a residual, the sum [..., H] (None: an empty tensor of shape [0]), both
        contiguous and in the dtype of input.

    Raises:
        ValueError: a tensor has another shape, dtype, stride or device, or eps is negative; the message names it.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467).
    """
    return RmsNorm(*_op(input, weight, residual, eps, unit_offset, round_first))
