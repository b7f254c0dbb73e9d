"""kv_commit: an accepted path's rows move behind the committed prefix."""

from collections.abc import Sequence

from torch import Tensor

from ._checks import checked
from ._library import int64_scalar, register

_op = register("kv_commit(Tensor(a!)[] buffers, Tensor rows, Tensor start) -> ()", device_of=1)


@checked
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
            the tensor. On a CUDA device only shapes, dtypes and strides raise: a row outside [0, C), or one that
            would go there, does not move, so a path padded with -1 moves up to its end.
    """
    _op(list(buffers), rows, int64_scalar(start, "start", rows.device))
