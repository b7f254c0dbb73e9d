"""Arguments that an op cannot take: one line that names the argument, what was expected and what came."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_checks import parts
from fuzz_values import EXAMPLES, Call, made
from torch import Tensor
from torch.autograd import forward_ad

import specbranch_ext
from specbranch_ext import (
    PackedWeight,
    draft_sample,
    gumbel_noise,
    kv_commit,
    linear,
    tree_attention,
    verify,
    verify_rejection,
)

PACKING = ("pack_weight", "pack_blocks", "quantize_weight")
OPS = pytest.mark.parametrize("call", EXAMPLES, ids=lambda call: call.op)


def run(call: Call, **changes: Any) -> Any:
    return getattr(specbranch_ext, call.op)(**{**call.make(), **changes})


def refused(error: type[Exception], line: str, call: Call, **changes: Any) -> None:
    with pytest.raises(error) as caught:
        run(call, **changes)
    assert re.fullmatch(line, str(caught.value)), f"{caught.value!r} instead of {line!r}"


def test_every_op_has_an_example_of_all_its_arguments() -> None:
    assert sorted(call.op for call in EXAMPLES) == sorted(op for op in specbranch_ext.ops.__all__ if op.islower())
    for call in EXAMPLES:
        names = getattr(specbranch_ext, call.op).__wrapped__.__annotations__.keys() - {"return"}
        assert call.arguments.keys() == names


@OPS
def test_a_tensor_on_another_device_in_any_place(call: Call) -> None:
    arguments = call.make()
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    scalars = {name: torch.tensor(1) for name in ("seed", "prefix_length", "start") if name in arguments}
    optional: dict[str, Tensor] = {
        "filters": torch.tensor([1.0, 0, 1, 0], dtype=torch.float64),
        "ancestors": torch.tensor([[1], [3]]),
        "starts": torch.tensor([0]),
        "sequence": torch.tensor([0, 0]),
        "roots": torch.tensor([0]),
    }
    tensors |= scalars | {name: value for name, value in optional.items() if name in arguments}
    for name, tensor in tensors.items():
        if call.op in ("ancestor_mask", *PACKING):
            continue  # it has one
        line = rf"{name}(\[0\])?: expected a tensor on cpu.*, got one on meta|\w+(\[0\])?: expected a tensor on meta.*"
        refused(ValueError, line, call, **(scalars | {name: tensor.to("meta")}))
    if call.op == "kv_commit":
        on_meta = arguments["buffers"][0].to("meta")
        line = r"buffers\[1\]: expected a tensor on cpu, as buffers\[0\] is, got one on meta"
        refused(ValueError, line, call, buffers=[*arguments["buffers"], on_meta])


@OPS
def test_all_on_meta_gives_shapes(call: Call) -> None:
    if call.op in PACKING:
        return  # they are no operators of torch's: what they make may depend on the values

    def to_meta(value: Any) -> Any:
        if isinstance(value, PackedWeight):
            return replace(value, data=value.data.to("meta"))
        return [to_meta(item) for item in value] if isinstance(value, list) else value.to("meta")

    real, arguments = run(call), call.make()
    kinds = (Tensor, PackedWeight, list)
    tensors = {name: to_meta(value) for name, value in arguments.items() if isinstance(value, kinds)}
    on_meta = run(call, **tensors)
    for one, other in zip(*(x if isinstance(x, tuple) else [x] for x in (real, on_meta)), strict=True):
        assert one is other is None or (other.is_meta and one.shape == other.shape and one.dtype == other.dtype)


@OPS
def test_what_is_no_tensor(call: Call) -> None:
    for name, value in call.make().items():
        if isinstance(value, Tensor):
            optional = " or None" if name in ("bias", "query_norm", "key_norm", "residual", "up", "allowed") else ""
            for came, text in [
                ([1, 2], "list"),
                (3, r"3 \(int\)"),
                (True, r"True \(bool\)"),
                ("text", r"'text' \(str\)"),
                (np.zeros(2), "ndarray"),
                *([] if optional else [(None, "None")]),
            ]:
                refused(TypeError, f"{name}: expected a tensor{optional}, got {text}", call, **{name: came})
            refused(
                ValueError, f"{name}: expected a dense tensor, got a sparse_coo one", call, **{name: value.to_sparse()}
            )
        elif isinstance(value, PackedWeight):
            for came, text in (
                (torch.zeros(3, 5), r"a tensor, float32 of shape \[3, 5\]"),
                (None, "None"),
                (3, r"3 \(int\)"),
            ):
                refused(TypeError, f"{name}: expected a PackedWeight, got {text}", call, **{name: came})
        elif name == "format":
            refused(TypeError, r"format: expected a str, got 3 \(int\)", call, format=3)
            refused(ValueError, r"format: expected .*, got 'int3'.*", call, format="int3")
        elif name == "activation":
            refused(TypeError, r"activation: expected a str, got 3 \(int\)", call, activation=3)
            refused(ValueError, r"activation: expected silu or gelu_tanh, got 'relu' \(str\)", call, activation="relu")
        elif name == "arithmetic":
            refused(TypeError, r"arithmetic: expected a str, got 3 \(int\)", call, arithmetic=3)
        elif name in ("filters", "ancestors", "starts", "sequence", "roots"):
            refused(TypeError, rf"{name}: expected a tensor or None, got list", call, **{name: [1.0]})


@OPS
def test_what_is_no_number(call: Call) -> None:
    kinds = {
        "seed": "an int or a tensor",
        "prefix_length": "an int or a tensor",
        "start": "an int or a tensor",
        "k": "an int",
        "top_k": "an int",
        "spare": "an int",
        "vocabulary": "an int",
        "sliding_window": "an int or None",
        "temperature": "a number",
        "top_p": "a number",
        "min_p": "a number",
        "scale": "a number or None",
        "softcap": "a number or None",
        "eps": "a number",
        "block": "a bool",
        "by_position": "a bool",
        "unit_offset": "a bool",
        "round_first": "a bool",
        "interleaved": "a bool",
    }
    for name in kinds.keys() & call.arguments.keys():
        expected = f"{name}: expected {kinds[name]}, got "
        refused(TypeError, expected + r"'1' \(str\)", call, **{name: "1"})
        refused(TypeError, expected + "list", call, **{name: [1]})
        refused(TypeError, expected + r"1j \(complex\)", call, **{name: 1j})
        if "None" not in kinds[name]:
            refused(TypeError, expected + "None", call, **{name: None})
        if "bool" not in kinds[name]:
            refused(TypeError, expected + r"True \(bool\)", call, **{name: True})
        if "tensor" not in kinds[name]:
            refused(TypeError, expected + r"a tensor, float32 of shape \[\]", call, **{name: torch.tensor(1.0)})
            refused(TypeError, expected + r"a tensor, int64 of shape \[1\]", call, **{name: torch.tensor([1])})
        if "int" in kinds[name]:
            refused(TypeError, expected + r"2\.0 \(float\)", call, **{name: 2.0})
            refused(ValueError, rf"{name}: expected an int of 64 bits, got {2**70}", call, **{name: 2**70})
        if "bool" in kinds[name]:
            refused(TypeError, expected + r"1 \(int\)", call, **{name: 1})
        if "number" in kinds[name]:
            refused(ValueError, f"{name}: expected a number that fits a float, got {10**400}", call, **{name: 10**400})


@OPS
def test_numbers_of_numpy_are_numbers(call: Call) -> None:
    for name, value in call.arguments.items():
        of_numpy = {int: np.int64, float: np.float32}.get(type(value))
        if of_numpy is not None:
            for one, other in zip(
                *(_tensors(run(call, **changes)) for changes in ({}, {name: of_numpy(value)})), strict=True
            ):
                assert torch.equal(one, other)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return () if result is None else parts(result)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_tensors_that_are_not_dense() -> None:
    logits, weight = torch.zeros(2, 4), torch.zeros(3, 4)
    nested = torch.nested.nested_tensor([torch.zeros(4), torch.zeros(3)])
    quantized = torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)
    for value, what in ((nested, "nested"), (quantized, "quantized"), (weight.to_sparse_csr(), "sparse_csr")):
        with pytest.raises(ValueError, match=f"^weight: expected a dense tensor, got a {what} one$"):
            linear(logits, value)


def test_a_cache_is_a_sequence_of_tensors_of_their_own() -> None:
    rows, buffer = torch.tensor([2]), torch.zeros(2, 4, 3)
    for buffers, line in [
        (buffer, r"buffers: expected a sequence of tensors, got a tensor, float32 of shape \[2, 4, 3\]"),
        (3, r"buffers: expected a sequence of tensors, got 3 \(int\)"),
        ([buffer, None], r"buffers\[1\]: expected a tensor, got None"),
    ]:
        with pytest.raises(TypeError, match=f"^{line}$"):
            kv_commit(buffers, rows, 0)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^buffers\[0\]: expected rows in memory of their own, got stride 0 in dimension"
    ):
        kv_commit([buffer[:1].expand(2, 4, 3)], rows, 0)
    kv_commit(iter([buffer]), rows, 0)  # type: ignore[arg-type]
    kv_commit([torch.empty(0, 4, 3).as_strided((0, 4, 3), (0, 0, 0))], rows, 0)


# ---- Gradients


def with_gradient(call: Call) -> list[tuple[str, Any]]:
    """The call's tensors of floats, each requiring grad."""
    found: list[tuple[str, Any]] = []
    for name, value in call.arguments.items():
        value = made(value)
        if isinstance(value, list):
            found.append((name, [x.requires_grad_() if x.is_floating_point() else x for x in value]))
        elif isinstance(value, Tensor) and value.is_floating_point():
            found.append((name, value.requires_grad_()))
    return found


