"""Calls of every op for the fuzzer: valid ones, at the ends of every range, and such with one odd argument."""

from dataclasses import replace
from typing import Any

from allowed_tokens import KINDS
from fuzz_values import (
    BAD_FILLS,
    DTYPES,
    FILLS,
    LAYOUTS,
    ODD,
    Allowed,
    Ancestors,
    Blocks,
    Bytes,
    Call,
    Doubles,
    Floats,
    Ints,
    Odd,
    Packed,
)
from hypothesis import strategies as st

from specbranch_ext.ops.gated_activation import ACTIVATIONS
from specbranch_ext.ops.quantize_weight import QUANTIZED
from specbranch_ext.packed import ARITHMETICS
from specbranch_ext.reference.blocks import FORMATS

Draw = Any

SEEDS = st.integers(0, 2**32)
NUMBERS = ("temperature", "top_k", "top_p", "min_p")
ENDS = [0, 1, 7, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -1, -5, -(2**63)]
TEMPERATURES = [0.0, 1.0, 0.5, 1.5, 1e-3, 1e-38, 1.2e-38, 1e-30, 1e-20, 1e3, 1e20, 1e30, 1e36, 1e37, 9e37, 1e38]
TOP_P = [1.0, 0.9, 0.5, 0.3, 0.999, 1 - 2.0**-53, 1e-7, 1e-12, 1e-300, 5e-324]
MIN_P = [0.0, 0.05, 0.3, 1.0, 1e-7, 1e-39, 1e-300]
VOCABULARIES = [1, 2, 3, 7, 16, 17, 33, 64, 100, 257]
LARGE_VOCABULARIES = [1001, 4097, 8193]
WIDTHS = [1, 2, 3, 4, 8, 15, 16, 20, 33, 64]
LARGE_WIDTHS = [96, 128, 130, 256, 257, 320, 512]
NORM_WIDTHS = [1, 2, 3, 8, 15, 16, 33, 64, 96, 128, 130, 256, 257, 320, 1000, 1024, 1025, 1536, 3000]
SCALES = [None, None, 0.3, 1.0, 0.0, -1.0, 1e-3, 1e-40, 5e-324]
SOFTCAPS = [None, None, 1e-38, 1e-20, 1e-3, 1.0, 30.0, 1e4, 4e9, 1e30, 1e38, 3e38, 1e300, float("inf")]
WINDOWS = [None, None, 1, 2, 3, 20, 70, 2**31, 2**62, 2**63 - 1]

one_of = st.sampled_from


def rarely(draw: Draw, share: int = 16) -> bool:
    return bool(draw(st.integers(0, share - 1)) == 0)


def vector(draw: Draw, values: st.SearchStrategy[int], n: int) -> Ints:
    return Ints(tuple(draw(st.lists(values, min_size=n, max_size=n))))


def positions(draw: Draw, n: int) -> Ints:
    first = draw(one_of(ENDS))
    return Ints(tuple(min(first + i, 2**63 - 1) for i in range(n)))


def scalar(draw: Draw, value: int) -> int | Ints:
    return Ints(value) if draw(st.booleans()) else value


def parents_of(draw: Draw, n: int, unused: bool) -> tuple[int, ...]:
    lowest = -1 if unused else 0
    return tuple(-1 if i == 0 else draw(st.integers(min(lowest, i - 1), i - 1)) for i in range(n))


def logits(draw: Draw, rows: int, vocabulary: int, dtype: str) -> Floats:
    fill = draw(one_of(BAD_FILLS if rarely(draw) else FILLS))
    return Floats((rows, vocabulary), fill, dtype, draw(one_of(LAYOUTS)), draw(SEEDS))


def row_seeds(draw: Draw, n: int) -> int | Ints:
    return vector(draw, one_of(ENDS), n) if draw(st.booleans()) else scalar(draw, draw(one_of(ENDS)))


def filter_values(draw: Draw, vocabulary: int) -> tuple[Any, ...]:
    return (
        draw(one_of(TEMPERATURES) | st.floats(0.1, 3.0)),
        draw(one_of([0, 0, 1, 2, vocabulary, vocabulary + 1, 2**40]) | st.integers(1, vocabulary)),
        draw(one_of(TOP_P)),
        draw(one_of(MIN_P)),
    )


