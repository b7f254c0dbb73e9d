"""Attention layers of transformers' families: one product, rotary embedding with the cache write, tree attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import specbranch_ext  # noqa: F401  (it registers the ops)
from specbranch.runtime.attention import TreeContext, attend
from specbranch.runtime.cache import Buffers
from specbranch.runtime.fused.code import named, same_class, same_code
from specbranch.runtime.fused.norms import Norm, norm_of
from specbranch.runtime.fused.products import Product, is_bare, joint_product, product_of

_rotary_commit = torch.ops.specbranch.rotary_commit.default

Angles = tuple[Tensor, Tensor]  # cosine and sine, [1, n, R]

APART_FROM = frozenset({"eager_attention_forward", "apply_rotary_pos_emb"})
"""Of attention layers' code: the first is not run, the second looked at by itself."""

# Functions of rotary embeddings: whether pairs lie beside each other, and whether values are rounded only at the end.
ROTARY = {
    "llama.apply_rotary_pos_emb": (False, False),
    "phi3.apply_rotary_pos_emb": (False, False),
    "gpt_neox.apply_rotary_pos_emb": (False, False),
    "olmo2.apply_rotary_pos_emb": (False, False),
    "cohere.apply_rotary_pos_emb": (True, True),
}


@dataclass(frozen=True, slots=True)
class Kind:
    """What attention layers of an exemplar's code have, by name: layers, norms of the heads, and arguments for the
    attention. per_head: one product, in which each head's query, key and value lie together. without: what must be
    off."""

    exemplar: str
    inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"
    norms: tuple[str, str] | None = None
    window: Callable[[Any], int | None] = lambda module: None
    softcap: str | None = None
    per_head: bool = False
    without: str | None = None


def _own_window(module: Any) -> int | None:
    window: int | None = module.sliding_window
    return window


def _configured_window(module: Any) -> int | None:
    return getattr(module.config, "sliding_window", None)


KINDS = (
    Kind("llama.LlamaAttention"),
    Kind("qwen2.Qwen2Attention", window=_own_window),
    Kind("mistral.MistralAttention", window=_configured_window),
    Kind("qwen3.Qwen3Attention", norms=("q_norm", "k_norm"), window=_own_window),
    Kind("gemma2.Gemma2Attention", window=_own_window, softcap="attn_logit_softcapping"),
    Kind("gemma3.Gemma3Attention", norms=("q_norm", "k_norm"), window=_own_window),
    Kind("phi3.Phi3Attention", inputs=("qkv_proj",), window=_configured_window),
    Kind("phi.PhiAttention", output="dense", without="qk_layernorm"),
    Kind("gpt_neox.GPTNeoXAttention", inputs=("query_key_value",), output="dense", per_head=True),
    Kind("cohere.CohereAttention", without="use_qk_norm"),
)


@dataclass(slots=True)
class Attention:
    """number: of the layer. inputs: the product that gives queries, keys and values beside each other, or one for each.
    heads: of queries and of keys. interleaved, late: see ROTARY."""

    number: int
    inputs: Sequence[Product]
    output: Product
    heads: tuple[int, int]
    width: int
    per_head: bool
    norms: tuple[Norm, Norm] | None
    interleaved: bool
    late: bool
    scale: float
    window: int | None
    softcap: float | None

    def __call__(self, hidden: Tensor, angles: Angles, cache: Buffers, context: TreeContext) -> Tensor:
        """hidden [1, n, H] to [1, n, H]; the K/V of the rows are written to the cache."""
        query, key, value = self.projected(hidden)
        cos, sin = context.angles(angles, self.late)
        keys, values = self.buffers(cache, hidden)
        first, second = self.norms or (None, None)
        query = _rotary_commit(
            query,
            key,
            value,
            cos,
            sin,
            cache.rows_on(hidden.device),
            keys,
            values,
            None if first is None else first.weight,
            None if second is None else second.weight,
            0.0 if first is None else first.eps,
            first is not None and first.unit_offset,
            first is None or first.round_first,
            self.interleaved,
        )
        mixed = attend(context, query, keys, values, self.scale, self.window, self.softcap)
        output: Tensor = self.output(mixed.view(1, len(mixed), -1))
        return output

    def buffers(self, cache: Buffers, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The cache's keys and values of this layer, [Hkv, capacity, D]."""
        return cache.branch_layers[self.number].buffers(hidden, self.heads[1], self.width)

    def projected(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [n, Hq, D], keys and values [n, Hkv, D]."""
        n, (queries, keys) = hidden.shape[1], self.heads
        if len(self.inputs) > 1:
            query, key, value = (product(hidden).view(n, -1, self.width) for product in self.inputs)
        elif self.per_head:
            query, key, value = self.inputs[0](hidden).view(n, queries, -1).split(self.width, 2)
        else:
            together = self.inputs[0](hidden).view(n, -1, self.width)
            query, key, value = together.split_with_sizes((queries, keys, keys), 1)
        return query, key, value


def attention_of(module: nn.Module) -> Attention | None:
    """The fused layer; None for a module that is of no known kind."""
    kind, rotary = attention_kind(module), rotary_of(module)
    if kind is None or rotary is None or not is_bare(module):
        return None
    layers = input_layers(module, kind)
    norms = tuple(map(norm_of, head_norms(module, kind)))
    if None in norms or len({(norm.eps, norm.unit_offset, norm.round_first) for norm in norms if norm}) > 1:
        return None
    together = joint_product(layers) if len(layers) > 1 else product_of(layers[0])
    inputs = [product_of(layer) for layer in layers] if together is None else [together]
    width: int = module.head_size if kind.per_head else module.head_dim  # type: ignore[assignment]
    config: Any = module.config
    queries = config.num_attention_heads
    return Attention(
        module.layer_idx,  # type: ignore[arg-type]
        inputs,
        product_of(getattr(module, kind.output)),
        (queries, getattr(config, "num_key_value_heads", None) or queries),
        width,
        kind.per_head,
        norms or None,  # type: ignore[arg-type]
        *rotary,
        module.scaling,  # type: ignore[arg-type]
        kind.window(module),
        getattr(module, kind.softcap) if kind.softcap else None,
    )


def attention_kind(module: nn.Module) -> Kind | None:
    if not type(module).__name__.endswith("Attention"):
        return None
    kind = next((kind for kind in KINDS if same_class(type(module), kind.exemplar, APART_FROM)), None)
    return None if kind is None or (kind.without and getattr(module, kind.without, False)) else kind


def rotary_of(module: nn.Module) -> tuple[bool, bool] | None:
    """Of the function that its code calls: see ROTARY."""
    written = inspect.unwrap(type(module).forward)
    function = getattr(written, "__globals__", {}).get("apply_rotary_pos_emb")
    return next((values for exemplar, values in ROTARY.items() if same_code(function, named(exemplar))), None)


def input_layers(module: nn.Module, kind: Kind) -> list[Any]:
    return [getattr(module, name) for name in kind.inputs]


def head_norms(module: nn.Module, kind: Kind) -> list[nn.Module]:
    return [getattr(module, name) for name in kind.norms or ()]
