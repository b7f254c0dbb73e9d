"""tree_attention: the nodes of a speculation tree attend to the prefix and to their own ancestors."""

from typing import Any

from torch import Tensor

from ._checks import checked, describe
from ._library import int64_scalar, register
from ._tickets import tickets


def _outputs(query: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
    if query.dim() != 3:
        raise ValueError(f"query: expected shape [n, Hq, D], got {describe(query)}")
    if keys.dim() != 3:
        raise ValueError(f"keys: expected shape [Hkv, C, D], got {describe(keys)}")
    if values.dim() != 3:
        raise ValueError(f"values: expected shape [Hkv, C, Dv], got {describe(values)}")
    return query.new_empty((query.shape[0], query.shape[1], values.shape[2]))


def _workspace(query: Tensor, keys: Tensor, values: Tensor, *_: Any) -> tuple[Any, ...]:
    return *query.shape[:2], keys.shape[0], values.shape[2], keys.shape[1]


_op = register(
    "tree_attention(Tensor query, Tensor keys, Tensor values, Tensor prefix_length, Tensor? ancestors, "
    "float scale, SymInt sliding_window, float softcap, bool by_position, Tensor? starts=None, "
    "Tensor? sequence=None) -> Tensor",
    _outputs,
    workspace=_workspace,
    tickets=tickets,
)


@checked
def tree_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix_length: int | Tensor,
    ancestors: Tensor | None = None,
    *,
    scale: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    by_position: bool = True,
    starts: Tensor | None = None,
    sequence: Tensor | None = None,
) -> Tensor:
    """Attention of tree nodes over one layer's cache: the prefix for all, tree rows by ancestor bits.

    Rows [0, prefix_length) of the cache are visible to every query. Tree row j lies at cache row
    prefix_length + j and is visible to query i iff bit j of ancestors[i] is set. The queries may be any subset
    of the tree's nodes. Rows behind the prefix and the tree are never read, and a hidden row does not influence
    a result even if it holds NaN. Sums are float32.

    Bit for bit, the result of a query is a function of the query and of the keys and values that it sees, in the
    order of positions, as long as these are finite: not of prefix_length, of where in the tree's rows its ancestors
    lie, of the other queries, or of the number of threads. So a node has the bits of decoding its path token by
    token. On a CUDA device this holds among calls of the same shapes and dtype.

    With `starts` and `sequence` the cache is one flat buffer for s texts, the sequences, which may overlap or have no
    queries. A query sees its own sequence alone, whose rows begin at starts[q]: what is said here about the cache holds
    for the rows from there on. Its result is bit for bit that of a call with its sequence alone.

    Args:
        query: [n, Hq, D] float32, bfloat16 or float16, rotary embedding applied. Here and in the next two,
            all strides but the last are free.
        keys: [Hkv, C, D], query's dtype. Hkv divides Hq; query head h reads KV head h // (Hq / Hkv).
        values: [Hkv, C, Dv], query's dtype.
        prefix_length: int or int64 []; with starts int64 [s], contiguous.
        ancestors: int64 [n, words] as `ancestor_mask` gives them; every row holds its node's own bit. None: a
            chain, query i sees tree rows 0 to i (a chunk of a prompt), i counted within its sequence.
        scale: factor on the scores, finite; None: D ** -0.5.
        sliding_window: a key is visible iff its position is fewer than this many positions before the
            query's; the position of a tree node is prefix_length + its depth. None: no window.
        softcap: scores become softcap * tanh(score / softcap) after scaling; from 1e-38 up, and one that is far
            above every score, infinity too, changes nothing. None: they stay.
        by_position: sums in the order of positions, so that a query's bits do not depend on how the tree lies in
            the cache. False: in the order of rows, faster on a CUDA device for trees with several leaves. No
            difference on the CPU.
        starts: int64 [s], contiguous: the cache row where each sequence begins. Given together with `sequence`.
        sequence: int64 [n], contiguous: which sequence each query belongs to; it never decreases.

    Returns:
        [n, Hq, Dv] in query's dtype.

    Raises:
        ValueError: wrong shape, dtype or stride, an empty row of ancestors, rows beyond the capacity C, or a
            sequence that there is not or that comes too late; the message names the tensor. On a CUDA device D and Dv
            are at most 512, and prefix_length, ancestors, starts and sequence are read by the kernel alone: a query
            that they send beyond the capacity or whose sequence is wrong gets NaN, one that sees nothing gets zeros.

    Source: tree attention of SpecInfer (arXiv 2305.09781, section 4.2); online softmax over tiles and merging
    of splits as in FlashAttention (arXiv 2205.14135, section 3.1) and Flash-Decoding.
    """
    if query.dim() != 3:
        raise ValueError(f"query: expected shape [n, Hq, D], got {describe(query)}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window: expected None or at least 1, got {sliding_window}")
    if softcap is not None and not softcap >= 1e-38:
        raise ValueError(f"softcap: expected None or a number from 1e-38 up, got {softcap}")
    if starts is None and sequence is None:
        prefix_length = int64_scalar(prefix_length, "prefix_length", query.device)
    elif not isinstance(prefix_length, Tensor):
        raise ValueError(f"prefix_length: expected int64 of shape [s], one of each text, got {describe(prefix_length)}")
    result: Tensor = _op(
        query,
        keys,
        values,
        prefix_length,
        ancestors,
        max(query.shape[2], 1) ** -0.5 if scale is None else scale,
        sliding_window or 0,
        softcap or 0.0,
        by_position,
        starts,
        sequence,
    )
    return result
