"""The sliding window of an attention mask, asked of the function of positions that transformers makes the mask of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import sdpa_mask

from specbranch.runtime.rotary import context_length

FARTHEST = 2**20  # position asked about where the configuration names no limit
DENSE = 17  # the first positions, all asked about
SPLIT = 32  # parts of an interval in which a window's end is looked for

MaskFunction = Callable[[Any, Any, Any, Any], Any]
"""Whether, of a batch and a head, a query's position sees a key's; any of them may be tensors."""


class OtherMask(Exception):
    """A mask that is not causality and at most a window; the message says where they differ."""


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

    def stretched(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return function(batch, head, places[query], places[key])

    count = len(positions)
    mask: Tensor | None = sdpa_mask(
        1, count, count, mask_function=stretched, allow_is_causal_skip=False, use_vmap=use_vmap, device=device
    )
    assert mask is not None
    seen = mask[0, 0]
    if seen.device.type == "meta":
        raise OtherMask("it depends on tensors without values")
    return seen
