"""Decoder layers of transformers' families: additions go with the norms behind them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from specbranch.runtime.attention import TreeContext
from specbranch.runtime.cache import BranchCache
from specbranch.runtime.fused.attention import Angles, Attention, attention_of
from specbranch.runtime.fused.code import same_class
from specbranch.runtime.fused.mlp import Mlp, mlp_of
from specbranch.runtime.fused.norms import Norm, OtherNorm, norm_of
from specbranch.runtime.fused.products import is_bare

BEFORE = ("llama.LlamaDecoderLayer", "mixtral.MixtralDecoderLayer")  # norms before attention and before the MLP
AROUND = ("gemma2.Gemma2DecoderLayer", "gemma3.Gemma3DecoderLayer")  # and behind them


@dataclass(frozen=True, slots=True)
class Layer:
    """x + attention(norm(x)), then the same with the MLP; behind: norms of what is added."""

    first: Norm | OtherNorm
    attention: Attention
    second: Norm | OtherNorm
    mlp: Mlp | nn.Module
    behind: tuple[Norm | OtherNorm, Norm | OtherNorm] | None

    def __call__(self, hidden: Tensor, angles: Angles, cache: BranchCache, context: TreeContext) -> Tensor:
        """hidden [1, n, H] to [1, n, H]."""
        attended = self.attention(self.first(hidden), angles, cache, context)
        if self.behind is not None:
            attended = self.behind[0](attended)
        normed, hidden = self.second.of_sum(hidden, attended)
        output: Tensor = self.mlp(normed)
        if self.behind is not None:
            output = self.behind[1](output)
        return hidden + output


def layer_of(module: nn.Module) -> Layer | None:
    """The fused layer; None for a module that is of no known kind."""
    kind = type(module)
    around = any(same_class(kind, exemplar) for exemplar in AROUND)
    if not is_bare(module) or not (around or any(same_class(kind, exemplar) for exemplar in BEFORE)):
        return None
    attention = attention_of(module.self_attn)  # type: ignore[arg-type]
    if attention is None or not is_bare(module.mlp):  # type: ignore[arg-type]
        return None

    def norm(name: str) -> Norm | OtherNorm:
        inner: nn.Module = getattr(module, name)
        return norm_of(inner) or OtherNorm(inner)

    before_mlp = "pre_feedforward_layernorm" if around else "post_attention_layernorm"
    behind = (norm("post_attention_layernorm"), norm("post_feedforward_layernorm")) if around else None
    mlp: nn.Module = module.mlp  # type: ignore[assignment]
    return Layer(norm("input_layernorm"), attention, norm(before_mlp), mlp_of(mlp) or mlp, behind)
