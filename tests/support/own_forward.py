"""What a model computes by itself over some tokens at any positions, its windows by position."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


def window_mask(places: Sequence[int], window: int | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """[1, 1, n, n], additive."""
    at = torch.tensor(places)
    back = at[:, None] - at
    seen = (back >= 0) & (back < (window or 2**40))
    return torch.zeros(len(places), len(places), dtype=dtype).masked_fill(~seen, -torch.inf)[None, None]


def own_logits(model: PreTrainedModel, tokens: Sequence[int], places: Sequence[int]) -> Tensor:
    """Of the last of the tokens."""
    logits: Tensor = _own_forward(model, tokens, places, use_cache=False).logits[0, -1]
    return logits


def own_cache(
    model: PreTrainedModel, tokens: Sequence[int], places: Sequence[int], argument: str = "past_key_values"
) -> DynamicCache:
    """The K/V of all the tokens. argument: what the model calls its cache."""
    cache = DynamicCache()
    _own_forward(model, tokens, places, use_cache=True, **{argument: cache})
    return cache


def _own_forward(model: PreTrainedModel, tokens: Sequence[int], places: Sequence[int], **options: Any) -> Any:
    window = (
        getattr(model.config, "sliding_window", None) if getattr(model.config, "use_sliding_window", True) else None
    )
    kinds = set(getattr(model.config, "layer_types", None) or ())
    mask: Any = window_mask(places, window, model.dtype)
    if "sliding_attention" in kinds:
        mask = {"full_attention": window_mask(places, None, model.dtype), "sliding_attention": mask}
    elif kinds:
        mask = {"full_attention": window_mask(places, None, model.dtype)}
    with torch.no_grad():
        return model(
            input_ids=torch.tensor([tokens]), position_ids=torch.tensor([places]), attention_mask=mask, **options
        )
