"""Whether a model's steps can be captured in CUDA graphs: found out beforehand, on the meta device.

A step that asks the device for a value (a branch on data, an `item()`) cannot be captured, and on the meta device there
are no values, so that such a step raises there. That takes no memory and leaves the model alone.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from specbranch.runtime.batch import Inputs
from specbranch.runtime.cache import BranchCache
from specbranch.runtime.model import CachedModel
from specbranch.runtime.modes import inference
from specbranch.runtime.rotary import kinds_by_length
from specbranch.runtime.support import meta_twin, places
from specbranch_ext import draft_sample, verify

PROBED_ROWS = 3


def why_not_captured(model: PreTrainedModel) -> str | None:
    """None if both kinds of step pass on the meta device, else the reason in one line."""
    if len(spread := places(model)) > 1:
        return f"its layers lie on several devices ({', '.join(sorted(spread))})"
    if kinds := kinds_by_length(model):
        return f"its rotary embedding ({', '.join(kinds)}) chooses its frequencies by the length of the text"
    try:
        _probe(CachedModel(meta_twin(model, model.dtype), "target"))
    except Exception as error:  # whatever a model's code raises
        first = (str(error).strip().splitlines() or [""])[0]
        return f"a step on the meta device raised {type(error).__name__}: {first}"
    return None


@inference
def _probe(cached: CachedModel) -> None:
    meta = torch.device("meta")
    cached.cache = BranchCache.alone(cached.layers, 2 * PROBED_ROWS, meta)
    rows = torch.arange(PROBED_ROWS, device=meta)
    ancestors = torch.ones(PROBED_ROWS, 1, dtype=torch.int64, device=meta)
    scalar = torch.zeros((), dtype=torch.int64, device=meta)
    with cached.attached():
        logits = cached.forward(Inputs(rows, rows, rows, scalar, ancestors))
    verify(logits, rows, rows, rows, seed=scalar)
    draft_sample(logits, rows, 2, seed=scalar)
