"""linear in plain torch."""

from torch import Tensor


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `specbranch_ext.linear`, summed in float64: the kernels differ from it by the rounding of float32 sums."""
    output = input.double() @ weight.double().T
    if bias is not None:
        output = output + bias.double()
    return output.to(input.dtype)
