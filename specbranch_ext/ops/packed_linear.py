"""packed_linear: x W^T + b over a packed weight."""

from torch import Tensor

from ..packed import PackedWeight
from . import _library
from ._checks import checked, describe
from ._library import register


def _output(input: Tensor, packed: Tensor, format: str, arithmetic: str, size_out: int, bias: Tensor | None) -> Tensor:
    if input.dim() == 0:
        raise ValueError(f"input: expected shape [..., in], got {describe(input)}")
    return input.new_empty((*input.shape[:-1], size_out))


def _run(
    input: Tensor, packed: Tensor, format: str, arithmetic: str, size_out: int, bias: Tensor | None, output: Tensor
) -> None:
    rows = input.contiguous()
    if output.dim() > 3:  # the core knows few dimensions, and the leading ones do not matter to it
        rows, output = rows.flatten(0, -2), output.flatten(0, -2)
    _library.core.packed_linear(rows, packed, format, arithmetic, size_out, bias, output, _library.launch_handle(rows))


_op = register(
    "packed_linear(Tensor input, Tensor packed, str format, str arithmetic, int size_out, Tensor? bias) -> Tensor",
    _output,
    run=_run,
)


@checked
def packed_linear(input: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`linear` over a packed weight, from fewer bytes.

    Rows are as independent of each other as `linear`'s. In the exact arithmetic the result is bit for bit what `linear`
    gives for the weight unpacked: with a processor's AVX512-BF16 instructions the weights are decoded in registers;
    elsewhere some rows at a time are unpacked, which is slower than `linear`. In the fast one the result has the same
    bits on every processor.

    Args:
        input: bfloat16 [..., in] on the CPU; copied when it is not contiguous.
        weight: what `pack_weight` or `pack_blocks` returned.
        bias: bfloat16 [out], or None.

    Returns:
        bfloat16 [..., out].

    Raises:
        ValueError: a tensor has another shape, dtype or device; the message names it.
    """
    if input.dim() > 0 and input.shape[-1] != weight.shape[1]:
        raise ValueError(f"input: expected shape [..., {weight.shape[1]}], got {describe(input)}")
    output: Tensor = _op(input, weight.data, weight.format, weight.arithmetic, weight.shape[0], bias)
    return output
