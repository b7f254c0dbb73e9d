"""kv_commit: an accepted path's rows move behind the committed prefix."""

from collections.abc import Sequence

from torch import Tensor

from ._checks import checked
from ._library import int64_scalar, register

_op = register("kv_commit(Tensor(a!)[] buffers, Tensor rows, Tensor start) -> ()", device_of=1)


@checked
def kv_commit(buffers: Sequence[Tensor], rows: Tensor, start: int | Tensor) -> None:
    """Move cache rows in place: `new[:, start + i] = old[:, rows[i]]` for i < m, in every buffer.

    Or `new[:, start[i]]`: so the paths of several texts that lie in one buffer move at once.

    Source and destination may overlap, and a row may be named twice. Rows already in place move nothing. When
    an error is raised, nothing has moved.

    Args:
        buffers: the keys and values of every layer, each [Hkv, C, D] of any dtype, contiguous in the last
            dimension; the shapes may differ. No two may share memory.
        rows: int64 [m], contiguous: where the rows of the accepted path lie, in the order of the path.
        start: int or int64 []: the length of the committed prefix. Or int64 [m], contiguous: where each row goes.

    Raises:
        ValueError: wrong shape, dtype or stride, a row or a place outside [0, C), or a place that is named twice; the
            message names the tensor. On a CUDA device only shapes, dtypes and strides raise: a row outside [0, C), or
            one that would go there, does not move, so a path padded with -1 moves up to its end; and a place that is
            named twice may hold either row, or parts of both.
    """
    if not isinstance(start, Tensor):
        start = int64_scalar(start, "start", rows.device)
    _op(list(buffers), rows, start)
