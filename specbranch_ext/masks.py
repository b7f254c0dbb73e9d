"""Dense attention masks of trees, for an attention of one's own."""

import torch
from torch import Tensor

from .ops._checks import checked, describe


@checked
def tree_mask(
    ancestors: Tensor,
    prefix_length: int,
    *,
    tree_rows: int | None = None,
    sliding_window: int | None = None,
    dtype: torch.dtype = torch.bool,
) -> Tensor:
    """What `tree_attention` lets every query see, as a mask for torch's scaled_dot_product_attention.

    The keys are the prefix, then the tree's rows: what the mask shows is what `tree_attention` sees for the same
    prefix_length, ancestors and sliding_window. It is made on the device of ancestors, without waiting for it.

    Args:
        ancestors: int64 [n, words] as `ancestor_mask` gives them, of all nodes of a tree or of some.
        prefix_length: rows before the tree, which all queries see.
        tree_rows: the tree's nodes, at most 64 * words; None: n, all of them are queries.
        sliding_window: a key is visible iff its position is fewer than this many positions before the query's; the
            position of a node is prefix_length + its depth. None: no window.
        dtype: torch.bool: True where the key is visible. A floating-point dtype: 0 there and -inf elsewhere, to be
            added to the scores. Not the least finite number: added to scores that are low themselves it hides less,
            and every node sees itself, so no row is all -inf.

    Returns:
        [n, prefix_length + tree_rows] in dtype; it broadcasts over sequences and heads.

    Raises:
        ValueError: wrong shape or dtype, a negative length, an empty row of ancestors, or a bit behind tree_rows; the
            message names the argument. On a CUDA device the bits are not looked at: a row without any shows the prefix
            alone.

    Source: the topology-aware mask of SpecInfer (arXiv 2305.09781, section 4.2).
    """
    if ancestors.dim() != 2 or ancestors.dtype != torch.int64:
        raise ValueError(f"ancestors: expected int64 of shape [n, words], got {describe(ancestors)}")
    rows = ancestors.shape[0] if tree_rows is None else tree_rows
    if prefix_length < 0:
        raise ValueError(f"prefix_length: expected at least 0, got {prefix_length}")
    if not 0 <= rows <= 64 * ancestors.shape[1]:
        raise ValueError(f"tree_rows: expected 0 to {64 * ancestors.shape[1]}, the bits of ancestors, got {rows}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window: expected None or at least 1, got {sliding_window}")
    if dtype != torch.bool and not dtype.is_floating_point:
        raise ValueError(f"dtype: expected torch.bool or a floating-point dtype, got {dtype}")
    bits = ancestors.unsqueeze(-1) >> torch.arange(64, device=ancestors.device) & 1
    in_tree = bits.flatten(1).bool()
    if ancestors.device.type == "cpu":
        if bool(in_tree[:, rows:].any()):
            raise ValueError(f"ancestors: expected no bit behind the {rows} tree rows")
        if not bool(in_tree.any(1).all()):
            raise ValueError("ancestors: expected every row to have its node's own bit")
    in_prefix = in_tree.new_ones(ancestors.shape[0], prefix_length)
    visible = torch.cat([in_prefix, in_tree[:, :rows]], 1)
    if sliding_window is not None:
        # A query sees one key at every position up to its own: those behind a key are the positions in between.
        visible &= visible.sum(1, keepdim=True) - visible.cumsum(1) < sliding_window
    if dtype == torch.bool:
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
