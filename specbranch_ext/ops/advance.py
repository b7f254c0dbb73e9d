"""advance: everything between two draft steps of a burst."""

from collections.abc import Sequence

from torch import Tensor

from ._checks import checked
from ._library import register

_op = register(
    "advance(Tensor(a!)[] buffers, Tensor[] sample, Tensor(b!) ids, Tensor(c!) positions, Tensor(d!) next_positions, "
    "Tensor(e!) rows, Tensor strides, Tensor(f!) ancestors, Tensor prefix, Tensor(g!) slot, int spare) -> ()",
    device_of=2,
)


@checked
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
    """Keep a draft step's results and make its inputs the next step's: each row's best token below it, in place.

    A captured step that ends so can be replayed again and again: a burst of steps needs no host.

    `sample` goes to the buffers at `slot`, which becomes the next one. A row with a stride goes on with its first
    token, at the next position, in the cache row that is its stride further, and sees that row too. A row without one
    is padding: it becomes a copy of the first row, so that nothing comes of it that the first row has not, in the
    cache row `spare`. With a prefix for each row it copies the last row before it that has a stride (the first row,
    where there is none): that is of its own text. When an error is raised, nothing is written.

    Args:
        buffers: the results of every step of the burst, contiguous, written: tokens int64 [S, R, k], scores and
            confidence float32 [S, R, k], entropy float32 [S, R], R at least n. No two tensors that are written may
            share memory.
        sample: a `DraftSample`, or its four tensors, contiguous: tokens, scores and confidence [n, k], k at least 1,
            entropy [n]. The token -1 (none) becomes the id 0.
        ids: int64 [n], contiguous, written: the rows' tokens.
        positions: int64 [n], contiguous, written: where they stand.
        next_positions: int64 [n], contiguous, written: positions + 1, which `draft_sample` is called with.
        rows: int64 [n], contiguous, written: the cache rows of their K/V.
        strides: int64 [n], contiguous: the number of leaves, or 0 for padding.
        ancestors: int64 [n, words], contiguous, written: bit j % 64 of word j // 64 says that a row sees the cache row
            prefix + j. A next cache row beyond them gets no bit: the batch behind a burst's last step, which nobody
            runs, may lie there.
        prefix: int64 []: the number of committed cache rows. For rows of several texts in one cache int64 [n],
            contiguous: of each row, the cache row behind what its text has committed.
        slot: int64 [], written.
        spare: a cache row that nobody reads.

    Raises:
        ValueError: wrong shape, dtype or stride, or a slot outside [0, S); the message names the tensor. On a CUDA
            device only shapes, dtypes and strides raise: with such a slot nothing is written.
    """
    _op(
        list(buffers),
        list(sample),
        ids,
        positions,
        next_positions,
        rows,
        strides,
        ancestors,
        prefix,
        slot,
        spare,
    )