def filters(draw: Draw, vocabulary: int, rows: int | None = None) -> dict[str, Any]:
    """As numbers; with `rows` also as a tensor, of all rows or of each."""
    values = filter_values(draw, vocabulary)
    kind = draw(one_of(["numbers", "tensor", "rows"])) if rows else "numbers"
    if kind == "rows":
        of_rows = [tuple(map(float, filter_values(draw, vocabulary))) for _ in range(rows or 0)]
        return {"filters": Doubles(tuple(of_rows))}
    if kind == "tensor":
        return {"filters": Doubles(tuple(map(float, values)))}
    return dict(zip(NUMBERS, values, strict=True))


def allowed(draw: Draw, rows: int, vocabulary: int) -> dict[str, Any]:
    if draw(st.booleans()):
        return {}
    kind = "none" if rarely(draw) else draw(one_of(KINDS))
    return {"allowed": Allowed(rows, vocabulary, kind, draw(one_of(LAYOUTS)), draw(SEEDS))}


def texts_of(draw: Draw, n: int) -> dict[str, Any]:
    """Parents and, where there are several texts, their roots."""
    if draw(st.booleans()):
        return {"parents": Ints(parents_of(draw, n, unused=True))}
    roots = sorted(draw(st.sets(st.integers(0, n - 1))))
    own = [max((root for root in roots if root <= row), default=row) for row in range(n)]
    parents = (draw(one_of([-1, *range(own[row], row)])) for row in range(n))
    return {"parents": Ints(tuple(parents)), "roots": Ints((*roots, *[-1] * draw(st.integers(0, 2))))}


def sampled(draw: Draw) -> tuple[int, int, str]:
    """Rows, vocabulary, dtype."""
    vocabulary = draw(one_of(LARGE_VOCABULARIES if rarely(draw, 32) else VOCABULARIES))
    return draw(st.integers(1, 5)), vocabulary, draw(one_of(sorted(DTYPES)))


def verify(draw: Draw) -> dict[str, Any]:
    n, vocabulary, dtype = sampled(draw)
    tokens = st.integers(0, vocabulary - 1) | one_of([*ENDS, vocabulary])
    return {
        "target_logits": logits(draw, n, vocabulary, dtype),
        "tokens": vector(draw, tokens, n),
        **texts_of(draw, n),
        "positions": positions(draw, n),
        "seed": row_seeds(draw, n),
        **filters(draw, vocabulary, n),
        **allowed(draw, n, vocabulary),
    }


def draft_sample(draw: Draw) -> dict[str, Any]:
    n, vocabulary, dtype = sampled(draw)
    return {
        "draft_logits": logits(draw, n, vocabulary, dtype),
        "positions": positions(draw, n),
        "k": draw(st.integers(1, min(vocabulary, 5)) | st.just(min(vocabulary, 256))),
        "seed": row_seeds(draw, n),
        **filters(draw, vocabulary, n),
        **allowed(draw, n, vocabulary),
    }


def verify_rejection(draw: Draw) -> dict[str, Any]:
    n, vocabulary, dtype = sampled(draw)
    tokens = st.integers(0, vocabulary - 1)
    return {
        "target_logits": logits(draw, n, vocabulary, dtype),
        "draft_logits": logits(draw, n - 1, vocabulary, dtype),
        "tokens": vector(draw, tokens | one_of([*ENDS, vocabulary]) if rarely(draw, 4) else tokens, n),
        "positions": positions(draw, n),
        "block": draw(st.booleans()),
        "seed": scalar(draw, draw(one_of(ENDS))),
        **filters(draw, vocabulary),
        **allowed(draw, n, vocabulary),
    }


def gumbel_noise(draw: Draw) -> dict[str, Any]:
    return {
        "positions": positions(draw, draw(st.integers(0, 4))),
        "vocabulary": draw(one_of(VOCABULARIES)),
        "seed": scalar(draw, draw(one_of(ENDS))),
    }


