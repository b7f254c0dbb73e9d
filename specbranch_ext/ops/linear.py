"""linear: x W^T + b whose rows do not depend on each other, not even in the last bit."""

from functools import partial

from torch import Tensor
from torch.nn import functional

from . import _library
from ._checks import checked, describe
from ._library import register


def _output(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape [out, in], got {describe(weight)}")
    if input.dim() == 0:
        raise ValueError(f"input: expected shape [..., in], got {describe(input)}")
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _run(input: Tensor, weight: Tensor, bias: Tensor | None, output: Tensor) -> None:
    rows = input.contiguous()
    if output.dim() > 3:  # the core knows few dimensions, and the leading ones do not matter to it
        _library.core.linear(rows.flatten(0, -2), weight, bias, output.flatten(0, -2), _library.launch_handle(rows))
    else:
        _library.core.linear(rows, weight, bias, output, _library.launch_handle(rows))


_op = register("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor", _output, run=_run)


def _is_torchs_own(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return isinstance(input, Tensor) and not input.is_cpu


@partial(checked, has_gradient=_is_torchs_own)
def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` for a few rows, with every row's result independent of the others.

    On the CPU each element is one float32 sum in a fixed order, rounded once, whatever the number of rows, the row's
    place and the number of threads. So tokens verified together get bit for bit the values that they get one by one,
    and speculative decoding loses nothing to rounding (torch picks another kernel, with other rounding, for another
    number of rows). A weight is read once for up to 6 rows (14 with a processor's bfloat16 instructions), in place: a
    forward of 6 rows in bfloat16 costs little more than one of 1 row. Tensors on other devices go to
    `torch.nn.functional.linear`, without that promise and with its gradient.

    Args:
        input: float32, bfloat16 or float16 [..., in]; copied when it is not contiguous.
        weight: [out, in], dtype of input, last dimension contiguous.
        bias: [out], dtype of input, or None.

    Returns:
        [..., out], dtype of input.

    Raises:
        ValueError: a tensor has another shape, dtype, stride or device; the message names it.
    """
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{name}: expected a tensor on {input.device}, got one on {tensor.device}")
    if not input.is_cpu:
        return functional.linear(input, weight, bias)
    output: Tensor = _op(input, weight, bias)
    return output
