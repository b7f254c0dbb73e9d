"""What a model needs of us, and what cannot be decoded with a branch cache and tree attention: found out at load."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from specbranch.core.errors import SpecBranchError
from specbranch.runtime.masks import LayerCall, own_logits, probe
from specbranch.runtime.rotary import kinds_by_length, rereads
from specbranch.runtime.rows.routes import own_forward
from specbranch.runtime.weights import execution_device
from specbranch.runtime.windows import positions_of
from specbranch_ext import cuda_device_problem

# Layers whose state is a K/V row per token; anything else (state space, linear attention) cannot roll back.
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
UNKNOWN_WINDOWS = (1, 2**62)  # any may be among them
CUDA_HEAD_WIDTH = 512  # the widest of specbranch_ext.tree_attention there

# Arguments of an attention function that we honour, or that change nothing in it.
HARMLESS = {
    *("scaling", "sliding_window", "softcap", "dropout", "is_causal", "position_ids", "use_cache"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
}


@dataclass(frozen=True, slots=True)
class Support:
    """What running a model asks of us besides causality.

    windows: the sliding window of each call of the attention in a forward, where it is not the one that the model
    hands to the attention. window_sizes: all that there are, in ascending order. by_length: its rotary embeddings
    choose their frequencies by the length of the text. rereads: the lengths of the text at which transformers reads all
    of it anew.
    """

    windows: tuple[int | None, ...] | None = None
    window_sizes: tuple[int, ...] = field(default=(), compare=False)  # not known of every model without weights
    by_length: bool = False
    rereads: tuple[int, ...] = ()


def check_supported(model: PreTrainedModel, role: str, on: str | None = None) -> tuple[Support, Tensor | None]:
    """Refuse, by name, what cannot be decoded with a branch cache and a registered attention.

    The model may be on the meta device. on: the type of device on which it will run, None for its own. Returns what it
    asks of us, and its own logits over `probe_ids`, [rows, V], where a model with weights was asked.
    """
    name = f"{role} model {type(model).__name__}"
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder or not model.can_generate():
        raise SpecBranchError(f"{name}: expected a decoder-only causal language model")
    if not model._can_set_attn_implementation():
        raise SpecBranchError(f"{name} does not honour transformers' AttentionInterface: specbranch cannot run it")
    if model.device.type not in ("cpu", "meta", "cuda"):
        raise SpecBranchError(f"{role} model on {model.device}: specbranch runs on the CPU and on CUDA devices")
    if model.device.type == "cuda" and (problem := cuda_device_problem(model.device.index or 0)):
        raise SpecBranchError(f"{role} model on {model.device}: specbranch cannot run there: {problem}")
    others = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if others:
        raise SpecBranchError(f"{name} has {', '.join(sorted(others))} layers, which cannot roll back")
    if "position_ids" not in inspect.signature(own_forward(model) or type(model).forward).parameters:
        raise SpecBranchError(f"{name} takes no position_ids: it cannot run over a tree of tokens")
    by_length = bool(kinds_by_length(model))
    lengths = rereads(model) if by_length else ()
    # On the meta device in bfloat16: the kernels of mixtures of experts take nothing else there.
    # Masks that are moved from device to device are not known again.
    moved = model.device.type == "meta" or len(places(model)) > 1
    with trying(name):
        try:
            calls, logits = probe(meta_twin(model, torch.bfloat16) if moved else model)
            if moved and execution_device(model).type != "meta":
                logits = own_logits(model)
        except Exception as error:
            if model.device.type == "meta" and "meta" in str(error).lower():  # it asks for values: with weights it can
                return Support(None, UNKNOWN_WINDOWS, by_length, lengths), None
            raise
    widest = max((call.width for call in calls), default=0)
    if (on or model.device.type) == "cuda" and widest > CUDA_HEAD_WIDTH:
        raise SpecBranchError(f"{name} has heads {widest} wide; on a CUDA device expected at most {CUDA_HEAD_WIDTH}")
    sizes = tuple(sorted({call.window for call in calls if call.window is not None}))
    support = Support(_windows(model, name, calls), sizes, by_length, lengths)
    return support, None if logits.device.type == "meta" else logits


@contextmanager
def trying(name: str) -> Iterator[None]:
    """The context in which a model is tried: whatever its code raises becomes a SpecBranchError that names it."""
    try:
        yield
    except SpecBranchError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise SpecBranchError(f"{name}: a forward over a few tokens raised {type(error).__name__}: {reason}") from error


def places(model: PreTrainedModel) -> set[str]:
    """The devices over which a model is spread; none named for one that lies on a single device."""
    return {str(place) for place in getattr(model, "hf_device_map", {}).values()}


def meta_twin(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the same configuration on the meta device: the same code, and no weights."""
    with torch.device("meta"):
        twin: PreTrainedModel = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    twin.eval()
    return twin


def _windows(model: PreTrainedModel, name: str, calls: list[LayerCall]) -> tuple[int | None, ...] | None:
    """See Support. Raises SpecBranchError for a layer that wants anything but causality and a window."""
    config = model.config.get_text_config()
    layers, positions = config.num_hidden_layers, positions_of(config)
    if len(calls) != layers:
        raise SpecBranchError(
            f"{name} called the registered attention in {len(calls)} of {layers} layers: specbranch cannot run it"
        )
    kept = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=model.config).layers]
    for place, call in enumerate(calls):
        where = f"{name}, layer {place} ({type(call.module).__name__})"
        if call.differs:
            raise SpecBranchError(
                f"{where}: expected an attention mask of causality and at most a sliding window; {call.differs}"
            )
        if "s_aux" in call.arguments:
            raise SpecBranchError(f"{where} uses attention sinks, which specbranch does not support")
        if odd := sorted(call.arguments.keys() - HARMLESS):
            raise SpecBranchError(f"{where} hands {', '.join(odd)} to the attention, which specbranch does not know")
        drops = kept[place] if place < len(kept) else None
        if drops is not None and drops < positions and (call.window is None or call.window > drops):
            raise SpecBranchError(
                f"{where}: transformers keeps {drops} tokens for it, and its attention mask shows it more: "
                "the text would depend on how it is decoded"
            )
    windows = tuple(call.window for call in calls)
    handed = tuple(call.arguments.get("sliding_window") for call in calls)
    return None if windows == handed else windows
