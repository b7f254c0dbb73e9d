"""quantize_weight: blocks of 8 and 4 bits, to the byte those of the reference, and no worse than the gguf package's."""

import pytest
import torch
from gguf import GGMLQuantizationType, quants
from gguf_blocks import decoded
from torch import Tensor

from specbranch_ext import quantize_weight, reference
from specbranch_ext.ops.quantize_weight import QUANTIZED


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make(size_out: int, size_in: int) -> Tensor:
    weight = torch.randn(size_out, size_in) * 0.02
    weight[size_out // 2] = 0
    weight[0, : size_in // 2] *= 1e-36  # less than any scale
    weight[-1, ::37] *= 1000
    return weight.bfloat16()


@pytest.mark.parametrize("format", QUANTIZED)
@pytest.mark.parametrize(("size_out", "size_in"), [(1, 32), (7, 96), (64, 896)])
def test_blocks_are_those_of_the_reference(format: str, size_out: int, size_in: int) -> None:
    weight = make(size_out, size_in)
    blocks = quantize_weight(weight, format)
    assert torch.equal(blocks, reference.quantize_weight(weight, format))
    assert torch.equal(blocks, quantize_weight(torch.cat([weight, weight], 1)[:, :size_in], format))


@pytest.mark.parametrize("format", QUANTIZED)
def test_errors_are_no_larger_than_the_gguf_packages(format: str) -> None:
    weight = (torch.randn(64, 896) * 0.02).bfloat16()
    theirs = torch.from_numpy(quants.quantize(weight.float().numpy(), GGMLQuantizationType[format.upper()]))

    def error(blocks: Tensor) -> float:
        return float((decoded(blocks, format).float() - weight.float()).norm() / weight.float().norm())

    ours = error(quantize_weight(weight, format))
    assert ours < error(theirs) * (0.95 if format == "q4_0" else 1.01)


def bad_calls() -> dict[str, object]:
    weight = torch.zeros(4, 64, dtype=torch.bfloat16)
    odd, large = weight.clone(), weight.clone()
    odd[1, 3], large[2, 5] = float("nan"), 1e30
    return {
        "weight: expected bfloat16, got float32": lambda: quantize_weight(weight.float(), "q8_0"),
        r"weight: expected shape \[out, in\]": lambda: quantize_weight(weight[0], "q8_0"),
        "weight: expected stride 1": lambda: quantize_weight(torch.zeros(64, 32).bfloat16().T, "q8_0"),
        "weight: expected rows of a multiple of 32 weights, got 40": lambda: quantize_weight(weight[:, :40], "q4_0"),
        "format: expected one of q8_0, q4_0, got 'q4_k'": lambda: quantize_weight(weight, "q4_k"),
        "weight: expected finite numbers .*, row 1 has others": lambda: quantize_weight(odd, "q4_0"),
        "weight: expected finite numbers .*, row 2 has others": lambda: quantize_weight(large, "q8_0"),
    }


@pytest.mark.parametrize("message", bad_calls())
def test_bad_input(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad_calls()[message]()  # type: ignore[operator]
