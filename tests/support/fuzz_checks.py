"""What a fuzzed call must do: give the reference's result, or raise one line that names an argument; and leave every
byte of its inputs, and around them, as it was."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from fuzz_values import Call
from torch import Tensor

import specbranch_ext
from specbranch_ext import PackedWeight, build_info, reference
from specbranch_ext.reference.processed import by_row, only_allowed
from specbranch_ext.reference.unpack_rows import unpack_weight

EXACT = {"verify", "verify_rejection", "gumbel_noise", "ancestor_mask", "kv_commit", "rotary_commit"}
CACHE = ("keys", "values")
ROUNDING = {torch.float32: 3e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def check(call: Call, on_cpu: bool) -> tuple[Tensor, ...] | None:
    """Run the call and raise an AssertionError for what it must not do. Returns its results, None if it raised."""
    arguments, untouched = call.make(), call.make()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = getattr(specbranch_ext, call.op)(**arguments)
    except (TypeError, ValueError) as error:
        line = str(error)
        assert "\n" not in line, f"more than one line: {line}"
        named = re.match(r"(\w+)(\[\d+\])?: .*(expected|has )", line)
        assert named, f"no argument is named: {line}"
        assert named[1] in call.arguments, f"{named[1]} is no argument"
        assert not call.valid or cannot_be_sampled(call.op, untouched), f"a valid call raised: {line}"
        same_bytes(arguments, untouched)
        return None
    in_place = call.op in WRITTEN
    if in_place and not meta(arguments):
        (getattr(reference, call.op) if on_cpu else ON_A_DEVICE[call.op])(**untouched)
    if call.op == "rotary_commit" and not meta(arguments):
        return check_rotary_commit(arguments, untouched, result, on_cpu)
    same_bytes(arguments, untouched)
    results = tuple(written(call.op, arguments)) if in_place else parts(result)
    if not in_place and not meta(arguments):
        compare(call, on_cpu, untouched, results)
    return results


def parts(result: Any) -> tuple[Tensor, ...]:
    """The tensors of an op's result."""
    return result if isinstance(result, tuple) else (result.data if isinstance(result, PackedWeight) else result,)


def commit_what_fits(buffers: list[Tensor], rows: Tensor, start: int | Tensor) -> None:
    """On a device: a row outside the buffer, or one that would go there, does not move."""
    for buffer in buffers:
        old, capacity = buffer.clone(), buffer.shape[1]
        each = isinstance(start, Tensor) and start.dim() == 1
        places = torch.as_tensor(start).tolist() if each else range(int(start), int(start) + len(rows))
        for to, row in zip(places, rows.tolist(), strict=True):
            if 0 <= row < capacity and 0 <= to < capacity:
                buffer[:, to] = old[:, row]


def check_rotary_commit(
    arguments: dict[str, Any], untouched: dict[str, Any], result: Tensor, on_cpu: bool
) -> tuple[Tensor, ...]:
    """NaN of arithmetic may have any bits. On a device a row outside the cache is not written."""
    rows, capacity = untouched["rows"], untouched["keys"].shape[1]
    inside = torch.ones_like(rows, dtype=torch.bool) if on_cpu else (rows >= 0) & (rows < capacity)
    expected = rotate_all(untouched)
    of_rows = {name: untouched[name][inside] for name in ("query", "key", "value", "cos", "sin", "rows")}
    reference.rotary_commit(**(untouched | of_rows))
    for ours, theirs in ((arguments["keys"], untouched["keys"]), (result, expected)):
        assert torch.equal(ours.isnan(), theirs.isnan()), f"{ours} instead of {theirs}"
        ours[ours.isnan()] = theirs[theirs.isnan()] = torch.nan
    same_bytes(arguments, untouched)
    same_bytes({"": result}, {"": expected})
    return result, arguments["keys"], arguments["values"]


def rotate_all(arguments: dict[str, Any]) -> Tensor:
    """The embedded queries, wherever the rows go: to a cache of their own."""
    n = arguments["rows"].shape[0]
    own = {name: arguments[name].new_empty((arguments[name].shape[0], n, arguments[name].shape[2])) for name in CACHE}
    return reference.rotary_commit(**(arguments | own | {"rows": torch.arange(n)}))


