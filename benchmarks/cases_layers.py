"""Cases of the ops between products: rms_norm, gated_activation. Sizes of Qwen2.5-Coder 1.5B and LLaMA 3 8B."""

from collections.abc import Iterator
from functools import partial

import torch
from op_case import Built, Case, Peer, dtypes
from torch import Tensor
from torch.nn import functional

from specbranch_ext import RmsNorm, gated_activation, rms_norm

# (rows, row size): hidden states of decoding and of a prefill, and a row for each head.
NORM_SIZES = {
    "cpu": [(1, 1536), (6, 1536), (64, 1536), (256, 1536), (72, 128)],
    "cuda": [(1, 4096), (8, 4096), (64, 4096), (1024, 4096), (8192, 128)],
}
GATED_SIZES = {
    "cpu": [(1, 8960), (6, 8960), (64, 8960), (256, 8960)],
    "cuda": [(1, 14336), (8, 14336), (64, 14336), (1024, 14336)],
}


def close(ours: Tensor, theirs: Tensor) -> None:
    """Up to a rounding to the dtype and the order of sums."""
    torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(ours.dtype).eps + 1e-6, atol=1e-6)


def rms_norm_cases(device: str) -> Iterator[Case]:
    for rows, size in NORM_SIZES[device]:
        for dtype in dtypes(device):
            for with_residual in (False, True):
                quick = dtype == torch.bfloat16 and with_residual and (rows, size) in NORM_SIZES[device][:2]
                yield norm_case(device, rows, size, dtype, with_residual, quick)


def norm_case(device: str, rows: int, size: int, dtype: torch.dtype, with_residual: bool, quick: bool) -> Case:
    def build() -> Built:
        x, residual = torch.randn(2, rows, size, device=device).to(dtype)
        weight = torch.randn(size, device=device).to(dtype)

        def torch_norm() -> tuple[Tensor, Tensor]:
            """As transformers' LlamaRMSNorm, behind the addition in the decoder layer."""
            total = residual + x if with_residual else x
            wide = total.to(torch.float32)
            variance = wide.pow(2).mean(-1, keepdim=True)
            return weight * (wide * torch.rsqrt(variance + 1e-6)).to(dtype), total

        def ours() -> RmsNorm:
            return rms_norm(x, weight, residual if with_residual else None, eps=1e-6)

        def check() -> None:
            (output, total), (expected, expected_total) = ours(), torch_norm()
            close(output, expected)
            if with_residual:
                assert torch.equal(total, expected_total), "another sum"

        return Built(ours, {"LlamaRMSNorm": Peer(torch_norm)}, check)

    tensors = 4 if with_residual else 2
    what = f"{rows} rows of {size}, {'with' if with_residual else 'no'} residual, {str(dtype).removeprefix('torch.')}"
    return Case("rms_norm", what, build, bytes=(tensors * rows + 1) * size * dtype.itemsize, quick=quick)


def gated_activation_cases(device: str) -> Iterator[Case]:
    for rows, size in GATED_SIZES[device]:
        for dtype in dtypes(device):
            for activation in ("silu", "gelu_tanh"):
                quick = dtype == torch.bfloat16 and activation == "silu" and (rows, size) in GATED_SIZES[device][:2]
                yield gated_case(device, rows, size, dtype, activation, quick)


def gated_case(device: str, rows: int, size: int, dtype: torch.dtype, activation: str, quick: bool) -> Case:
    def build() -> Built:
        gate, up = torch.randn(2, rows, size, device=device).to(dtype)

        def torch_gated() -> Tensor:
            act_fn = functional.silu if activation == "silu" else partial(functional.gelu, approximate="tanh")
            output: Tensor = act_fn(gate) * up
            return output

        def ours() -> Tensor:
            return gated_activation(gate, up, activation=activation)

        return Built(ours, {"act_fn(gate) * up": Peer(torch_gated)}, lambda: close(ours(), torch_gated()))

    what = f"{rows} rows of {size}, {activation}, {str(dtype).removeprefix('torch.')}"
    return Case("gated_activation", what, build, bytes=3 * rows * size * dtype.itemsize, quick=quick)
