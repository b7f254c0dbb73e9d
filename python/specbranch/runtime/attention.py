"""Tree attention for transformers' AttentionInterface."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import specbranch_ext  # noqa: F401  (it registers the op)
from specbranch.runtime.modes import with_value

ATTENTION = "specbranch"

T = TypeVar("T")

_tree_attention = torch.ops.specbranch.tree_attention.default


@cache
def no_mask(device: torch.device) -> Tensor:
    """A 4D mask is handed through untouched, so this one keeps transformers from building one that nobody reads."""
    return torch.zeros(1, 1, 1, 1, device=device)


@dataclass
class TreeContext:
    """What the attention and the rotary embeddings of one forward need to know; see `run_in`.

    prefix_length: int64 [], committed cache rows; [s] of several texts. ancestors: int64 [n, words], or None for a
    chain of new rows. starts, sequence: where the rows of several texts lie, as `tree_attention` takes them; None for
    one text at the buffers' beginning.
    by_position: whether a row's bits must not depend on where the tree lies in the cache: see `tree_attention`.
    windows: the sliding window of each layer, in the order of the calls, where the model does not hand it over.
    prompt_end: the position by which rotary embeddings that choose by the length of the text choose for the rows
    before it. first_in_window: the cache row, of a place where the text has a gap, before which no window reaches;
    int64 [s] where it differs from text to text.
    calls: how many layers have asked, so that a model that ignores the registered attention is found out.
    """

    prefix_length: Tensor
    ancestors: Tensor | None = None
    by_position: bool = True
    windows: tuple[int | None, ...] | None = None
    prompt_end: int = -1
    first_in_window: int | Tensor = 0
    starts: Tensor | None = None
    sequence: Tensor | None = None
    calls: int = 0
    _angles: dict[tuple[int, bool], tuple[tuple[Tensor, Tensor], Tensor, Tensor]] = field(default_factory=dict)

    def angles(self, given: tuple[Tensor, Tensor], wide: bool) -> tuple[Tensor, Tensor]:
        """Cosine and sine [n, R] of what a model gives to its layers, [1, n, R]; wide: in float32."""
        key = id(given), wide
        kept = self._angles.get(key)
        if kept is None:
            cos, sin = given[0][0], given[1][0]
            kept = self._angles[key] = (given, cos.float(), sin.float()) if wide else (given, cos, sin)
        return kept[1:]

    @property
    def gapped(self) -> bool:
        """Whether there is a first_in_window."""
        return isinstance(self.first_in_window, Tensor) or self.first_in_window > 0

    def next_window(self, handed: int | None) -> int | None:
        """The sliding window of the layer that asks now; handed: by the model."""
        window = handed if self.windows is None else self.windows[self.calls]
        self.calls += 1
        return window

    def on(self, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """prefix_length, ancestors, starts and sequence on a layer's device: a model may be spread over several."""
        if self.prefix_length.device == device:
            return self.prefix_length, self.ancestors, self.starts, self.sequence

        def there(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        prefix_length = self.prefix_length.to(device, non_blocking=True)
        return prefix_length, there(self.ancestors), there(self.starts), there(self.sequence)


_context: ContextVar[TreeContext | None] = ContextVar("specbranch", default=None)


def run_in(context: TreeContext, forward: Callable[..., T], **inputs: Any) -> T:
    """What a model's forward returns. The context is no argument of it: some models hand none to their layers."""
    return with_value(_context, context, forward, **inputs)


def current() -> TreeContext | None:
    """That of `run_in`; None outside."""
    return _context.get()


def specbranch_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Tree attention for transformers' AttentionInterface.

    query [1, Hq, n, D] with RoPE applied; key, value [1, Hkv, capacity, D], the branch cache's whole buffers.
    Returns [1, n, Hq, D] and no weights. Outside `run_in` it is transformers' own sdpa attention.
    """
    context = current()
    if context is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    out = attend(context, query[0].transpose(0, 1), key[0], value[0], scaling, sliding_window, softcap)
    return out[None], None


def attend(
    context: TreeContext,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float | None,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """The attention of the next layer: query [n, Hq, D], keys and values [Hkv, capacity, D] to [n, Hq, D]."""
    sliding_window = context.next_window(sliding_window)
    prefix_length, ancestors, starts, sequence = context.on(query.device)
    if sliding_window is not None and context.gapped:
        first = context.first_in_window
        if starts is None:
            keys, values = keys[:, int(first) :], values[:, int(first) :]
        else:
            starts = starts + first
        prefix_length = (prefix_length - first).clamp(min=0)  # 0 when a capture warms up
    out: Tensor = _tree_attention(
        query,
        keys,
        values,
        prefix_length,
        ancestors,
        query.shape[2] ** -0.5 if scale is None else scale,
        sliding_window or 0,
        softcap or 0.0,
        context.by_position,
        starts,
        sequence,
    )
    return out


AttentionInterface.register(ATTENTION, specbranch_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # else padding is silently lost outside our own forwards
