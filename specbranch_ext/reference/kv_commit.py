"""kv_commit in plain torch."""

from collections.abc import Sequence

import torch
from torch import Tensor


def kv_commit(buffers: Sequence[Tensor], rows: Tensor, start: int | Tensor) -> None:
    """As `specbranch_ext.kv_commit`: in place, `new[:, start + i] = old[:, rows[i]]`, or start[i], in every buffer."""
    m = rows.shape[0]
    each = isinstance(start, Tensor) and start.dim() == 1
    places = torch.as_tensor(start) if each else torch.arange(m) + int(start)
    if len(places.unique()) < m:
        raise ValueError("start: expected another place for each row")
    for buffer in buffers:
        for name, numbers in (("start", places), ("rows", rows)):
            if m > 0 and (int(numbers.min()) < 0 or int(numbers.max()) >= buffer.shape[1]):
                raise ValueError(f"{name}: expected rows from 0 to {buffer.shape[1] - 1}")
    for buffer in buffers:
        # Indexing with a tensor copies, so source and destination may overlap.
        buffer[:, places] = buffer[:, rows]
