"""Attaching specbranch to a transformers model: tree attention, and modules whose rows are independent.

Outside `attached(model)` a model is as its owner loaded it, so it can be shared with transformers' own generate().
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from specbranch.runtime.attention import ATTENTION
from specbranch.runtime.exact import exact_forward


@contextmanager
def attached(model: PreTrainedModel) -> Iterator[None]:
    """Run `model` with tree attention and, on the CPU, with layers whose rows do not depend on each other.

    A row's result then does not change with the number of rows in its forward: verifying drafted tokens
    together gives bit for bit what decoding one by one gives.
    """
    previous = model.config._attn_implementation
    patched: list[nn.Module] = []
    model.set_attn_implementation(ATTENTION)
    for module in model.modules():
        forward = exact_forward(module, model.device)
        if forward is not None:
            module.forward = forward
            patched.append(module)
    try:
        yield
    finally:
        for module in patched:
            del module.forward
        model.set_attn_implementation(previous)
