"""What a model's own attention mask says: causality, a sliding window, or something else.

Our forwards hand a model no mask, and the attention applies causality and a window. So what a model puts into its mask
must be known beforehand: one forward of a few rows, with an attention of ours that looks at what every layer is given.
The masks are not read from their tensors, which show a few rows only: transformers hands over the function of
positions that a mask is made of, and windows.py asks it about any positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from specbranch.runtime.attach import Attachment
from specbranch.runtime.cache_argument import cache_argument
from specbranch.runtime.modes import no_grad, with_value
from specbranch.runtime.rotary import steady_forward
from specbranch.runtime.weights import execution_device
from specbranch.runtime.windows import MaskFunction, OtherMask, positions_of, window_of

PROBE = "specbranch_probe"
ROWS = 8


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What one layer gave to the attention.

    width: elements of its widest vectors. window: in its mask, None for plain causality. differs: what else the mask
    does, in words. arguments: the keyword arguments that are set.
    """

    module: nn.Module
    width: int
    window: int | None
    differs: str
    arguments: Mapping[str, Any]


@dataclass
class _Probe:
    """The forward in progress: the masks handed out, with what they say, and the layers seen so far."""

    config: PreTrainedConfig
    masks: list[tuple[Tensor, int | None, str]] = field(default_factory=list)
    calls: list[LayerCall] = field(default_factory=list)

    def said(self, mask: Tensor | None) -> tuple[int | None, str]:
        """Window and difference of a mask that a layer was given."""
        if mask is None:
            return None, "there is none"
        own = None, "the model makes or changes it itself"
        return next(((window, differs) for known, window, differs in self.masks if known is mask), own)


_probe: ContextVar[_Probe] = ContextVar("specbranch_probe")


def probe(model: PreTrainedModel) -> tuple[list[LayerCall], Tensor]:
    """Run a model's own forward over probe_ids: what its layers gave to the attention, in order, and its logits
    [rows, V], which on the meta device have no values."""
    seen = _Probe(model.config.get_text_config())

    forward = partial(with_value, _probe, seen, _forward, model)
    logits = Attachment([model], attention=PROBE, forward_of=steady_forward).turn(forward)
    return seen.calls, logits


def own_logits(model: PreTrainedModel) -> Tensor:
    """The same logits, with the model's own attention."""
    return Attachment([model], attention=None, forward_of=steady_forward).turn(lambda: _forward(model))


@no_grad  # as in generate(): some quantised weights cannot do with inference mode
def _forward(model: PreTrainedModel) -> Tensor:
    ids = probe_ids(model)
    logits: Tensor = model(
        input_ids=ids[None],
        attention_mask=torch.ones_like(ids)[None],
        position_ids=torch.arange(len(ids), device=ids.device)[None],
        use_cache=True,
        logits_to_keep=slice(None),  # as we ask: Gemma 4 does otherwise for a number
        **{cache_argument(type(model)): DynamicCache(config=model.config)},
    ).logits
    return logits[0]


def probe_ids(model: PreTrainedModel) -> Tensor:
    """The tokens of the probe, int64 [rows]."""
    config = model.config.get_text_config()
    rows, vocabulary = min(ROWS, positions_of(config)), int(config.vocab_size)
    return torch.arange(1, rows + 1, device=execution_device(model)) % vocabulary


def _mask(mask_function: MaskFunction, device: torch.device | str, **kwargs: Any) -> Tensor:
    """The mask as sdpa wants it, always as a tensor, by which the attention knows it again."""
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor | None = sdpa_mask(**kwargs, mask_function=mask_function, device=device)
    assert mask is not None
    probe = _probe.get()
    where = torch.device("cpu") if torch.device(device).type == "meta" else torch.device(device)
    window, differs = None, ""
    try:
        window = window_of(mask_function, probe.config, kwargs.get("use_vmap", False), where)
    except OtherMask as error:
        differs = str(error)
    probe.masks.append((mask, window, differs))
    return mask


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Take note of a layer, and attend, in plain torch."""
    probe = _probe.get()
    given = {name: argument for name, argument in kwargs.items() if argument is not None and argument is not False}
    probe.calls.append(LayerCall(module, max(query.shape[-1], value.shape[-1]), *probe.said(attention_mask), given))
    if query.device.type == "meta":
        return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
    groups = query.shape[1] // key.shape[1]
    scores = (query @ key.repeat_interleave(groups, 1).transpose(2, 3)).float()
    scores *= query.shape[-1] ** -0.5 if scaling is None else scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None and attention_mask.dtype == torch.bool:  # another one is refused
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    out = scores.softmax(-1).to(value.dtype) @ value.repeat_interleave(groups, 1)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(PROBE, _attention)
AttentionMaskInterface.register(PROBE, _mask)
