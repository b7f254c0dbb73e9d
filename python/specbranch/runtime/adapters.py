"""Adapters of peft: directories of layers that are added to another checkpoint's model."""

from __future__ import annotations

import json
import os
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME
from transformers.utils.import_utils import is_peft_available
from transformers.utils.peft_utils import find_adapter_config_file

from specbranch.core.errors import SpecBranchError
from specbranch.runtime.checkpoint import ADAPTER_CONFIG, adapter_fault, check_weights, is_gguf, json_fault
from specbranch.runtime.sources import loading, named, resolve


def base_of_adapter(name: str, role: str) -> str | None:
    """The checkpoint that an adapter of peft was made for; None for what is no adapter.

    It is loaded by itself, since transformers, asked for both at once, does not say what the base lacks. Raises
    SpecBranchError for an adapter that cannot be loaded.
    """
    found = find_adapter_config_file(name)
    if found is None:
        return None
    path = Path(found)
    with named(name, role):
        if reason := json_fault(path):
            raise SpecBranchError(reason)
        if os.path.isdir(name) and (path.parent / CONFIG_NAME).is_file():
            raise SpecBranchError(f"has both {CONFIG_NAME} and {path.name}; expected a model or an adapter, not both")
        base = json.loads(path.read_bytes()).get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise SpecBranchError(f"{path}: has no base_model_name_or_path")
        if is_gguf(base):
            raise SpecBranchError(f"its base {base} is a GGUF file; expected a checkpoint, which can take layers")
        if not is_peft_available():
            raise SpecBranchError("an adapter needs the package peft, which is not installed")
    return resolve(base, role)


def add_adapter(model: PreTrainedModel, name: str, role: str) -> None:
    """Add an adapter's layers to the model of its base. Raises SpecBranchError for weights that are not theirs."""
    with loading(name, role, adapter_fault):
        info = model.load_adapter(name, ignore_mismatched_sizes=True)  # refused below, with the shapes
    with named(name, role):
        check_weights(model, info.to_dict(), Path(name) if os.path.isdir(name) else None, ADAPTER_CONFIG)
