"""Whether a model computes over a tree of tokens what it computes by itself over a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from specbranch.core.errors import SpecBranchError
from specbranch.runtime.attach import Attachment
from specbranch.runtime.batch import Inputs
from specbranch.runtime.cache import BranchCache, Buffers
from specbranch.runtime.cache_argument import cache_argument
from specbranch.runtime.masks import probe_ids
from specbranch.runtime.modes import no_grad
from specbranch.runtime.rotary import steady_forward
from specbranch.runtime.windows import positions_of

if TYPE_CHECKING:
    from specbranch.runtime.model import CachedModel

# How far a row's logits may be apart, over how far they are spread: above rounding, and below another computation.
TOLERANCE = {torch.float32: 0.001, torch.float64: 0.001}
TOLERANCE_16_BIT = 0.1
NOISE = 3  # so many times what the model is off from itself is still rounding


class ElsewhereBuffers(Buffers):
    """They pretend to be longer than they are: what a model makes of the length, in place of the positions, shows."""

    pretended = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.pretended


def check_agreement(cached: CachedModel, expected: Tensor) -> None:
    """Compare the logits over `probe_ids` with the model's own, [rows, V]: the last check, of everything that a model
    may do besides what it hands to its attention.

    The tokens are rows of a tree, and siblings of theirs stand between them: a model that does not go by the positions
    and the ancestors that it is given sees another text. Raises SpecBranchError where they differ.
    """
    apart = _apart(over_a_tree(cached, Attachment([cached.model])), expected)
    if apart <= TOLERANCE.get(expected.dtype, TOLERANCE_16_BIT):
        return
    # Of a model that blows rounding up, or whose rows depend on each other, the own logits differ as much.
    if apart > NOISE * _apart(_one_by_one(cached.model), expected):  # not so for NaN, which tells nothing
        raise SpecBranchError(
            f"{cached.role} model {type(cached.model).__name__}: over a tree of tokens its logits are {apart:.0%} off "
            "those of its own forward: specbranch cannot run it"
        )


def _apart(logits: Tensor, expected: Tensor) -> float:
    """The median row's distance: a few rows may differ by more, where a router falls the other way."""
    logits, expected = (each.float() - each.float().mean(-1, keepdim=True) for each in (logits, expected))
    return float(((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).median())


def over_a_tree(cached: CachedModel, attachment: Attachment) -> Tensor:
    """The logits over `probe_ids` as rows of a tree, each but the last with a sibling."""
    tokens = probe_ids(cached.model).tolist()
    rows = 2 * len(tokens) - 1  # token, sibling of the next, next, …
    elsewhere = ElsewhereBuffers(cached.layers, rows + 1, cached.device)
    elsewhere.pretended = positions_of(cached.model.config.get_text_config()) - 1
    kept, cached.cache = cached.cache, BranchCache(elsewhere, 0, rows)
    parents = [-1, *((row - 1) // 2 * 2 for row in range(1, rows))]
    mixed = [tokens[row // 2] if row % 2 == 0 else 0 for row in range(rows)]
    try:
        batch = cached.place(range(rows), parents, mixed, [(row + 1) // 2 for row in range(rows)])
        inputs = Inputs.of([batch], cached.device)
        return attachment.turn(lambda: cached.forward(inputs))[::2]
    finally:
        cached.cache = kept


@no_grad  # as in generate(): some quantised weights cannot do with inference mode
def _one_by_one(model: PreTrainedModel) -> Tensor:
    """The model's own logits again, decoded token by token."""
    cache = {cache_argument(type(model)): DynamicCache(config=model.config)}

    def forward() -> Tensor:
        rows: list[Tensor] = []
        for position, token in enumerate(probe_ids(model)):
            place = torch.full((1, 1), position, device=token.device)
            out = model(input_ids=token[None, None], position_ids=place, use_cache=True, **cache)
            rows.append(out.logits[0, -1])
        return torch.stack(rows)

    return Attachment([model], attention=None, forward_of=steady_forward).turn(forward)