def tree_attention(draw: Draw) -> dict[str, Any]:
    n = draw(st.integers(0, 6) | one_of([17, 40, 70])) if rarely(draw, 4) else draw(st.integers(1, 4))
    heads = draw(one_of([(1, 1), (2, 1), (4, 2), (3, 3), (7, 1)]))
    widths = LARGE_WIDTHS if rarely(draw) else WIDTHS
    dims = draw(one_of(widths)), draw(one_of(widths))
    dtype, fills = draw(one_of(sorted(DTYPES))), [*FILLS, *BAD_FILLS] if rarely(draw, 4) else ["normal"]
    prefix = draw(st.integers(0, 9) | one_of([63, 64, 65, 130]))
    tree = draw(st.integers(0, 3)) if n > 0 else 0  # nodes that are not among the queries
    chain = draw(st.booleans())
    capacity = prefix + n + (0 if chain else tree) + draw(st.integers(0, 5))
    placed: dict[str, Any] = {"prefix_length": scalar(draw, prefix), "starts": None, "sequence": None}
    if rarely(draw, 3):
        texts = draw(st.integers(1, 4))
        starts = draw(st.lists(st.integers(0, 20), min_size=texts, max_size=texts))
        capacity += max(starts)
        placed = {
            "prefix_length": vector(draw, st.integers(0, prefix), texts),
            "starts": Ints(tuple(starts)),
            "sequence": Ints(tuple(sorted(draw(st.lists(st.integers(0, texts - 1), min_size=n, max_size=n))))),
        }

    def floats(*shape: int) -> Floats:
        return Floats(shape, draw(one_of(fills)), dtype, draw(one_of(LAYOUTS)), draw(SEEDS))

    return {
        **placed,
        "query": floats(n, heads[0], dims[0]),
        "keys": floats(heads[1], max(capacity, 1), dims[0]),
        "values": floats(heads[1], max(capacity, 1), dims[1]),
        "ancestors": None if chain else Ancestors(parents_of(draw, n + tree, unused=True), tree),
        "scale": draw(one_of(SCALES)),
        "sliding_window": draw(one_of(WINDOWS)),
        "softcap": draw(one_of(SOFTCAPS)),
        "by_position": draw(st.booleans()),
    }


