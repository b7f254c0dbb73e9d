"""What the fuzzer hands to an op, as values whose text makes them again, so that a call can be replayed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from allowed_tokens import of_kind, pack
from gguf_blocks import make_blocks
from torch import Tensor

from specbranch_ext import pack_weight, reference

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FILLS = ["normal", "peaked", "ties", "zero", "masked", "subnormal", "tiny", "large", "wide", "largest"]
BAD_FILLS = ["nan", "inf", "minus_inf", "all_masked"]
LAYOUTS = ["plain", "rows", "offset", "expanded"]


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in memory of another shape, with seven around them."""
    if layout in ("plain", "dense") or values.dim() == 0:  # dense: for arguments that must be contiguous
        return values
    if layout == "expanded":
        return values[:1].expand_as(values)
    *leading, last = values.shape
    if layout == "step":
        around = torch.full((*leading, 2 * last + 1), 7).to(values.dtype)[..., 1::2]
    elif layout == "transposed":
        around = torch.full((last, *leading), 7).to(values.dtype).movedim(0, -1)
    else:  # the last dimension stays whole
        before = 1 if layout == "offset" else 4
        around = torch.full((*leading, last + before + 3), 7).to(values.dtype)[..., before : before + last]
    return around.copy_(values)


@dataclass(frozen=True)
class Floats:
    """A tensor of floats: random ones of a kind."""

    shape: tuple[int, ...]
    fill: str = "normal"
    dtype: str = "float32"
    layout: str = "plain"
    seed: int = 0

    def make(self) -> Tensor:
        x = torch.from_numpy(np.random.default_rng(self.seed).standard_normal(self.shape, dtype=np.float32))
        flat, some = x.view(-1), slice(self.seed % 3, None, 5)
        if self.fill == "peaked":
            flat[some] += 12.0
        elif self.fill == "ties":
            x.round_()
        elif self.fill == "masked":
            flat[some] = -torch.inf
        elif self.fill == "wide":
            x.copy_(x.sign() * torch.exp2(x.abs() * 30 - 60))
        elif self.fill in BAD_FILLS:
            bad = {"nan": torch.nan, "inf": torch.inf}.get(self.fill, -torch.inf)
            (flat if self.fill == "all_masked" else flat[some]).fill_(bad)
        else:
            x *= {"zero": 0.0, "subnormal": 1e-40, "tiny": 1e-36, "large": 1e4, "largest": 1e38}.get(self.fill, 1.0)
        if self.dtype == "float16" and self.fill in ("large", "largest"):
            x.clamp_(-6e4, 6e4)
        return laid_out(x.to(DTYPES[self.dtype]), self.layout)


@dataclass(frozen=True)
class Packed:
    """A packed weight."""

    weight: Floats

    def make(self) -> Any:
        return pack_weight(self.weight.make().contiguous())


@dataclass(frozen=True)
class Blocks:
    """Blocks of quantised weights [out, weights]."""

    format: str
    shape: tuple[int, int]
    seed: int = 0

    def make(self) -> Tensor:
        torch.manual_seed(self.seed)
        return make_blocks(self.format, *self.shape)


@dataclass(frozen=True)
class Ints:
    """int64 [n], [n, m] for tuples of tuples, or [] for one value that is no tuple."""

    values: tuple[int, ...] | tuple[tuple[int, ...], ...] | int
    layout: str = "plain"

    def make(self) -> Tensor:
        return laid_out(torch.tensor(self.values, dtype=torch.int64), self.layout)


@dataclass(frozen=True)
class Doubles:
    """float64 [4], or [n, 4] for tuples of tuples: the tensor `filters`."""

    values: tuple[float, ...] | tuple[tuple[float, ...], ...]

    def make(self) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float64)


@dataclass(frozen=True)
class Allowed:
    """A mask of tokens: of a kind, or "none" of them; tokens behind the vocabulary have any bit."""

    rows: int
    vocabulary: int
    kind: str = "half"
    layout: str = "plain"
    seed: int = 0

    def make(self) -> Tensor:
        if self.kind == "none":
            tokens = torch.zeros(self.rows, self.vocabulary, dtype=torch.bool)
        else:
            tokens = of_kind(self.kind, self.rows, self.vocabulary, self.seed)
        return laid_out(pack(tokens, behind=self.seed % 2), self.layout)


