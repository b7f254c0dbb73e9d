"""Fused forwards in the place of modules' own, while a model is attached."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from specbranch.runtime.attention import current
from specbranch.runtime.cache import Buffers
from specbranch.runtime.cache_argument import NAMES
from specbranch.runtime.fused.attention import Attention, attention_of
from specbranch.runtime.fused.causal_lm import CausalLM, causal_lm_of
from specbranch.runtime.fused.layer import Layer, layer_of
from specbranch.runtime.fused.mlp import Mlp, mlp_of
from specbranch.runtime.fused.norms import Norm, norm_of
from specbranch.runtime.rows.routes import ExactForward, replacement

Fused = CausalLM | Layer | Attention | Mlp | Norm
CACHE = (*NAMES, "layer_past")
READ = {"hidden_states", "position_embeddings", *CACHE}
OURS = {"input_ids", "position_ids", "attention_mask", "use_cache", "logits_to_keep"}  # and the cache
KNOWN = READ | {"attention_mask", "position_ids", "use_cache"}  # `running` says what these would


# Modules whose fused forward was tried and does something else, and what (probe.py).
DIFFERENT: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def fused_of(module: nn.Module) -> Fused | None:
    """What a module's forward comes to in fewer kernels; None where that is not known."""
    if module in DIFFERENT:
        return None
    name = type(module).__name__
    if name.endswith("RMSNorm"):
        return norm_of(module)
    if name.endswith("MLP"):
        return mlp_of(module)
    if name.endswith("Attention"):
        return attention_of(module)
    if name.endswith("ForCausalLM"):
        return causal_lm_of(module)
    return layer_of(module) if name.endswith("DecoderLayer") else None


def fused_forward(module: nn.Module, fused: Fused) -> ExactForward:
    """The forward to put in the place of a module's own."""
    if isinstance(fused, Norm):
        return replacement(module, _norm, module, fused)
    if isinstance(fused, Mlp):
        return replacement(module, fused)
    if isinstance(fused, CausalLM):
        return replacement(module, _whole, module, fused)
    return replacement(module, _in_context, module, fused)


def _norm(module: nn.Module, fused: Norm, input: Tensor) -> Tensor:
    if input.dtype != fused.weight.dtype:  # torch would go on in the wider one
        own: Tensor = type(module).forward(module, input)
        return own
    return fused(input)


def _whole(module: nn.Module, fused: CausalLM, *args: Any, **kwargs: Any) -> Any:
    """In a forward of ours, and else as the model does it."""
    named = kwargs.keys() & {*NAMES}
    if current() is None or args or len(named) != 1 or kwargs.keys() - named != OURS:
        return type(module).forward(module, *args, **kwargs)
    return fused(cache=kwargs.pop(*named), **kwargs)


def _in_context(module: nn.Module, fused: Layer | Attention, *args: Any, **kwargs: Any) -> Any:
    """In a forward of ours; in others, and where more is asked for, as the module does it."""
    context, angles = current(), kwargs.get("position_embeddings")
    cache = next((kwargs[name] for name in CACHE if name in kwargs), None)
    ours = len(args) < 2 and kwargs.keys() <= KNOWN
    if context is None or angles is None or not isinstance(cache, Buffers) or not ours:
        return type(module).forward(module, *args, **kwargs)
    output = fused(args[0] if args else kwargs["hidden_states"], angles, cache, context)
    return output if isinstance(fused, Layer) else (output, None)
