"""ancestor_mask in plain Python."""

import torch
from torch import Tensor

from ..ops.ancestor_mask import AncestorMask


def ancestor_mask(parents: Tensor) -> AncestorMask:
    """As `specbranch_ext.ancestor_mask`: int64 [n] to bits int64 [n, ceil(n / 64)] and depths int64 [n]."""
    parent_of = parents.tolist()
    n = len(parent_of)
    words = (n + 63) // 64
    visible = torch.zeros(n, 64 * words, dtype=torch.bool)
    depths = torch.zeros(n, dtype=torch.int64)
    for node, parent in enumerate(parent_of):
        if not -1 <= parent < node:
            raise ValueError(f"parents: expected an earlier node or -1 for node {node}, got {parent}")
        if parent >= 0:
            visible[node] = visible[parent]
            depths[node] = depths[parent] + 1
        visible[node, node] = True
    # Bit 63 is the sign: the shifts wrap, and the sum of distinct bits does too.
    bits = visible.view(n, words, 64).to(torch.int64) << torch.arange(64)
    return AncestorMask(bits.sum(-1), depths)