@dataclass(frozen=True)
class Ancestors:
    """The ancestor bits of a tree, without those of its first nodes."""

    parents: tuple[int, ...]
    first: int = 0

    def make(self) -> Tensor:
        return reference.ancestor_mask(torch.tensor(self.parents, dtype=torch.int64)).ancestors[self.first :]


@dataclass(frozen=True)
class Bytes:
    """A cache buffer of any dtype: random bytes."""

    shape: tuple[int, ...]
    dtype: str
    layout: str = "plain"
    seed: int = 0

    def make(self) -> Tensor:
        most = 2 if self.dtype == "bool" else 100
        numbers = torch.from_numpy(np.random.default_rng(self.seed).integers(0, most, self.shape))
        return laid_out(numbers.to(getattr(torch, self.dtype)), self.layout)


def _matrix() -> Tensor:
    return torch.arange(12, dtype=torch.float32).view(3, 4)


ODD: dict[str, Any] = {
    "none": lambda: None,
    "true": lambda: True,
    "int": lambda: 3,
    "negative": lambda: -1,
    "int_beyond_64_bits": lambda: 2**70,
    "largest_int": lambda: 2**63 - 1,
    "lowest_int": lambda: -(2**63),
    "float": lambda: 2.5,
    "whole_float": lambda: 2.0,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "minus_zero": lambda: -0.0,
    "tiny": lambda: 1e-40,
    "subnormal": lambda: 5e-324,
    "largest_float": lambda: 1.7e308,
    "beyond_float32": lambda: 1e39,
    "complex": lambda: 1j,
    "text": lambda: "text",
    "bytes": lambda: b"1",
    "list": lambda: [1, 2],
    "no_list": lambda: [],
    "tensors": lambda: [_matrix(), None],
    "type": lambda: int,
    "array": lambda: np.zeros((2, 3), dtype=np.float32),
    "numpy_int": lambda: np.int64(2),
    "numpy_float": lambda: np.float32(0.5),
    "numpy_bool": lambda: np.bool_(True),
    "matrix": _matrix,
    "double": lambda: _matrix().double(),
    "int32": lambda: torch.zeros(2, dtype=torch.int32),
    "boolean": lambda: torch.zeros(2, 3, dtype=torch.bool),
    "complex_matrix": lambda: torch.zeros(2, 3, dtype=torch.complex64),
    "negated": lambda: torch.complex(_matrix(), _matrix() + 1).conj().imag,
    "scalar": lambda: torch.tensor(1.0),
    "int_scalar": lambda: torch.tensor(1),
    "ints": lambda: torch.tensor([0, 1, 2]),
    "empty": lambda: torch.empty(0),
    "empty_matrix": lambda: torch.empty(0, 4),
    "no_columns": lambda: torch.empty(3, 0),
    "five_dimensions": lambda: torch.zeros(1, 1, 1, 2, 3),
    "step": lambda: torch.arange(6)[::2],
    "transposed": lambda: _matrix().T,
    "expanded": lambda: torch.zeros(1, dtype=torch.int64).expand(3),
    "overlapping": lambda: torch.arange(7.0).as_strided((2, 3, 4), (1, 1, 1)),
    "meta": lambda: _matrix().to("meta"),
    "meta_ints": lambda: torch.empty(3, dtype=torch.int64, device="meta"),
    "meta_scalar": lambda: torch.empty((), dtype=torch.int64, device="meta"),
    "sparse": lambda: _matrix().to_sparse(),
    "requires_grad": lambda: _matrix().requires_grad_(),
    "parameter": lambda: torch.nn.Parameter(torch.zeros(2, 3, 4)),
}


@dataclass(frozen=True)
class Odd:
    """What is most likely wrong in its place."""

    name: str

    def make(self) -> Any:
        return ODD[self.name]()


def made(value: Any) -> Any:
    return (
        [made(item) for item in value] if isinstance(value, list) else value.make() if hasattr(value, "make") else value
    )


@dataclass(frozen=True)
class Call:
    """One call of an op. valid: it must return, unless a row of logits cannot be sampled."""

    op: str
    arguments: dict[str, Any] = field(default_factory=dict)
    valid: bool = True

    def make(self) -> dict[str, Any]:
        return {name: made(value) for name, value in self.arguments.items()}