def advance_if_it_fits(slot: Tensor, buffers: list[Tensor], **others: Any) -> None:
    """On a device: with a slot that there is not, nothing is written."""
    if 0 <= int(slot) < len(buffers[0]):
        reference.advance(slot=slot, buffers=buffers, **others)


WRITTEN = {
    "kv_commit": ("buffers",),
    "advance": ("buffers", "ids", "positions", "next_positions", "rows", "ancestors", "slot"),
}
ON_A_DEVICE: dict[str, Callable[..., None]] = {"kv_commit": commit_what_fits, "advance": advance_if_it_fits}


def written(op: str, arguments: dict[str, Any]) -> list[Tensor]:
    """The results of an op that works in place."""
    return tensors_of({name: arguments[name] for name in WRITTEN[op]})


def same_bits(results: tuple[Tensor, ...] | None, others: tuple[Tensor, ...] | None) -> bool:
    if results is None or others is None:
        return results is others
    bits = [[tensor.contiguous().view(-1).view(torch.uint8) for tensor in part] for part in (results, others)]
    return all(torch.equal(one, other) for one, other in zip(*bits, strict=True))


def compare(call: Call, on_cpu: bool, arguments: dict[str, Any], result: tuple[Tensor, ...]) -> None:
    if cannot_be_sampled(call.op, arguments):
        assert not on_cpu, "a row that cannot be sampled did not raise"
        assert_marked(call.op, arguments, result)
        return
    try:
        expected = getattr(reference, call.op)(**arguments)
    except (ValueError, RuntimeError, IndexError, OverflowError):
        assert not on_cpu or not call.valid, "the reference raised"
        return  # bad data: what a device makes of it is in test_device_data.py
    if call.op == "tree_attention":
        compare_attention(arguments, result[0], expected)
    elif call.op in ("linear", "packed_linear"):
        compare_linear(arguments, result[0], expected)
    elif call.op in ("rms_norm", "gated_activation"):
        for ours, theirs in zip(result, parts(expected), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    elif call.op == "unpack_rows":  # NaN too
        assert_equal((result[0].view(torch.int16),), (expected.view(torch.int16),))
    elif call.op == "draft_sample":
        assert_equal(result[:2], expected[:2])
        torch.testing.assert_close(result[2:], expected[2:], rtol=1e-5, atol=1e-5, equal_nan=True)
    else:
        assert_equal(result, parts(expected))


def assert_equal(result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(result, expected, strict=True):
        assert torch.equal(ours, theirs), f"{ours} instead of {theirs}"


def compare_linear(arguments: dict[str, Any], ours: Tensor, expected: Tensor) -> None:
    weight = arguments["weight"]
    if isinstance(weight, PackedWeight):
        weight = unpack_weight(weight)
    x, weight, bias = arguments["input"].double(), weight.double(), arguments.get("bias")
    size = x.abs() @ weight.abs().T
    tolerance = size * 2e-6 + 1e-44 * x.shape[-1]
    if bias is not None:
        size = size + bias.double().abs()
        tolerance = tolerance + bias.double().abs() * 2e-6
    if ours.dtype == torch.bfloat16 and build_info()["isa"] in ("bf16", "amx"):  # subnormal numbers count as 0
        beside = 1 + x.shape[-1] + x.abs().sum(-1, keepdim=True) + weight.abs().sum(-1)
        tolerance = tolerance + 2 * torch.finfo(torch.float32).smallest_normal * beside
    assert_near(ours, expected, tolerance, size < 1e38)


def compare_attention(arguments: dict[str, Any], ours: Tensor, expected: Tensor) -> None:
    query, keys, values = (arguments[name].double() for name in ("query", "keys", "values"))
    if query.numel() == 0 or values.numel() == 0 or not bool(values.abs().sum(1).max() < 1e38):
        return  # sums are float32
    scale = arguments["scale"]
    product = query.abs().sum(-1).max() * keys.abs().max()
    largest = product * abs(query.shape[2] ** -0.5 if scale is None else scale)
    # A weight is off by as much as its score is; the result then by that share of the largest value.
    score_error = largest * query.shape[2] ** 0.5 * ROUNDING[torch.float32] + ROUNDING[arguments["query"].dtype] + 1e-5
    if not bool(score_error < 0.1) or not bool(product < 1e38):
        return
    assert_near(ours, expected, values.abs().max() * 3 * score_error + 1e-44, torch.ones_like(ours, dtype=torch.bool))


def assert_near(ours: Tensor, expected: Tensor, tolerance: Tensor, where: Tensor) -> None:
    """On top of the tolerance, one rounding to the result's type."""
    info = torch.finfo(ours.dtype)
    bound = tolerance + expected.double().abs() * ROUNDING[ours.dtype] + info.smallest_normal * info.eps
    near = (ours.double() - expected.double()).abs() <= bound
    overflowed = (expected.double().abs() > info.max * 0.99) & (ours.isinf() | (ours.double().abs() > info.max * 0.98))
    wrong = where & ~near & ~overflowed
    assert not bool(wrong.any()), f"{ours[wrong]} instead of {expected[wrong]}"


# ---- Rows that cannot be sampled


def unusable_rows(logits: Tensor, arguments: dict[str, Any]) -> Tensor:
    """bool [n]: NaN, +inf, nothing but -inf, or values that overflow when they are scaled, where tokens are allowed."""
    temperature = torch.tensor(arguments.get("temperature", 0.0), dtype=torch.float64)
    if arguments.get("filters") is not None:
        temperature = arguments["filters"][..., 0]
    allowed = arguments.get("allowed")
    x = only_allowed(logits.float(), None if allowed is None else allowed[: len(logits)])
    inverse = torch.where(temperature > 0, 1.0 / temperature, 1.0).float()
    largest = (x * inverse.reshape(-1, 1)).amax(1)
    return x.isnan().any(1) | (x == torch.inf).any(1) | ~largest.isfinite()


def cannot_be_sampled(op: str, arguments: dict[str, Any]) -> bool:
    """Whether the call needs a row that cannot be; False for arguments that are no tensors of such a call, and for
    the rows of several texts, which are marked on the CPU too."""
    try:
        if op == "draft_sample":
            if by_row(arguments["seed"], arguments.get("filters")):
                return False
            return bool(unusable_rows(arguments["draft_logits"], arguments).any())
        if op == "verify":
            if arguments.get("roots") is not None:
                return False
            counts = arguments["parents"] >= 0
            counts[0] = True
            return bool((unusable_rows(arguments["target_logits"], arguments) & counts).any())
        if op == "verify_rejection":
            target, draft = arguments["target_logits"], arguments["draft_logits"]
            drawn = [0 <= token < target.shape[1] for token in arguments["tokens"].tolist()[1:]]
            m = (*drawn, False).index(False)
            return bool(unusable_rows(target[: m + 1], arguments).any() or unusable_rows(draft[:m], arguments).any())
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError, OverflowError):
        pass
    return False


def assert_marked(op: str, arguments: dict[str, Any], result: tuple[Tensor, ...]) -> None:
    """A device cannot raise: nothing is accepted, and the row has no token."""
    if op == "verify":
        assert (int(result[2]), int(result[3])) == (0, -1)
    elif op == "verify_rejection":
        assert (int(result[0]), int(result[1])) == (0, -1)
    else:
        rows = unusable_rows(arguments["draft_logits"], arguments)
        assert bool((result[0][rows] == -1).all())
        assert bool(result[3][rows].isnan().all())


# ---- Memory


def tensors_of(arguments: dict[str, Any]) -> list[Tensor]:
    values = [item for value in arguments.values() for item in (value if isinstance(value, list) else [value])]
    values = [value.data if isinstance(value, PackedWeight) else value for value in values]
    return [value for value in values if isinstance(value, Tensor)]


def meta(arguments: dict[str, Any]) -> bool:
    return any(tensor.is_meta for tensor in tensors_of(arguments))


def same_bytes(arguments: dict[str, Any], expected: dict[str, Any]) -> None:
    """Of the storages, with what lies around the tensors."""
    for ours, theirs in zip(tensors_of(arguments), tensors_of(expected), strict=True):
        if ours.is_meta or ours.layout is not torch.strided or ours.is_quantized:
            continue
        one, other = (
            torch.empty(0, dtype=torch.uint8).set_(tensor.detach().untyped_storage()) for tensor in (ours, theirs)
        )
        assert torch.equal(one, other), "the call wrote into an argument or around it"
