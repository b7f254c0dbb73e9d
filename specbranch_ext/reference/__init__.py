"""The ops again, in plain torch: readable, slow, and the definition that every kernel must reproduce."""

from .ancestor_mask import ancestor_mask
from .draft_sample import draft_sample
from .kv_commit import kv_commit
from .linear import linear
from .noise import gumbel_noise
from .tree_attention import tree_attention
from .verify import verify
from .verify_rejection import verify_rejection

__all__ = [
    "ancestor_mask",
    "draft_sample",
    "gumbel_noise",
    "kv_commit",
    "linear",
    "tree_attention",
    "verify",
    "verify_rejection",
]