# ---- One small call of every op, with all its arguments

_LOGITS, _ROWS, _ALLOWED = Floats((2, 5)), Ints((0, 1)), {"allowed": Allowed(2, 5)}
_SAMPLING = {"seed": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
_CACHE = {"query": Floats((2, 1, 4)), "keys": Floats((1, 5, 4)), "values": Floats((1, 5, 4)), "prefix_length": 1}
_ATTENTION = {
    **{"ancestors": None, "scale": None, "sliding_window": None, "softcap": None, "by_position": True},
    **{"starts": None, "sequence": None},
}
_NORMS = {name: Floats((4,)) for name in ("query_norm", "key_norm")}
_ROTARY = {"query": Floats((2, 3, 4)), "cos": Floats((2, 4)), "sin": Floats((2, 4)), "rows": Ints((0, 1)), **_NORMS}
_PAIR = {name: Floats((2, 1, 4)) for name in ("key", "value")} | {
    name: Floats((1, 5, 4)) for name in ("keys", "values")
}
_ROTATION = {"eps": 1e-6, "unit_offset": False, "round_first": True, "interleaved": False}
_WEIGHT, _ROW = Floats((3, 5), dtype="bfloat16"), Floats((2, 5), dtype="bfloat16")
_NORM = {"eps": 1e-6, "unit_offset": False, "round_first": True}
_TREE = {"tokens": _ROWS, "parents": Ints((-1, 0)), "positions": _ROWS}
_ONE, _SAMPLE = Ints(1), Floats((2, 1), layout="dense")
_RESULTS = {
    "buffers": [Bytes((3, 2, 1), "int64"), Floats((3, 2, 1)), Floats((3, 2, 1)), Floats((3, 2))],
    "sample": [Ints(((3,), (4,))), _SAMPLE, _SAMPLE, Floats((2,), layout="dense")],
}
_INPUTS = {
    **{"ids": _ROWS, "positions": _ROWS, "next_positions": _ROWS, "rows": _ROWS, "strides": Ints((2, 2))},
    **{"ancestors": Ints(((1,), (2,))), "prefix": _ONE, "slot": _ONE, "spare": 9},
}
_CHAIN = {"draft_logits": Floats((1, 5)), "tokens": _ROWS, "positions": _ROWS, "block": True}

EXAMPLES = [
    Call("verify", {"target_logits": _LOGITS, **_TREE, **_SAMPLING, "filters": None, "roots": None, **_ALLOWED}),
    Call(
        "draft_sample", {"draft_logits": _LOGITS, "positions": _ROWS, "k": 2, **_SAMPLING, "filters": None, **_ALLOWED}
    ),
    Call("verify_rejection", {"target_logits": _LOGITS, **_CHAIN, **_SAMPLING, **_ALLOWED}),
    Call("gumbel_noise", {"positions": _ROWS, "vocabulary": 5, "seed": 1}),
    Call("tree_attention", {**_CACHE, **_ATTENTION}),
    Call("rotary_commit", {**_ROTARY, **_PAIR, **_ROTATION}),
    Call("rms_norm", {"input": _LOGITS, "weight": Floats((5,)), "residual": Floats((2, 5), seed=1), **_NORM}),
    Call("gated_activation", {"gate": _LOGITS, "up": Floats((2, 5), seed=1), "activation": "silu"}),
    Call("linear", {"input": _LOGITS, "weight": Floats((3, 5)), "bias": Floats((3,))}),
    Call("pack_weight", {"weight": _WEIGHT, "format": "lossless"}),
    Call("pack_blocks", {"blocks": Blocks("q8_0", (3, 32)), "format": "q8_0", "arithmetic": "fast"}),
    Call("quantize_weight", {"weight": Floats((3, 32), dtype="bfloat16"), "format": "q4_0"}),
    Call("unpack_rows", {"weight": Packed(_WEIGHT), "rows": _ROWS}),
    Call("packed_linear", {"input": _ROW, "weight": Packed(_WEIGHT), "bias": Floats((3,), dtype="bfloat16")}),
    Call("kv_commit", {"buffers": [Floats((1, 4, 3))], "rows": _ROWS, "start": 1}),
    Call("ancestor_mask", {"parents": Ints((-1, 0))}),
    Call("advance", {**_RESULTS, **_INPUTS}),
]
