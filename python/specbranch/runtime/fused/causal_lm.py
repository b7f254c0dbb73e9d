"""Whole causal language models of transformers' families: what their forwards do between the layers, and no more.

A small draft takes longer to get through its model's decorators, masks and outputs than through its layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from specbranch.runtime.cache_argument import NAMES, cache_argument
from specbranch.runtime.fused.code import same_class
from specbranch.runtime.fused.products import is_bare

HEAD = "llama.LlamaForCausalLM"
BODIES = ("llama.LlamaModel", "qwen2.Qwen2Model", "mistral.MistralModel")


@dataclass(frozen=True, slots=True)
class CausalLM:
    """Embedding, rotary angles, layers, norm, output layer."""

    module: Any
    layers: tuple[nn.Module, ...]
    layers_call_it: str  # the cache

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        cache: Any,
        use_cache: bool,
        logits_to_keep: slice,
    ) -> CausalLMOutputWithPast:
        """input_ids, position_ids [1, n] to logits [1, rows that are kept, V]."""
        body = self.module.model
        hidden = body.embed_tokens(input_ids)
        angles = body.rotary_emb(hidden, position_ids=position_ids)
        for layer in self.layers:
            hidden = layer(
                hidden,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=angles,
                **{self.layers_call_it: cache},
            )
        hidden = body.norm(hidden)
        return CausalLMOutputWithPast(logits=self.module.lm_head(hidden[:, logits_to_keep]))


def causal_lm_of(module: nn.Module) -> CausalLM | None:
    """The fused model; None for one that is of no known kind."""
    body: Any = getattr(module, "model", None)
    if not is_bare(module) or body is None or not is_bare(body) or not same_class(type(module), HEAD):
        return None
    if not any(same_class(type(body), exemplar) for exemplar in BODIES):
        return None
    layers = tuple(body.layers[: body.config.num_hidden_layers])
    return CausalLM(module, layers, cache_argument(type(layers[0])) if layers else NAMES[0])
