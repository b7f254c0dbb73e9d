"""rotary_commit against the modules of transformers, and against the reference to the last bit."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import on_cpu
from torch import Tensor
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.llama import modeling_llama
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from specbranch_ext import reference, rotary_commit

pytestmark = pytest.mark.usefixtures("implementation")

CAPACITY = 40
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def table(n: int, rotary_dim: int, dtype: torch.dtype, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Cosines and sines of some positions."""
    frequencies = 10_000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = torch.randint(0, 5000, (n, 1)) * frequencies
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def joined(n: int, heads: int, kv_heads: int, dim: int, value_dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Views of one product, as long as all heads are in a row."""
    widths = [heads * dim, kv_heads * dim, kv_heads * value_dim]
    query, key, value = normal(n, sum(widths), dtype=dtype).split(widths, -1)
    return query.view(n, heads, dim), key.view(n, kv_heads, dim), value.view(n, kv_heads, value_dim)


def cache(kv_heads: int, dim: int, value_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of NaN: whoever reads a row that was not written finds out."""
    return (
        torch.full((kv_heads, CAPACITY, dim), torch.nan, dtype=dtype),
        torch.full((kv_heads, CAPACITY, value_dim), torch.nan, dtype=dtype),
    )


def places(n: int) -> Tensor:
    return torch.randperm(CAPACITY)[:n]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def by_heads(x: Tensor) -> Tensor:
    """[n, H, D] as the modules have it, [1, H, n, D], and back."""
    return x.transpose(0, 1).unsqueeze(0) if x.dim() == 3 else x[0].transpose(0, 1)


def check(arguments: dict[str, Any], query: Tensor, key: Tensor) -> None:
    """That the op gives these, to the bit, writes the values, and no other row."""
    written = rotary_commit(**arguments)
    rows, value = arguments["rows"], arguments["value"]
    assert written.is_contiguous()
    assert torch.equal(written, query)
    expected = cache(key.shape[1], key.shape[2], value.shape[2], key.dtype)
    expected[0][:, rows], expected[1][:, rows] = key.transpose(0, 1), value.transpose(0, 1)
    assert torch.equal(bits(arguments["keys"]), bits(expected[0]))
    assert torch.equal(bits(arguments["values"]), bits(expected[1]))


def call(
    n: int,
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype,
    rotary_dim: int | None = None,
    table_dtype: torch.dtype | None = None,
    interleaved: bool = False,
) -> dict[str, Any]:
    query, key, value = joined(n, heads, kv_heads, dim, dim, dtype)
    cos, sin = table(n, rotary_dim or dim, table_dtype or dtype, interleaved)
    keys, values = cache(kv_heads, dim, dim, dtype)
    names = ("query", "key", "value", "cos", "sin", "rows", "keys", "values")
    arguments = dict(zip(names, (query, key, value, cos, sin, places(n), keys, values), strict=True))
    return arguments | {"interleaved": interleaved}


# ---- The modules of transformers


def embedded(module: Any, arguments: dict[str, Any], query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """By a module's own function, rounded to the dtype."""
    cos, sin = arguments["cos"].unsqueeze(0), arguments["sin"].unsqueeze(0)
    both = module.apply_rotary_pos_emb(by_heads(query), by_heads(key), cos, sin)
    return by_heads(both[0]).to(query.dtype), by_heads(both[1]).to(query.dtype)


@DTYPES
@pytest.mark.parametrize("table_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "heads", "kv_heads", "dim"), [(1, 14, 2, 64), (8, 4, 4, 128), (33, 3, 1, 20)])
def test_halves_are_llamas(n, heads, kv_heads, dim, dtype, table_dtype):
    arguments = call(n, heads, kv_heads, dim, dtype, table_dtype=table_dtype)
    check(arguments, *embedded(modeling_llama, arguments, arguments["query"], arguments["key"]))


@DTYPES
@pytest.mark.parametrize("dim", [64, 20])
def test_interleaved_is_coheres_which_goes_on_in_float32(dim, dtype):
    arguments = call(5, 4, 2, dim, dtype, table_dtype=torch.float32, interleaved=True)
    check(arguments, *embedded(modeling_cohere, arguments, arguments["query"], arguments["key"]))


@DTYPES
@pytest.mark.parametrize(("dim", "rotary_dim"), [(64, 16), (96, 24), (80, 32), (20, 6)])
def test_a_part_of_a_head_as_gpt_neox_has_it(dim, rotary_dim, dtype):
    arguments = call(5, 4, 4, dim, dtype, rotary_dim)
    per_head = normal(5, 4, 3 * dim, dtype=dtype)  # its own product
    arguments |= zip(("query", "key", "value"), per_head.chunk(3, -1), strict=True)
    check(arguments, *embedded(modeling_gpt_neox, arguments, arguments["query"], arguments["key"]))


@DTYPES
def test_a_part_of_a_head_as_phi_has_it(dtype):
    arguments = call(5, 4, 2, 80, dtype, 32)
    query, key = arguments["query"], arguments["key"]
    turned = embedded(modeling_llama, arguments, query[..., :32], key[..., :32])
    expected = [torch.cat([part, x[..., 32:]], -1) for part, x in zip(turned, (query, key), strict=True)]
    check(arguments, *expected)


@DTYPES
@pytest.mark.parametrize("module", [Qwen3RMSNorm, Gemma3RMSNorm], ids=lambda module: module.__name__)
@pytest.mark.parametrize("dim", [128, 20])
def test_norms_of_qwen3_and_gemma3(dim, module, dtype):
    arguments = call(7, 4, 2, dim, dtype)
    norms = [module(dim, eps=1e-5).to(dtype).requires_grad_(False) for _ in range(2)]
    for norm in norms:
        norm.weight += normal(dim, dtype=dtype) * 0.3
    gemma = module is Gemma3RMSNorm
    arguments |= {"query_norm": norms[0].weight, "key_norm": norms[1].weight, "eps": 1e-5}
    arguments |= {"unit_offset": gemma, "round_first": not gemma}
    query, key = embedded(
        modeling_llama, arguments, norms[0](arguments["query"].contiguous()), norms[1](arguments["key"].contiguous())
    )
    close = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(rotary_commit(**arguments), query, rtol=close, atol=close)
    written = arguments["keys"][:, arguments["rows"]].transpose(0, 1)
    torch.testing.assert_close(written, key, rtol=close, atol=close)


# ---- The reference


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides of rows and heads, or where no vector is aligned."""
    if layout == "heads first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "apart":
        around = torch.full((x.shape[0], 2 * x.shape[1], x.shape[2] + 3), 7.0, dtype=x.dtype)
        return around[:, ::2, 1 : x.shape[2] + 1].copy_(x)
    return x.contiguous()


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    n, heads, kv_heads = draw(st.integers(0, 6)), draw(st.integers(0, 3)), draw(st.integers(0, 3))
    dim = draw(st.sampled_from([2, 3, 8, 16, 33, 64, 70, 96]))
    rotary_dim = draw(st.sampled_from([dim // 2 * 2, *range(2, dim + 1, 2)]))
    value_dim = draw(st.sampled_from([0, 1, 8, 33, 64, dim]))
    dtype = draw(st.sampled_from(FLOATS))
    layouts = st.sampled_from(["plain", "heads first", "apart"])
    torch.manual_seed(draw(st.integers(0, 2**32)))
    query, key, value = (laid_out(x, draw(layouts)) for x in joined(n, heads, kv_heads, dim, value_dim, dtype))
    around = draw(st.sampled_from([0, 3]))
    cos, sin = (normal(n, rotary_dim + around, dtype=dtype)[:, around:] for _ in range(2))
    if draw(st.booleans()):
        cos, sin = cos.float(), sin.float()
    if draw(st.booleans()):
        cos, sin = cos[:1].expand_as(cos), sin[:1].expand_as(sin)
    keys, values = (laid_out(x, draw(layouts)) for x in cache(kv_heads, dim, value_dim, dtype))
    norms = [1 + normal(dim, dtype=dtype) / 4 for _ in range(2)] if draw(st.booleans()) else [None, None]
    return {
        **dict(zip(("query", "key", "value", "cos", "sin"), (query, key, value, cos, sin), strict=True)),
        **{"rows": places(n), "keys": keys, "values": values, "query_norm": norms[0], "key_norm": norms[1]},
        "eps": draw(st.sampled_from([0.0, 1e-6, 1e-5, 0.1])),
        **{name: draw(st.booleans()) for name in ("unit_offset", "round_first", "interleaved")},
    }


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """With a cache of its own in memory of the same strides."""

    def copy(x: Tensor) -> Tensor:
        whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).clone()
        return whole.as_strided(x.shape, x.stride(), x.storage_offset())

    return arguments | {name: copy(arguments[name]) for name in ("keys", "values")}


def whole(x: Tensor) -> Tensor:
    """What the tensor lies in."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


def check_against_reference(arguments: dict[str, Any]) -> None:
    other = copied(arguments)
    ours, expected = rotary_commit(**arguments), reference.rotary_commit(**other)
    assert torch.equal(bits(ours), bits(expected))
    for name in ("keys", "values"):
        assert torch.equal(whole(arguments[name]), whole(other[name]))


@settings(max_examples=300, deadline=None)
@given(arguments=calls())
def test_any_shape_gives_the_references_bits(arguments):
    check_against_reference(arguments)


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_many_rows_give_the_references_bits(normed, interleaved, dtype):
    arguments = call(CAPACITY, 14, 2, 128, dtype, interleaved=interleaved)
    if normed:
        arguments |= {"query_norm": normal(128, dtype=dtype), "key_norm": normal(128, dtype=dtype)}
    check_against_reference(arguments)


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("factor", [1e-40, 1e-37, 1e-20, 1e-7, 6e4, 1e19, 1e38])
def test_very_small_and_very_large_values(factor, normed, interleaved, dtype):
    """Subnormal numbers, and what overflows to infinity and NaN, whose bits nobody promises."""
    arguments = call(6, 4, 2, 48, dtype, interleaved=interleaved)
    for name in ("query", "key", "value"):
        arguments[name] = (arguments[name].double() * factor).to(dtype)
    if normed:
        arguments |= {"query_norm": normal(48, dtype=dtype), "key_norm": normal(48, dtype=dtype)}
    other = copied(arguments)
    ours, expected = rotary_commit(**arguments), reference.rotary_commit(**other)
    for one, two in ((ours, expected), (arguments["keys"], other["keys"]), (arguments["values"], other["values"])):
        known = ~two.isnan()
        assert torch.equal(~one.isnan(), known)
        assert torch.equal(bits(one[known]), bits(two[known]))


# ---- Rows


@DTYPES
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotary_dim", [128, 24])
def test_a_row_depends_on_no_other_and_not_on_threads(rotary_dim, normed, dtype):
    n = CAPACITY
    arguments = call(n, 14, 4, 128, dtype, rotary_dim)  # more than enough for all threads
    if normed:
        arguments |= {"query_norm": normal(128, dtype=dtype), "key_norm": normal(128, dtype=dtype)}
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        together = rotary_commit(**arguments)
    finally:
        torch.set_num_threads(threads)
    for first, last in ((0, 1), (17, 18), (5, 8), (n - 1, n)):
        part = {name: arguments[name][first:last] for name in ("query", "key", "value", "cos", "sin", "rows")}
        keys, values = cache(4, 128, 128, dtype)
        alone = rotary_commit(**(arguments | part | {"keys": keys, "values": values}))
        assert torch.equal(bits(alone), bits(together[first:last]))
        at = part["rows"]
        assert torch.equal(bits(keys[:, at]), bits(arguments["keys"][:, at]))
        assert torch.equal(bits(values[:, at]), bits(arguments["values"][:, at]))


def test_rows_of_padding_may_share_a_place():
    arguments = call(8, 4, 2, 64, torch.bfloat16)
    spare = CAPACITY - 1
    arguments["rows"] = torch.tensor([3, 4, 5, *[spare] * 5])
    other = copied(arguments)
    ours, expected = rotary_commit(**arguments), reference.rotary_commit(**other)
    assert torch.equal(bits(ours), bits(expected))
    for name in ("keys", "values"):
        assert torch.equal(bits(arguments[name][:, :spare]), bits(other[name][:, :spare]))
        assert not arguments[name][:, spare].isnan().any()


@on_cpu
@pytest.mark.parametrize("row", [-1, CAPACITY, 2**62, -(2**63)])
def test_nothing_is_written_when_a_row_is_out_of_range(row):
    arguments = call(3, 4, 2, 64, torch.float32)
    arguments["rows"] = torch.tensor([0, 1, row])
    for function in (rotary_commit, reference.rotary_commit):
        with pytest.raises(ValueError, match=r"^rows: expected rows"):
            function(**arguments)
    assert arguments["keys"].isnan().all()
    assert arguments["values"].isnan().all()


# ---- Bad input


@on_cpu
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": torch.zeros(3, 8)}, "query: expected shape \\[n, Hq, D\\]"),
        ({"query": torch.zeros(3, 4, 8, dtype=torch.float64)}, "query: expected float32, bfloat16 or float16"),
        ({"query": torch.zeros(3, 4, 16)[..., ::2]}, "query: expected stride 1"),
        ({"query": torch.zeros(2, 4, 8)}, "key: expected shape \\[n, Hkv, D\\] = \\[2, \\*, 8\\]"),
        ({"key": torch.zeros(3, 2, 8).half()}, "key: expected float32, got float16"),
        ({"key": torch.zeros(3, 2, 16)[..., ::2]}, "key: expected stride 1"),
        ({"value": torch.zeros(3, 1, 6)}, "value: expected shape \\[n, Hkv, Dv\\]"),
        ({"value": torch.zeros(3, 2, 6).half()}, "value: expected float32, got float16"),
        ({"value": torch.zeros(3, 2, 12)[..., ::2]}, "value: expected stride 1"),
        ({"cos": torch.zeros(2, 4)}, "cos: expected shape \\[n, R\\]"),
        ({"cos": torch.zeros(3, 3)}, "cos: expected \\[n, R\\] with an even R from 2 to D = 8, got \\[3, 3\\]"),
        ({"cos": torch.zeros(3, 10)}, "cos: expected \\[n, R\\] with an even R"),
        ({"cos": torch.zeros(3, 0)}, "cos: expected \\[n, R\\] with an even R"),
        ({"cos": torch.zeros(3, 4).half()}, "cos: expected float32, got float16"),
        ({"cos": torch.zeros(3, 8)[:, ::2]}, "cos: expected stride 1"),
        ({"sin": torch.zeros(3, 6)}, "sin: expected shape \\[n, R\\] = \\[3, 4\\]"),
        ({"sin": torch.zeros(3, 4).half()}, "sin: expected float32, got float16"),
        ({"sin": torch.zeros(3, 8)[:, ::2]}, "sin: expected stride 1"),
        ({"rows": torch.arange(2)}, "rows: expected shape \\[n\\]"),
        ({"rows": torch.arange(3, dtype=torch.int32)}, "rows: expected int64"),
        ({"rows": torch.arange(6)[::2]}, "rows: expected a contiguous"),
        ({"keys": torch.zeros(2, 5, 7)}, "keys: expected shape \\[Hkv, C, D\\]"),
        ({"keys": torch.zeros(2, 5, 8).half()}, "keys: expected float32, got float16"),
        ({"keys": torch.zeros(2, 5, 16)[..., ::2]}, "keys: expected stride 1"),
        ({"keys": torch.zeros(1, 5, 8).expand(2, 5, 8)}, "keys: expected rows in memory of their own, got stride 0"),
        ({"keys": torch.zeros(90).as_strided((2, 5, 8), (40, 4, 1))}, "keys: expected rows in memory of their own"),
        ({"values": torch.zeros(2, 4, 6)}, "values: expected shape \\[Hkv, C, Dv\\] = \\[2, 5, 6\\]"),
        ({"values": torch.zeros(2, 5, 6).half()}, "values: expected float32, got float16"),
        ({"values": torch.zeros(2, 5, 12)[..., ::2]}, "values: expected stride 1"),
        ({"values": torch.zeros(2, 1, 6).expand(2, 5, 6)}, "values: expected rows in memory of their own"),
        ({"query_norm": torch.ones(8)}, "key_norm: expected a tensor, as query_norm is one, got None"),
        ({"key_norm": torch.ones(8)}, "query_norm: expected a tensor, as key_norm is one, got None"),
        ({"query_norm": torch.ones(7), "key_norm": torch.ones(8)}, "query_norm: expected shape \\[D\\]"),
        ({"query_norm": torch.ones(8), "key_norm": torch.ones(8).half()}, "key_norm: expected float32, got float16"),
        ({"query_norm": torch.ones(16)[::2], "key_norm": torch.ones(8)}, "query_norm: expected stride 1"),
        ({"eps": -1e-9}, "eps: expected a number from 0 to 1e38, got -1e-09"),
        ({"eps": float("nan")}, "eps: expected a number from 0 to 1e38, got nan"),
    ],
)
def test_bad_input(changes, message):
    query, key, value = joined(3, 4, 2, 8, 6, torch.float32)
    cos, sin = table(3, 4, torch.float32)
    keys, values = torch.zeros(2, 5, 8), torch.zeros(2, 5, 6)
    names = ("query", "key", "value", "cos", "sin", "rows", "keys", "values")
    arguments: dict[str, Any] = dict(
        zip(names, (query, key, value, cos, sin, torch.arange(3), keys, values), strict=True)
    )
    rotary_commit(**arguments)
    with pytest.raises(ValueError, match=f"^{message}"):
        rotary_commit(**(arguments | changes))


def test_16_bit_tables_are_of_querys_dtype():
    arguments = call(3, 4, 2, 8, torch.float16, table_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"^cos: expected float16, got bfloat16"):
        rotary_commit(**arguments)


@pytest.mark.parametrize("normed", [False, True])
def test_registration(normed):
    arguments = call(3, 4, 2, 8, torch.float32)
    norms = [normal(8) if normed else None for _ in range(2)]
    tensors = list(arguments.values())[:8]
    torch.library.opcheck(torch.ops.specbranch.rotary_commit.default, (*tensors, *norms, 1e-6, False, True, False))
