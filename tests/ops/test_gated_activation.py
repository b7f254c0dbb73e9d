"""gated_activation against torch's activations in float64, and to the bit against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import on_cpu
from torch import Tensor
from torch.nn import functional

from specbranch_ext import gated_activation, reference

pytestmark = pytest.mark.usefixtures("implementation")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["silu", "gelu_tanh"]
SIZES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 100, 2047, 2048, 2049, 5000]


@pytest.fixture
def threads():
    """Sets torch's thread count; the old one comes back after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def torchs(x: Tensor, activation: str) -> Tensor:
    return functional.silu(x) if activation == "silu" else functional.gelu(x, approximate="tanh")


def assert_same_bits(ours: Tensor, expected: Tensor) -> None:
    """NaN counts as NaN."""
    bits = {4: torch.int32, 2: torch.int16}[ours.element_size()]
    assert ours.dtype == expected.dtype
    assert ours.shape == expected.shape
    assert torch.equal(ours.isnan(), expected.isnan())
    assert torch.equal(ours.view(bits)[~ours.isnan()], expected.view(bits)[~ours.isnan()])


def check(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Two tensors and a joined one."""
    expected = reference.gated_activation(gate, up, activation=activation)
    output = gated_activation(gate, up, activation=activation)
    assert_same_bits(output, expected)
    assert output.is_contiguous()
    joined = torch.cat([gate, up], -1)
    assert_same_bits(gated_activation(joined, activation=activation), expected)
    assert_same_bits(reference.gated_activation(joined, activation=activation), expected)
    return output


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_bits_of_the_reference_and_values_of_torch(data):
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    leading = data.draw(st.lists(st.integers(1, 4), max_size=4))
    size = data.draw(st.sampled_from(SIZES) | st.integers(1, 300))
    dtype = data.draw(st.sampled_from(DTYPES))
    activation = data.draw(st.sampled_from(ACTIVATIONS))
    scale = data.draw(st.sampled_from([1.0, 0.01, 10.0]))
    gate, up = (torch.randn(2, *leading, size) * scale).to(dtype)
    output = check(gate, up, activation)
    expected = torchs(gate, activation) * up
    info, most = torch.finfo(dtype), float(up.abs().max())
    # torch's own GELU in float32 subtracts numbers that are almost the same; subnormal numbers are coarse.
    rtol, atol = 2 * info.eps + 1e-6, 2e-6 * scale * most + info.smallest_normal * info.eps * (most + 1)
    torch.testing.assert_close(output, expected, rtol=rtol, atol=atol)


def exact(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The activation by its sigmoid in float64 (torch's own GELU subtracts numbers that are almost the same), and the
    sigmoid's argument."""
    x = x.double()
    t = x if activation == "silu" else 2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)
    return x * torch.sigmoid(t), t


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float32_is_right_to_a_few_units_in_the_last_place(activation):
    x = torch.cat([torch.linspace(-100, 100, 40_001), torch.randn(5000), torch.randn(5000) * 1e-3, torch.zeros(1)])
    expected, t = exact(x, activation)
    error = (gated_activation(x, torch.ones_like(x), activation=activation).double() - expected).abs()
    units = torch.full_like(t, 4)
    if activation == "gelu_tanh":
        units -= 1.5 * t.clamp(max=0)  # a rounding of the exponential's argument is one of its value, times its size
    tiny = 2e-36  # where the exponential counts as 0
    assert (error <= expected.abs() * 2.0**-23 * units + tiny).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_all_numbers_of_16_bits_are_within_one_unit(activation, dtype):
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    output = check(x, torch.ones_like(x), activation)
    ours, rounded = output[x.isfinite()].double(), exact(x, activation)[0][x.isfinite()].to(dtype).double()
    info = torch.finfo(dtype)
    unit = info.eps * rounded.abs() + info.smallest_normal * info.eps
    tiny = 2e-36  # where the exponential counts as 0
    assert ((ours - rounded).abs() <= unit + tiny).all()
    assert ours.isfinite().all()
    assert torch.equal(output.isnan(), torchs(x.float(), activation).isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_values(dtype, activation):
    info = torch.finfo(dtype)
    values = [
        0.0,
        -0.0,
        info.max,
        -info.max,
        info.tiny,
        -info.tiny,
        info.smallest_normal / 4,
        88.0,
        -88.0,
        -86.9,
        -87.1,
    ]
    values += [float("inf"), -float("inf"), float("nan"), 1.0, -1.0, 12.0, -12.0, 1e4, -1e4]
    x = torch.tensor(values).to(dtype)
    ones = torch.ones_like(x)
    output = check(x, ones, activation)
    theirs = torchs(x.float(), activation).to(dtype)
    assert torch.equal(output.isnan(), theirs.isnan())
    assert torch.equal(output.isinf(), theirs.isinf())
    assert torch.equal(output.signbit()[~theirs.isnan()], theirs.signbit()[~theirs.isnan()])
    check(x.repeat(len(values)), x.repeat_interleave(len(values)), activation)
    # A NaN of any bits stays one.
    some = torch.tensor([0x7FC00001, 0x7F800001, 0x7FFFFFFF, -1]).to(torch.int32).view(torch.float32).to(dtype)
    assert gated_activation(some, torch.ones_like(some), activation=activation).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("size", SIZES)
def test_an_element_has_the_same_bits_wherever_it_lies(dtype, activation, size):
    gate, up = (torch.randn(2, 3, size) * 5).to(dtype)
    output = check(gate, up, activation)
    shifted = check(gate[:, size // 3 :], up[:, size // 3 :], activation)
    assert torch.equal(shifted, output[:, size // 3 :])
    for row in range(3):
        assert torch.equal(check(gate[row], up[row], activation), output[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_threads(dtype, activation, threads, implementation):
    rows, size = (23, 4500) if implementation == "cpu" else (5, 700)
    gate, up = torch.randn(2, rows, size).to(dtype)
    threads(1)
    expected = gated_activation(gate, up, activation=activation)
    threads(3)
    assert torch.equal(check(gate, up, activation), expected)
    alone = torch.cat([gated_activation(g, u, activation=activation) for g, u in zip(gate, up, strict=True)])
    assert torch.equal(alone, expected.flatten())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [24, 37, 64])
def test_layouts(dtype, size):
    gate, up = torch.randn(2, 24, size).to(dtype)
    expected = gated_activation(gate, up)
    for shape in [(24,), (2, 12), (2, 3, 4), (1, 2, 3, 2, 2)]:
        assert torch.equal(check(gate.view(*shape, size), up.view(*shape, size), "silu").view(24, size), expected)
    for around in (80, 99):
        wide_gate, wide_up = torch.full((2, 24, around), float("nan"), dtype=dtype)
        wide_gate[:, 8 : 8 + size], wide_up[:, 3 : 3 + size] = gate, up
        rows = wide_gate[:, 8 : 8 + size], wide_up[:, 3 : 3 + size]
        assert torch.equal(gated_activation(*rows), expected)
        assert torch.equal(gated_activation(*(x.unflatten(0, (2, 3, 1, 4)) for x in rows)).view(24, size), expected)
    # Rows in another order, or not whole: copied.
    swapped = gate.view(4, 6, size).transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(gated_activation(swapped, up.view(4, 6, size)).view(24, size), expected)
    assert torch.equal(gated_activation(gate.T.contiguous().T, up), expected)
    assert torch.equal(gated_activation(gate[:1].expand(5, size), up[:5]), gated_activation(gate[[0] * 5], up[:5]))


def test_empty():
    for shape in [(0, 8), (3, 0), (0,), (2, 0, 4)]:
        x = torch.empty(shape)
        assert gated_activation(x, x).shape == shape
        assert gated_activation(x).shape == (*shape[:-1], shape[-1] // 2)


def bad_inputs():
    x = torch.randn(2, 6)
    return {
        r"gate: expected shape \[\.\.\., I\], got float32 of shape \[\]": (torch.tensor(1.0), None),
        r"gate: expected shape \[\.\.\., 2 I\] without up, got float32 of shape \[2, 5\]": (x[:, :5], None),
        "gate: expected float32, bfloat16 or float16, got float64": (x.double(), x.double()),
        r"up: expected gate's shape \[2, 6\], got float32 of shape \[6\]": (x, x[0]),
        "up: expected float32, got bfloat16": (x, x.bfloat16()),
        "up: expected a tensor on cpu": (x, x.to("meta")),
    }


@on_cpu
@pytest.mark.parametrize("message", bad_inputs())
def test_bad_input(message):
    with pytest.raises(ValueError, match=message):
        gated_activation(*bad_inputs()[message])


@on_cpu
@pytest.mark.parametrize("activation", ["relu", "", "SiLU"])
def test_bad_activation(activation):
    x = torch.ones(2, 4)
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=f"activation: expected silu or gelu_tanh, got '{activation}'"):
            gated_activation(x.to(device), activation=activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_registration(dtype):
    gate, up = torch.randn(2, 2, 5, 24).to(dtype)
    op = torch.ops.specbranch.gated_activation.default
    for arguments in [(gate, up, "silu"), (gate.transpose(0, 1), None, "gelu_tanh")]:
        torch.library.opcheck(op, arguments)
