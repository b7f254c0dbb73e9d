"""Decoder layers of transformers' families: additions go with the norms behind them; on the CPU all is one call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specbranch.runtime.attention import TreeContext
from specbranch.runtime.cache import Buffers
from specbranch.runtime.fused.attention import Angles, Attention, attention_of
from specbranch.runtime.fused.code import same_class
from specbranch.runtime.fused.mlp import Mlp, mlp_of
from specbranch.runtime.fused.norms import Norm, OtherNorm, norm_of
from specbranch.runtime.fused.products import Dense, Packed, is_bare
from specbranch_ext.ops import _library

AnyNorm = Norm | OtherNorm

# Norms before attention and before the MLP; dropouts behind them, of some, do nothing in evaluation mode.
BEFORE = ("llama.LlamaDecoderLayer", "mixtral.MixtralDecoderLayer", "phi3.Phi3DecoderLayer")
AROUND = ("gemma2.Gemma2DecoderLayer", "gemma3.Gemma3DecoderLayer")  # and behind them
NONE = (None, 0.0, False, False)  # no norm, for the core

_operators_are_watched = torch._C._len_torch_dispatch_stack


@dataclass(frozen=True, slots=True)
class Parts:
    """x + attention(norm(x)), then the same with the MLP; behind: norms of what is added."""

    first: AnyNorm
    attention: Attention
    second: AnyNorm
    mlp: Mlp | nn.Module
    behind: tuple[AnyNorm, AnyNorm] | None


@dataclass(frozen=True, slots=True)
class Layer:
    """bound: the core's DecoderLayer of the parts, which is one call; None where not all of them are for it. inner: the
    modules that the parts stand for."""

    parts: Parts
    bound: Any
    inner: tuple[nn.Module, ...]

    def __call__(self, hidden: Tensor, angles: Angles, cache: Buffers, context: TreeContext) -> Tensor:
        """hidden [1, n, H] to [1, n, H]."""
        # Who looks at operators (a recording, a profile of them) is to see them.
        if self.bound is not None and not context.gapped and not _operators_are_watched():
            return self._in_one_call(hidden, angles, cache, context)
        parts = self.parts
        attended = parts.attention(parts.first(hidden), angles, cache, context)
        if parts.behind is not None:
            attended = parts.behind[0](attended)
        normed, hidden = parts.second.of_sum(hidden, attended)
        output: Tensor = parts.mlp(normed)
        if parts.behind is not None:
            output = parts.behind[1](output)
        return hidden + output

    def _in_one_call(self, hidden: Tensor, angles: Angles, cache: Buffers, context: TreeContext) -> Tensor:
        attention = self.parts.attention
        output = torch.empty_like(hidden)
        self.bound.run(
            hidden,
            *context.angles(angles, attention.late),
            cache.rows,
            *attention.buffers(cache, hidden),
            context.prefix_length,
            context.ancestors,
            context.starts,
            context.sequence,
            context.next_window(attention.window) or 0,
            output,
            torch.get_num_threads(),
        )
        return output


def layer_of(module: nn.Module) -> Layer | None:
    """The fused layer; None for a module that is of no known kind."""
    kind = type(module)
    around = any(same_class(kind, exemplar) for exemplar in AROUND)
    if not is_bare(module) or not (around or any(same_class(kind, exemplar) for exemplar in BEFORE)):
        return None
    layer: Any = module
    attention = attention_of(layer.self_attn)
    if attention is None or not is_bare(layer.mlp):
        return None
    inner = [*layer.self_attn.modules()]

    def norm(name: str) -> AnyNorm:
        each = getattr(layer, name)
        if (fused := norm_of(each)) is None:
            return OtherNorm(each)
        inner.append(each)
        return fused

    before_mlp = "pre_feedforward_layernorm" if around else "post_attention_layernorm"
    behind = (norm("post_attention_layernorm"), norm("post_feedforward_layernorm")) if around else None
    if (mlp := mlp_of(layer.mlp)) is not None:
        inner += layer.mlp.modules()
    parts = Parts(norm("input_layernorm"), attention, norm(before_mlp), mlp or layer.mlp, behind)
    return Layer(parts, bound(parts), tuple(inner))


def bound(parts: Parts) -> Any:
    """The core's DecoderLayer; None where a part is not known, or not on the CPU."""
    attention, mlp = parts.attention, parts.mlp
    if not isinstance(mlp, Mlp) or attention.per_head or _library.core.emulated:
        return None
    first_behind, second_behind = parts.behind or (None, None)
    norms = [parts.first, first_behind, parts.second, second_behind, *(attention.norms or (None, None))]
    gates = [mlp.gate] if mlp.up is None else [mlp.gate, mlp.up]
    products = [*attention.inputs, attention.output, *gates, mlp.down]
    if any(isinstance(norm, OtherNorm) for norm in norms):
        return None
    if not all(isinstance(each, Dense | Packed) and each.on_cpu for each in products):
        return None
    return _library.core.DecoderLayer(
        [NONE if norm is None else norm.bound for norm in norms],
        [each.bound for each in attention.inputs],
        attention.output.bound,
        [each.bound for each in gates],
        mlp.down.bound,
        *attention.heads,
        attention.interleaved,
        attention.scale,
        attention.softcap or 0.0,
        mlp.activation,
    )
