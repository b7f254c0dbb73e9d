"""tree_attention in plain torch, with a dense mask."""

from typing import Any

import torch
from torch import Tensor


def ancestor_matrix(ancestors: Tensor) -> Tensor:
    """Bits int64 [n, words] as bool [n, 64 * words]."""
    bits = ancestors.unsqueeze(-1) >> torch.arange(64) & 1
    return bits.flatten(1).bool()


def visible_keys(
    n: int, prefix_length: int, ancestors: Tensor | None, sliding_window: int | None
) -> tuple[Tensor, int]:
    """The dense mask, bool [n, prefix_length + tree rows], and the number of tree rows."""
    tree = torch.ones(n, n, dtype=torch.bool).tril() if ancestors is None else ancestor_matrix(ancestors)
    if not bool(tree.any(1).all()):
        raise ValueError("ancestors: expected every row to have its node's own bit")
    rows = int(tree.any(0).nonzero().max()) + 1 if n else 0
    tree = tree[:, :rows]
    visible = torch.cat([torch.ones(n, prefix_length, dtype=torch.bool), tree], 1)
    if sliding_window is not None:
        # A node's position is the prefix length plus its depth, the number of its proper ancestors.
        in_prefix = torch.arange(prefix_length).expand(n, -1)
        in_tree = prefix_length + tree.long().cumsum(1) - 1
        query_position = prefix_length + tree.sum(1, keepdim=True) - 1
        visible &= query_position - torch.cat([in_prefix, in_tree], 1) < sliding_window
    return visible, rows


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
    """As `specbranch_ext.tree_attention`: [n, Hq, D], [Hkv, C, D] and [Hkv, C, Dv] to [n, Hq, Dv].

    by_position makes no difference. In float64: besides rounding, a process's first float32 tanh in torch is now and
    then off by 1e-4 on one thread.
    """
    if starts is not None and sequence is not None:
        return _each_alone(
            query,
            keys,
            values,
            torch.as_tensor(prefix_length),
            ancestors,
            starts,
            sequence,
            {"scale": scale, "sliding_window": sliding_window, "softcap": softcap},
        )
    prefix = int(prefix_length)
    if not 0 <= prefix <= keys.shape[1]:
        raise ValueError(f"prefix_length: expected 0 to {keys.shape[1]}, got {prefix}")
    visible, rows = visible_keys(query.shape[0], prefix, ancestors, sliding_window)
    length = prefix + rows
    if length > keys.shape[1]:
        raise ValueError(f"ancestors: expected {prefix} + {rows} rows to fit keys' {keys.shape[1]}")
    heads_per_kv = query.shape[1] // keys.shape[0]
    k = keys[:, :length].double().repeat_interleave(heads_per_kv, 0)
    v = values[:, :length].double().repeat_interleave(heads_per_kv, 0)
    scores = torch.einsum("nhd,hcd->hnc", query.double(), k)
    scores *= query.shape[2] ** -0.5 if scale is None else scale
    if softcap is not None and softcap < torch.inf:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hnc,hcd->nhd", weights, v).to(query.dtype)


def _each_alone(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    prefix_lengths: Tensor,
    ancestors: Tensor | None,
    starts: Tensor,
    sequence: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """The queries of each sequence with the rows of the cache from its start on."""
    if bool((sequence.diff() < 0).any()) or not set(sequence.tolist()) <= set(range(len(starts))):
        raise ValueError(f"sequence: expected numbers from 0 to {len(starts) - 1} that do not decrease")
    output = query.new_empty((*query.shape[:2], values.shape[2]))
    for q, (start, prefix) in enumerate(zip(starts.tolist(), prefix_lengths.tolist(), strict=True)):
        if not 0 <= start <= keys.shape[1]:
            raise ValueError(f"starts: expected 0 to {keys.shape[1]}, got {start}")
        own = sequence == q
        bits = None if ancestors is None else ancestors[own]
        output[own] = tree_attention(query[own], keys[:, start:], values[:, start:], prefix, bits, **options)
    return output
