"""How much of a model runs with fewer kernels, for `doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from specbranch.runtime.attach import Attachment
from specbranch.runtime.batch import Inputs
from specbranch.runtime.cache import BranchCache
from specbranch.runtime.exact import exact_forward
from specbranch.runtime.fused.count import count_kernels
from specbranch.runtime.fused.forward import DIFFERENT, fused_of
from specbranch.runtime.fused.join import join_model
from specbranch.runtime.fused.layer import Layer

if TYPE_CHECKING:
    from specbranch.runtime.model import CachedModel

ROWS = 3


def fused_report(model: PreTrainedModel) -> dict[str, Any]:
    """layers: how many are fused whole. as_they_are: classes of what is not, in layers; why, where it was tried."""
    layers = list(_layers(model))
    whole = sum(isinstance(fused_of(layer), Layer) for layer in layers)
    left = dict.fromkeys(text for layer in layers for text in _left(layer))
    return {"layers": f"{whole} of {len(layers)}", "as_they_are": list(left)}


def kernels_of_step(cached: CachedModel) -> dict[str, int]:
    """Kernels of a forward, with fused layers and with the modules' own. cached: on the meta device."""
    meta = torch.device("meta")
    join_model(cached.model)  # as a model that is loaded has it
    rows = torch.arange(ROWS, device=meta)
    ancestors = torch.ones(ROWS, 1, dtype=torch.int64, device=meta)
    inputs = Inputs(rows, rows, rows, torch.zeros((), dtype=torch.int64, device=meta), ancestors)
    found = {}
    for name, of in (("fused", None), ("as_they_are", exact_forward)):
        cached.cache = BranchCache.alone(cached.layers, 2 * ROWS, meta)
        step = partial(cached.forward, inputs)
        with Attachment([cached.model], forward_of=of).attached():
            step()  # what is set up lazily
            found[name] = count_kernels(step).total()
    return found


def _layers(model: PreTrainedModel) -> Iterator[nn.Module]:
    count = model.config.get_text_config().num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    yield from next(lists, ())


def _left(module: nn.Module) -> Iterator[str]:
    """What of a module is run as it is, if anything."""
    if fused_of(module) is not None:
        return
    name = type(module).__name__
    if not type(module).__module__.startswith("torch.nn.") and any(True for _ in module.children()):
        yield f"{name}: {DIFFERENT[module]}" if module in DIFFERENT else name
    for child in module.children():
        yield from _left(child)
