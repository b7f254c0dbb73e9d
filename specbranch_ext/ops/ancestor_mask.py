"""ancestor_mask: which nodes of a tree see which, as bits."""

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import checked, describe
from ._library import register


class AncestorMask(NamedTuple):
    """Ancestor bits and depths of a tree's nodes."""

    ancestors: Tensor
    """int64 [n, words], words = ceil(n / 64): bit j % 64 of word j // 64 in row i: j is i or above i."""
    depths: Tensor
    """int64 [n]: edges between a node and its root."""


def _outputs(parents: Tensor) -> tuple[Tensor, ...]:
    if parents.dim() != 1:
        raise ValueError(f"parents: expected int64 of shape [n], got {describe(parents)}")
    n = parents.shape[0]
    ancestors = torch.empty((n, (n + 63) // 64), dtype=torch.int64, device=parents.device)
    return ancestors, torch.empty(n, dtype=torch.int64, device=parents.device)


_op = register("ancestor_mask(Tensor parents) -> (Tensor ancestors, Tensor depths)", _outputs)


@checked
def ancestor_mask(parents: Tensor) -> AncestorMask:
    """The ancestor bits that `tree_attention` reads, and the depths that give positions.

    Args:
        parents: int64 [n], contiguous. An earlier node for each node, or -1 for a root.

    Returns:
        AncestorMask of int64 [n, ceil(n / 64)] and int64 [n].

    Raises:
        ValueError: wrong shape or dtype, or a parent that is not an earlier node; the message names the node. On a
            CUDA device such a node, and all below it, get no bits and depth -1.

    Source: the topology-aware mask of SpecInfer (arXiv 2305.09781, section 4.2), as bits.
    """
    return AncestorMask(*_op(parents))
