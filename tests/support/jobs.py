"""Generations whose texts are known, and what of a model a generation might leave changed."""

from typing import Any

import torch
from transformers import PreTrainedModel

from specbranch import bundled

PROMPTS = [entry["prompt"] for entry in bundled.prompts()[:6]]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 5},
    {"method": "pearl", "overlap": True},
    {"method": "autoregressive"},
    {"method": "speculative", "length": 3, "temperature": 0.7, "top_k": 20, "seed": 1},
    {"overlap": False},
]
JOBS = [(prompt, settings) for prompt in PROMPTS for settings in SETTINGS]
NEW = 20


def state(model: PreTrainedModel) -> dict[str, Any]:
    """What a generation might leave changed."""
    return {
        "attention": [getattr(getattr(each, "config", None), "_attn_implementation", None) for each in model.modules()],
        "attributes": [sorted(vars(each)) for each in model.modules()],
        "training": [each.training for each in model.modules()],
        "hooks": [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules()],
        "weights": [(name, id(weight), weight.requires_grad) for name, weight in model.named_parameters()],
        "buffers": [(name, id(buffer), buffer.is_inference()) for name, buffer in model.named_buffers()],
        "numbers": [
            [value for value in vars(each).values() if isinstance(value, int | float)] for each in model.modules()
        ],
        "threads": torch.get_num_threads(),
    }
