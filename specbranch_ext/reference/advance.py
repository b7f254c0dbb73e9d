"""advance in plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor

WORD = 64


def advance(
    buffers: Sequence[Tensor],
    sample: Sequence[Tensor],
    ids: Tensor,
    positions: Tensor,
    next_positions: Tensor,
    rows: Tensor,
    strides: Tensor,
    ancestors: Tensor,
    prefix: Tensor,
    slot: Tensor,
    spare: int,
) -> None:
    """See `specbranch_ext.ops.advance`."""
    if not 0 <= int(slot) < len(buffers[0]):
        raise ValueError(f"slot: expected one of the {len(buffers[0])} of buffers[0], got {int(slot)}")
    n, real = len(ids), strides > 0
    for buffer, part in zip(buffers, sample, strict=True):
        buffer[int(slot), :n] = part

    new_rows = rows + strides
    bit = new_rows - prefix  # of all rows, or of each
    in_word = torch.arange(ancestors.shape[1]) == (bit // WORD)[:, None]
    sets = real[:, None] & in_word
    seen = ancestors | torch.where(sets, torch.ones_like(ancestors) << (bit % WORD)[:, None], 0)

    source = torch.where(real, torch.arange(n), 0)
    if prefix.dim() > 0 and n > 0:
        source = source.cummax(0).values
    ids[:] = sample[0][source, 0].clamp(min=0)
    positions[:] = positions[source] + 1
    next_positions[:] = positions + 1
    rows[:] = torch.where(real, new_rows, spare)
    ancestors[:] = seen[source]
    slot += 1
