"""What a model's own attention mask says: causality, a sliding window, or something else.

Our forwards hand a model no mask, and the attention applies causality and a window. So what a model puts into its mask
must be known beforehand: one forward of a few rows, with an attention of ours that looks at what every layer is given.
The masks are not read from their tensors, which show a few rows only: transformers hands over the function of
positions that a mask is made of, and that is asked about any positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from specbranch.runtime.attach import Attachment
from specbranch.runtime.rotary import context_length, steady_forward

PROBE = "specbranch_probe"
ROWS = 8
FARTHEST = 2**20  # position asked about where the configuration names no limit
DENSE = 17  # the first positions, all asked about
SPLIT = 32  # parts of an interval in which a window's end is looked for

MaskFunction = Callable[[Any, Any, Any, Any], Tensor]


class OtherMask(Exception):
    """A mask that is not causality and at most a window; the message says where they differ."""


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What one layer gave to the attention.

    window: in its mask, None for plain causality. differs: what else the mask does, in words. arguments: the keyword
    arguments that are set.
    """

    module: nn.Module
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


@torch.inference_mode()
def probe(model: PreTrainedModel) -> tuple[list[LayerCall], Tensor]:
    """Run a model's own forward over probe_ids: what its layers gave to the attention, in order, and its logits
    [rows, V], which on the meta device have no values."""
    ids = probe_ids(model)
    seen = _Probe(model.config.get_text_config())

    def forward() -> Tensor:
        token = _probe.set(seen)
        try:
            logits: Tensor = model(
                input_ids=ids[None],
                attention_mask=torch.ones_like(ids)[None],
                position_ids=torch.arange(len(ids), device=ids.device)[None],
                past_key_values=DynamicCache(config=model.config),
                use_cache=True,
                logits_to_keep=slice(None),  # as we ask: Gemma 4 does otherwise for a number
            ).logits
            return logits[0]
        finally:
            _probe.reset(token)

    logits = Attachment([model], attention=PROBE, forward_of=steady_forward).turn(forward)
    return seen.calls, logits


def probe_ids(model: PreTrainedModel) -> Tensor:
    """The tokens of the probe, int64 [rows]."""
    config = model.config.get_text_config()
    rows = min(ROWS, positions_of(config))
    return torch.arange(1, rows + 1, device=model.device) % config.vocab_size


def _mask(*args: Any, mask_function: MaskFunction, device: Any = "cpu", **kwargs: Any) -> Tensor:
    """The mask as sdpa wants it, always as a tensor, by which the attention knows it again."""
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(*args, mask_function=mask_function, device=device, **kwargs)
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
    probe.calls.append(LayerCall(module, *probe.said(attention_mask), given))
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


# ---- A function of positions, asked


def window_of(function: MaskFunction, config: PreTrainedConfig, use_vmap: bool, device: torch.device) -> int | None:
    """The sliding window of a mask that is causality and at most a window, None for no window.

    Raises OtherMask for any other mask.
    """
    farthest = positions_of(config) - 1
    try:
        window = _window(function, farthest, use_vmap, device)
        positions = _positions(config, window, farthest)
        seen = _seen(function, positions, use_vmap, device)
    except OtherMask:
        raise
    except Exception as error:  # whatever a model's code raises
        raise OtherMask(f"it cannot be asked about positions: {type(error).__name__}: {error}") from error
    places = torch.tensor(positions, device=device)
    back = places[:, None] - places
    expected = back >= 0 if window is None else (back >= 0) & (back < window)
    for query, key in (seen != expected).nonzero()[:1].tolist():
        does = "sees" if bool(seen[query, key]) else "does not see"
        raise OtherMask(f"position {positions[query]} {does} position {positions[key]}")
    return window


def positions_of(config: PreTrainedConfig) -> int:
    """How many positions there are."""
    return max(context_length(config) or FARTHEST, 2)


def _window(function: MaskFunction, farthest: int, use_vmap: bool, device: torch.device) -> int | None:
    """How many positions back from the farthest one is the first that it does not see; None if it sees all."""
    seen, hidden = 0, farthest + 1
    while hidden - seen > 1:
        backs = range(seen + 1, hidden, max(1, (hidden - seen) // SPLIT))
        row = _seen(function, [farthest, *(farthest - back for back in backs)], use_vmap, device)[0, 1:].tolist()
        first = row.index(False) if False in row else len(row)
        seen = backs[first - 1] if first else seen
        hidden = backs[first] if first < len(row) else hidden
    return None if hidden > farthest else hidden


def _positions(config: PreTrainedConfig, window: int | None, farthest: int) -> list[int]:
    """Where a mask could turn: around the window and around every number of the configuration."""
    numbers = {value for value in vars(config).values() if isinstance(value, int) and value > 1}
    around = {multiple * number for number in numbers | ({window} if window else set()) for multiple in (1, 2)}
    turns = {turn + beside for turn in around for beside in (-1, 0, 1)}
    if window is not None:
        turns |= {farthest - window + beside for beside in (-1, 0, 1)}
    powers = {2**i for i in range(farthest.bit_length())}
    return sorted(place for place in {*range(DENSE), *turns, *powers, farthest - 1, farthest} if 0 <= place <= farthest)


def _seen(function: MaskFunction, positions: list[int], use_vmap: bool, device: torch.device) -> Tensor:
    """Which of some positions sees which, bool [n, n]."""
    places = torch.tensor(positions, device=device)

    def stretched(batch: Any, head: Any, query: Any, key: Any) -> Tensor:
        return function(batch, head, places[query], places[key])

    count = len(positions)
    mask = sdpa_mask(
        1, count, count, mask_function=stretched, allow_is_causal_skip=False, use_vmap=use_vmap, device=device
    )
    assert mask is not None
    seen = mask[0, 0]
    if seen.device.type == "meta":
        raise OtherMask("it depends on tensors without values")
    return seen
