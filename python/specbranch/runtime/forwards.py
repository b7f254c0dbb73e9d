"""What is run in the place of modules' forwards while a model is attached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from specbranch.runtime.exact import exact_forward
from specbranch.runtime.fused.forward import fused_forward, fused_of
from specbranch.runtime.fused.layer import Layer
from specbranch.runtime.rows.routes import Forward


def forwards_of(modules: Iterable[nn.Module], device: torch.device) -> Iterator[tuple[nn.Module, Forward]]:
    """Of those that are not to run their own: in fewer kernels where that is known, else with rows that do not depend
    on each other. modules: in the order of the model."""
    within: set[nn.Module] = set()
    for module in modules:
        fused = None if module in within else fused_of(module)
        if isinstance(fused, Layer):
            within.update(fused.inner)  # they are not called
        forward = exact_forward(module, device) if fused is None else fused_forward(module, fused)
        if forward is not None:
            yield module, forward
