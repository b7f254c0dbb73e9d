"""Where a model's weights are, and the model inside what others wrap around it."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import nn
from transformers import PreTrainedModel

from specbranch.core.errors import SpecBranchError


def unwrapped(model: nn.Module, role: str) -> PreTrainedModel:
    """The transformers model with the adapters' layers in it, of a peft model; others as they are.

    Raises SpecBranchError for adapters that are no layers: learned prompts.
    """
    adapters = getattr(model, "peft_config", None)
    if isinstance(model, PreTrainedModel) or adapters is None:
        return model  # type: ignore[return-value]
    if learned := [name for name, config in adapters.items() if config.is_prompt_learning]:
        kind = adapters[learned[0]].peft_type.value
        raise SpecBranchError(f"{role} adapter {learned[0]!r} is {kind}: expected layers (LoRA), not learned prompts")
    inner: PreTrainedModel = model.get_base_model()  # type: ignore[operator]
    return inner


def parameters_of_forward(model: PreTrainedModel) -> int:
    """How many parameters a forward multiplies with, roughly: all but an embedding that is only looked up, and of
    experts those that a token chooses. Packed weights count as what they stand for."""
    config = model.config.get_text_config()
    chosen, experts = (
        next((count for name in names if isinstance(count := getattr(config, name, None), int)), 1)
        for names in (("num_experts_per_tok",), ("num_local_experts", "num_experts", "n_routed_experts"))
    )
    looked_up = model.get_input_embeddings()
    output = model.get_output_embeddings()
    spare = set() if looked_up is output else {key for key, _, _ in _sizes(looked_up)}
    if output is not None:
        spare -= {key for key, _, _ in _sizes(output)}
    sizes = {key: size * chosen // experts if ".experts." in name else size for key, name, size in _sizes(model)}
    return max(1, sum(size for key, size in sizes.items() if key not in spare))


def _sizes(module: nn.Module) -> Iterator[tuple[int, str, int]]:
    """Of every weight what tells it from others, its name, and the number of parameters. Some come several times."""
    for name, weight in module.named_parameters():
        yield id(weight), name, weight.numel()
    for name, inner in module.named_modules():
        if isinstance(packed := getattr(inner, "packed", None), torch.Tensor):  # see packed.py
            yield id(packed), name, prod(inner.shape)


def execution_device(model: PreTrainedModel) -> torch.device:
    """The device that a model computes on: of offloaded weights, which lie on the meta device between two forwards, the
    one that accelerate brings them to."""
    if model.device.type == "meta":
        for module in model.modules():
            for hook in hooks_of(module):
                device = getattr(hook, "execution_device", None)
                if device is not None:
                    return torch.device(device)
    return model.device


def check_weights(model: nn.Module, role: str) -> None:
    """Raises SpecBranchError for weights that have no values and nobody who brings them."""
    brought: set[str] = set()
    for path, module in model.named_modules():
        parent = path.rpartition(".")[0]
        if (path and parent in brought) or any(True for _ in hooks_of(module)):
            brought.add(path)
            continue
        for name, weight in module.named_parameters(recurse=False):
            if weight.is_meta:
                place = f"{role} model {type(model).__name__}: {path}.{name}"
                raise SpecBranchError(f"{place} is on the meta device: expected a weight with values")


def hooks_of(module: nn.Module) -> Iterator[object]:
    """accelerate's hooks on a module."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))
