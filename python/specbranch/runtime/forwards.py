"""What is run in the place of modules' forwards while a model is attached."""

from __future__ import annotations

import torch
from torch import nn

from specbranch.runtime.exact import exact_forward
from specbranch.runtime.fused.forward import fused_forward
from specbranch.runtime.rows.routes import Forward


def forward_of(module: nn.Module, device: torch.device) -> Forward | None:
    """In fewer kernels where that is known, else with rows that do not depend on each other; None to leave its own."""
    return fused_forward(module) or exact_forward(module, device)
