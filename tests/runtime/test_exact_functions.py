"""torch's products and activations, however they are called: every row alike, and the values torch's own."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from specbranch.runtime import exact
from specbranch.runtime.rows.functions import ExactFunctions

torch.manual_seed(0)
ROWS = torch.randn(19, 64)
WEIGHT = torch.randn(64, 96)
EXPERTS = torch.randn(3, 64, 96)
NARROW = ROWS[:, :39]  # a tail of 7 behind two vectors of 16


def ends(rows: Tensor) -> Tensor:
    """All rows are the second expert's."""
    return torch.tensor([0, len(rows), len(rows)], dtype=torch.int32)


@torch.library.custom_op("specbranch_tests::product", mutates_args=())
def product(input: Tensor, weight: Tensor) -> Tensor:
    return input @ weight


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: functional.linear(x, WEIGHT.T.contiguous(), WEIGHT[0]),
    "matmul": lambda x: x @ WEIGHT,
    "matmul of 3 dimensions": lambda x: (x[None] @ WEIGHT)[0],
    "mm into": lambda x: torch.mm(x, WEIGHT, out=torch.empty(len(x), 96)),
    "addmm": lambda x: torch.addmm(WEIGHT[0], x, WEIGHT),
    "bmm": lambda x: torch.bmm(x.expand(3, *x.shape), EXPERTS)[2],
    "bmm of columns": lambda x: torch.bmm(WEIGHT.T.expand(len(x), 96, 64), x[..., None])[..., 0],
    "baddbmm": lambda x: torch.baddbmm(WEIGHT[:1], x.expand(3, *x.shape), EXPERTS)[1],
    "einsum": lambda x: torch.einsum("nk,eko->neo", x, EXPERTS),
    "grouped_mm": lambda x: torch._grouped_mm(x, EXPERTS, offs=ends(x)),
    "a custom op": lambda x: product(x, WEIGHT),
    "silu": lambda x: functional.silu(2 * x[:, :39]),
    "gelu": lambda x: functional.gelu(x[:, :39], approximate="tanh"),
    "sigmoid": lambda x: x[:, :39].sigmoid(),
    "sigmoid in place": lambda x: (2 * x[:, :39]).sigmoid_(),
    "softplus": lambda x: functional.softplus(x[:, :39], beta=2.0),
    "softmax": lambda x: functional.softmax(x[:, :4], dim=1, dtype=torch.float32),
    "log_softmax": lambda x: x[:, :7].log_softmax(-1),
}


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_are_alike_and_near_torchs(name: str, inference: bool) -> None:
    function = FUNCTIONS[name]
    with torch.inference_mode(inference), torch.no_grad():
        expected = function(ROWS)
        with ExactFunctions():
            together = function(ROWS)
            alone = torch.cat([function(row[None]) for row in ROWS])
    assert torch.equal(together, alone)
    assert (together.dtype, together.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-4)


def test_torchs_own_rows_are_not() -> None:
    """Else there would be nothing to do here."""
    differ = {
        name
        for name, function in FUNCTIONS.items()
        if not torch.equal(function(ROWS), torch.cat([function(row[None]) for row in ROWS]))
    }
    assert {"linear", "matmul", "addmm", "einsum", "silu", "a custom op"} <= differ


@pytest.mark.parametrize(
    "function",
    [
        lambda: torch.ones(3, 4, dtype=torch.int64) @ torch.ones(4, 5, dtype=torch.int64),
        lambda: torch.ones(3, 4).double() @ torch.ones(4, 5).double(),
        lambda: torch.ones(3, 4, device="meta") @ torch.ones(4, 5, device="meta"),
        lambda: torch.ones(4) @ torch.ones(4, 5),
        lambda: torch.ones(3, 1) @ torch.ones(1, 5),
        lambda: torch.ones(2, 3, 4, 5) @ torch.ones(2, 3, 5, 6),
        lambda: torch.addmm(torch.ones(5), torch.ones(3, 4), torch.ones(4, 5), beta=2.0),
        lambda: torch.ones(0, 4).softmax(-1),
        lambda: torch.ones(2, 3).softmax(0),
        lambda: torch.ones(3, 4, dtype=torch.int64).sigmoid(),
        lambda: functional.silu(torch.ones(0, 4)),
    ],
)
def test_other_arguments_go_to_torch(function: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        expected = function()
        with ExactFunctions():
            result = function()
    assert (result.shape, result.dtype, result.device) == (expected.shape, expected.dtype, expected.device)
    if not result.is_meta:
        torch.testing.assert_close(result, expected)


def test_long_activations_are_alike_on_any_number_of_threads() -> None:
    """torch shares them among threads, whose parts end in tails of their own."""
    values = 2 * torch.randn(3 * 32768 + 17)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with ExactFunctions():
                results.append(functional.silu(values))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("width", [64, 96, 4864, 8960, 18944])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_silu_of_many_rows_is_that_of_each_alone(width: int, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    try:
        for kind in exact.SHARED_EVENLY:
            module = kind()
            for rows, threads in itertools.product((2, 3, 7, 8, 256), (1, 2, 3)):
                torch.set_num_threads(threads)
                input = torch.randn(1, rows, width).to(dtype)
                together = exact._exact_activation(module, input)
                for row in {0, 1, rows // 2, rows - 1}:
                    alone = exact._exact_activation(module, input[:, row : row + 1])
                    assert torch.equal(together[:, row : row + 1], alone), (rows, threads, row)
    finally:
        torch.set_num_threads(before)
