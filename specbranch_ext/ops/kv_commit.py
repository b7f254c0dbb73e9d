"""kv_commit: an accepted path's rows move behind the committed prefix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from ._library import int64_scalar, register


def _cpu(buffers: list[Tensor], rows: Tensor, start: Tensor) -> None:
    _C.kv_commit(buffers, rows, start, torch.get_num_threads())


def _fake(buffers: list[Tensor], rows: Tensor, start: Tensor) -> None:
    return None


_op = register("kv_commit(Tensor(a!)[] buffers, Tensor rows, Tensor start) -> ()", _cpu, _fake)


def kv_commit(buffers: Sequence[Tensor], rows: Tensor, start: int | Tensor) -> None:
    """Move cache rows in place: `new[:, start + i] = old[:, rows[i]]` for i < m, in every buffer.

    Source and destination may overlap, and a row may be named twice. Rows already in place move nothing. When
    an error is raised, nothing has moved.

    Args:
        buffers: the keys and values of every layer, each [Hkv, C, D] of any dtype, contiguous in the last
            dimension; the shapes may differ. No two may share memory.
        rows: int64 [m], contiguous: where the rows of the accepted path lie, in the order of the path.
        start: int or int64 []: the length of the committed prefix.

    Raises:
        ValueError: wrong shape, dtype or stride, a row outside [0, C), or start + m > C; the message names
            the tensor.
    """
    _op(list(buffers), rows, int64_scalar(start, "start", rows.device))