def rotary_commit(draw: Draw) -> dict[str, Any]:
    n, heads, kv_heads = draw(st.integers(0, 5)), draw(st.integers(0, 3)), draw(st.integers(0, 2))
    dim, value_dim = draw(one_of([2, *WIDTHS[2:], *LARGE_WIDTHS[:3]])), draw(one_of([0, *WIDTHS]))
    rotary_dim = draw(st.integers(1, dim // 2)) * 2 if draw(st.booleans()) else dim // 2 * 2
    capacity = n + draw(st.integers(1, 4))
    dtype, fills = draw(one_of(sorted(DTYPES))), [*FILLS, *BAD_FILLS] if rarely(draw, 4) else ["normal"]
    table = draw(one_of([dtype, "float32"]))

    def floats(*shape: int, layouts: list[str] = LAYOUTS, dtype: str = dtype) -> Floats:
        return Floats(shape, draw(one_of(fills)), dtype, draw(one_of(layouts)), draw(SEEDS))

    def norm() -> Floats | None:
        return floats(dim, layouts=["plain", "offset"]) if normed else None

    normed, places = draw(st.booleans()), draw(st.permutations(range(capacity)))
    return {
        "query": floats(n, heads, dim),
        "key": floats(n, kv_heads, dim),
        "value": floats(n, kv_heads, value_dim),
        "cos": floats(n, rotary_dim, dtype=table),
        "sin": floats(n, rotary_dim, dtype=table),
        "rows": Ints(tuple(places[:n])),
        "keys": floats(kv_heads, capacity, dim, layouts=["plain", "rows", "offset"]),
        "values": floats(kv_heads, capacity, value_dim, layouts=["plain", "rows", "offset"]),
        "query_norm": norm(),
        "key_norm": norm(),
        "eps": draw(one_of([1e-6, 1e-5, 0.0, 0.1, 1e-40, 1e38])),
        **{name: draw(st.booleans()) for name in ("unit_offset", "round_first", "interleaved")},
    }


def rms_norm(draw: Draw) -> dict[str, Any]:
    shape = (*draw(st.lists(one_of([0, 1, 2, 3, 7]), max_size=3)), draw(one_of([0, *NORM_WIDTHS])))
    dtype, fills = draw(one_of(sorted(DTYPES))), [*FILLS, *BAD_FILLS] if rarely(draw, 4) else ["normal"]
    anywhere = [*LAYOUTS, "step", "transposed"]

    def floats(shape: tuple[int, ...], layouts: list[str]) -> Floats:
        return Floats(shape, draw(one_of(fills)), dtype, draw(one_of(layouts)), draw(SEEDS))

    return {
        "input": floats(shape, anywhere),
        "weight": floats(shape[-1:], ["plain", "offset"]),
        "residual": floats(shape, anywhere) if draw(st.booleans()) else None,
        "eps": draw(one_of([1e-6, 1e-5, 0.0, 1e-40, 1.0, 3e38])),
        "unit_offset": draw(st.booleans()),
        "round_first": draw(st.booleans()),
    }


def gated_activation(draw: Draw) -> dict[str, Any]:
    shape = (*draw(st.lists(one_of([0, 1, 2, 3, 7]), max_size=3)), draw(one_of([0, *WIDTHS, 300])))
    dtype, fills = draw(one_of(sorted(DTYPES))), [*FILLS, *BAD_FILLS] if rarely(draw, 4) else ["normal", "large"]

    def floats(*shape: int) -> Floats:
        layouts = [*LAYOUTS, "step", "transposed"]
        return Floats(shape, draw(one_of(fills)), dtype, draw(one_of(layouts)), draw(SEEDS))

    joined = draw(st.booleans())
    return {
        "gate": floats(*shape[:-1], 2 * shape[-1]) if joined else floats(*shape),
        "up": None if joined else floats(*shape),
        "activation": draw(one_of(ACTIVATIONS)),
    }


def linear(draw: Draw) -> dict[str, Any]:
    leading = tuple(draw(st.lists(one_of([0, 1, 2, 3, 7]), max_size=3)))
    width, out = draw(one_of([0, *WIDTHS])), draw(one_of([0, 1, 2, 5, 16, 33]))
    dtype, fills = draw(one_of(sorted(DTYPES))), [*FILLS, *BAD_FILLS] if rarely(draw, 4) else ["normal"]

    def floats(*shape: int, layouts: list[str] = LAYOUTS) -> Floats:
        return Floats(shape, draw(one_of(fills)), dtype, draw(one_of(layouts)), draw(SEEDS))

    return {
        "input": floats(*leading, width, layouts=[*LAYOUTS, "step", "transposed"]),
        "weight": floats(out, width),
        "bias": floats(out, layouts=["plain", "offset"]) if draw(st.booleans()) else None,
    }


def pack_weight(draw: Draw) -> dict[str, Any]:
    shape = (draw(one_of([0, 1, 2, 5, 16, 33])), draw(one_of([0, 1, 31, 32, 33, *WIDTHS, 600])))
    return {"weight": Floats(shape, draw(one_of([*FILLS, *BAD_FILLS])), "bfloat16", draw(one_of(LAYOUTS)), draw(SEEDS))}


def pack_blocks(draw: Draw) -> dict[str, Any]:
    format = draw(one_of(sorted(FORMATS)))
    shape = (draw(one_of([0, 1, 4, 5, 16, 17, 33])), FORMATS[format].weights * draw(st.integers(0, 3)))
    return {"blocks": Blocks(format, shape, draw(SEEDS)), "format": format, "arithmetic": draw(one_of(ARITHMETICS))}


def quantize_weight(draw: Draw) -> dict[str, Any]:
    shape = (draw(one_of([0, 1, 2, 5, 17])), 32 * draw(st.integers(0, 5)))
    weight = Floats(shape, draw(one_of(["normal", "zero", "large"])), "bfloat16", draw(one_of(LAYOUTS)), draw(SEEDS))
    return {"weight": weight, "format": draw(one_of(sorted(QUANTIZED)))}


def unpack_rows(draw: Draw) -> dict[str, Any]:
    shape = (draw(one_of([1, 2, 5, 16, 33])), draw(one_of([0, 1, 31, 32, 33, *WIDTHS, 600])))
    weight = Floats(shape, draw(one_of([*FILLS, *BAD_FILLS])), "bfloat16", "plain", draw(SEEDS))
    return {"weight": Packed(weight), "rows": vector(draw, st.integers(0, shape[0] - 1), draw(st.integers(0, 9)))}


def packed_linear(draw: Draw) -> dict[str, Any]:
    arguments = linear(draw)
    floats = [value for value in arguments.values() if isinstance(value, Floats)]
    input, weight, *bias = (replace(value, dtype="bfloat16") for value in floats)
    return {"input": input, "weight": Packed(weight), "bias": bias[0] if bias else None}


def kv_commit(draw: Draw) -> dict[str, Any]:
    capacity = draw(st.integers(1, 12))
    m = draw(st.integers(0, capacity))
    dtypes = ["float32", "float16", "bfloat16", "uint8", "int64", "bool", "complex64", "float8_e4m3fn"]

    def buffer() -> Bytes:
        shape = (draw(st.integers(0, 3)), capacity + draw(st.integers(0, 2)), draw(one_of([0, 1, 3, 8, 16, 33])))
        return Bytes(shape, draw(one_of(dtypes)), draw(one_of(["plain", "rows", "offset"])), draw(SEEDS))

    return {
        "buffers": [buffer() for _ in range(draw(st.integers(0, 4)))],
        "rows": vector(draw, st.integers(0, capacity - 1), m),
        "start": Ints(tuple(draw(st.permutations(range(capacity)))[:m]))
        if rarely(draw, 3)
        else scalar(draw, draw(st.integers(0, capacity - m))),
    }


def ancestor_mask(draw: Draw) -> dict[str, Any]:
    return {"parents": Ints(parents_of(draw, draw(st.integers(0, 9) | one_of([64, 65])), unused=True))}


def advance(draw: Draw) -> dict[str, Any]:
    n, k, words = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    most_rows, slots, leaves = n + draw(st.integers(0, 3)), draw(st.integers(1, 4)), draw(st.integers(0, n))
    prefix, stride = draw(st.integers(0, 99)), draw(st.integers(1, 9))

    def floats(*shape: int) -> Floats:
        return Floats(shape, draw(one_of([*FILLS, *BAD_FILLS])), "float32", "dense", draw(SEEDS))

    def numbers(*shape: int) -> Bytes:
        return Bytes(shape, "int64", "dense", draw(SEEDS))

    return {
        "buffers": [numbers(slots, most_rows, k), *[floats(slots, most_rows, k)] * 2, floats(slots, most_rows)],
        "sample": [numbers(n, k), floats(n, k), floats(n, k), floats(n)],
        "ids": numbers(n),
        "positions": positions(draw, n),
        "next_positions": numbers(n),
        "rows": vector(draw, st.integers(prefix - 20, prefix + 64 * words), n),
        "strides": Ints((*[stride] * leaves, *[draw(one_of([0, 0, -1]))] * (n - leaves))),
        "ancestors": numbers(n, words),
        "prefix": vector(draw, st.integers(0, prefix), n) if rarely(draw, 3) else Ints(prefix),
        "slot": Ints(draw(st.integers(0, slots - 1))),
        "spare": draw(st.integers(0, 999) | one_of(ENDS)),
    }


OPS = {
    op.__name__: op
    for op in (
        *(verify, draft_sample, verify_rejection, gumbel_noise, tree_attention, kv_commit, ancestor_mask),
        *(linear, pack_weight, pack_blocks, quantize_weight, unpack_rows, packed_linear, advance),
        *(rotary_commit, rms_norm, gated_activation),
    )
}
CPU_ONLY = {"linear", "pack_weight", "pack_blocks", "quantize_weight", "unpack_rows", "packed_linear"}


@st.composite
def calls(draw: Draw, ops: list[str]) -> list[Call]:
    """A valid call, the same in another form, and two with an odd argument."""
    op = draw(one_of(ops))
    call = Call(op, OPS[op](draw))
    odd = [(draw(one_of(sorted(call.arguments))), Odd(draw(one_of(sorted(ODD))))) for _ in range(2)]
    return [call, in_another_form(call), *(Call(op, {**call.arguments, name: value}, False) for name, value in odd)]


def in_another_form(call: Call) -> Call:
    """The same values elsewhere in memory, and the filters of all rows as numbers or as a tensor: the result has the
    same bits."""
    other = {"plain": "offset", "offset": "rows", "rows": "plain"}

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if isinstance(value, (Floats, Bytes, Allowed)):
            return replace(value, layout=other.get(value.layout, value.layout))
        return value

    arguments = {name: moved(value) for name, value in call.arguments.items()}
    if "filters" in arguments and isinstance(arguments["filters"].values[0], tuple):
        pass  # those of each row are no numbers
    elif "filters" in arguments:
        arguments |= zip(NUMBERS, arguments.pop("filters").values, strict=True)
        arguments["top_k"] = int(arguments["top_k"])
    elif call.op in ("verify", "draft_sample"):
        arguments["filters"] = Doubles(tuple(float(arguments.pop(name)) for name in NUMBERS))
    return Call(call.op, arguments)
