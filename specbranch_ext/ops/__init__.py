"""The ops: typed functions over operators registered with `torch.library` as `torch.ops.specbranch.<op>`.

One file per op, each with the schema, the implementation, the fake (shape-only) one that `torch.compile`
needs, and the function meant for use. Bad input raises a ValueError, and what is of another type than the annotation a
TypeError: one line that names the argument, what was expected and what came. No op has a gradient: a tensor that
requires grad is bad input while grad mode is on.
"""

from .advance import advance
from .ancestor_mask import AncestorMask, ancestor_mask
from .draft_sample import DraftSample, draft_sample
from .gated_activation import gated_activation
from .gumbel_noise import gumbel_noise
from .kv_commit import kv_commit
from .linear import linear
from .pack_blocks import pack_blocks
from .pack_weight import pack_weight
from .packed_linear import packed_linear
from .quantize_weight import quantize_weight
from .rms_norm import RmsNorm, rms_norm
from .rotary_commit import rotary_commit
from .tree_attention import tree_attention
from .unpack_rows import unpack_rows
from .verify import Verification, verify
from .verify_rejection import RejectionVerification, verify_rejection

__all__ = [
    "AncestorMask",
    "DraftSample",
    "RejectionVerification",
    "RmsNorm",
    "Verification",
    "advance",
    "ancestor_mask",
    "draft_sample",
    "gated_activation",
    "gumbel_noise",
    "kv_commit",
    "linear",
    "pack_blocks",
    "pack_weight",
    "packed_linear",
    "quantize_weight",
    "rms_norm",
    "rotary_commit",
    "tree_attention",
    "unpack_rows",
    "verify",
    "verify_rejection",
]
