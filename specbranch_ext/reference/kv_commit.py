"""kv_commit in plain torch."""

from collections.abc import Sequence

from torch import Tensor


def kv_commit(buffers: Sequence[Tensor], rows: Tensor, start: int | Tensor) -> None:
    """As `specbranch_ext.kv_commit`: in place, `new[:, start + i] = old[:, rows[i]]` in every buffer."""
    first, m = int(start), rows.shape[0]
    for buffer in buffers:
        if first < 0 or first + m > buffer.shape[1]:
            raise ValueError(f"start: expected start + m to fit {buffer.shape[1]} rows, got {first} + {m}")
        if m > 0 and (int(rows.min()) < 0 or int(rows.max()) >= buffer.shape[1]):
            raise ValueError(f"rows: expected rows from 0 to {buffer.shape[1] - 1}")
    for buffer in buffers:
        # Indexing with a tensor copies, so source and destination may overlap.
        buffer[:, first : first + m] = buffer[:, rows]