@OPS
def test_a_gradient_is_not_lost_without_a_word(call: Call) -> None:
    for name, value in with_gradient(call):
        line = (
            rf"{name}(\[\d\])?: expected a tensor that requires no grad, because {call.op} has no backward: call it .*"
        )
        refused(ValueError, line, call, **{name: value})
        with torch.no_grad():
            run(call, **{name: value})
        with torch.inference_mode():
            run(call, **{name: value})


def test_a_layers_weight_serves_in_inference_mode() -> None:
    layer, x = torch.nn.Linear(5, 3), torch.randn(2, 5)
    with torch.inference_mode():
        torch.testing.assert_close(linear(x, layer.weight, layer.bias), layer(x))
    with pytest.raises(ValueError, match=r"^weight: expected a tensor that requires no grad"):
        linear(x, layer.weight, layer.bias)
    on_meta = torch.nn.Linear(5, 3, device="meta")
    assert linear(x.to("meta"), on_meta.weight, on_meta.bias).requires_grad  # torch's own, as on a CUDA device
    layer.requires_grad_(False)
    torch.testing.assert_close(linear(x, layer.weight, layer.bias), layer(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transforms_of_functions() -> None:
    x, weight = torch.randn(2, 5), torch.randn(3, 5)
    with pytest.raises(ValueError, match=r"^weight: expected a tensor that requires no grad"):
        torch.func.grad(lambda w: linear(x, w).sum())(weight)
    with pytest.raises(ValueError, match=r"^input: expected a tensor without a tangent, because linear has no deriv"):
        torch.func.jvp(lambda x: linear(x, weight), (x,), (x,))
    with forward_ad.dual_level():
        with pytest.raises(ValueError, match=r"^input: expected a tensor without a tangent"):
            linear(forward_ad.make_dual(x, x), weight)
        linear(x, weight)


def test_compiled_code_refuses_too() -> None:
    query, keys = torch.randn(2, 2, 4), torch.randn(1, 9, 4)
    compiled = torch.compile(lambda q: tree_attention(q, keys, keys, 3) * 2, backend="aot_eager")
    assert torch.equal(compiled(query), tree_attention(query, keys, keys, 3) * 2)
    with pytest.raises(ValueError, match=r"^query: expected a tensor that requires no grad"):
        compiled(query.clone().requires_grad_())
    with torch.no_grad():
        compiled(query.clone().requires_grad_())


# ---- Sizes that no memory holds


def test_counts_beyond_the_vocabulary() -> None:
    logits, rows = torch.zeros(2, 5), torch.arange(2)
    with pytest.raises(ValueError, match=rf"^k: expected 1 to V = 5, got {2**40}$"):
        draft_sample(logits, rows, 2**40)
    with pytest.raises(ValueError, match=rf"^vocabulary: expected 1 to 2\^31 - 1, got {2**40}$"):
        gumbel_noise(rows, 2**40)
    with pytest.raises(ValueError, match=r"^positions: expected int64 of shape \[n\], got int64 of shape \[\]$"):
        gumbel_noise(torch.tensor(1), 5)


def test_signatures_and_documentation_are_kept() -> None:
    for function in (verify, verify_rejection, tree_attention):
        assert function.__doc__
        assert function.__module__ == f"specbranch_ext.ops.{function.__name__}"
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'k'"):
        draft_sample(torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64))  # type: ignore[call-arg]
