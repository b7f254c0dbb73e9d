"""Resident memory of this process, and what of it is neither weights nor caches."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specbranch import SpecBranch


def resident_bytes() -> int:
    """Memory resident now; where the system does not say, the largest so far."""
    return _status_field("VmRSS") or peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The largest resident memory since the start, or since `reset_peak`."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status_field("VmHWM") or largest * (1 if sys.platform == "darwin" else 1024)


def reset_peak() -> bool:
    """Let the peak start anew from what is resident now; False where the system cannot (only Linux can)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def weight_bytes(*models: PreTrainedModel | None) -> int:
    """Parameters and buffers of the models, shared ones counted once."""
    return sum(storage.nbytes() for storage in _storages(models))


def cache_bytes(engine: SpecBranch, positions: int) -> int:
    """K and V of target and draft for so many positions; what is reserved beyond them does not count."""
    total = 0
    for model in (engine.target, engine.draft):
        if model is not None:
            config = model.config.get_text_config()
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            total += 2 * config.num_hidden_layers * kv_heads * head_dim * positions * model.dtype.itemsize
    return total


def make_resident(*models: PreTrainedModel | None) -> None:
    """Touch every page of the models' CPU weights.

    Checkpoints are mapped, so weights that nothing has read yet (most of an embedding) are not resident, and
    would hide as much other memory from a comparison with `weight_bytes`.
    """
    for storage in _storages(models):
        if storage.device.type == "cpu":
            torch.tensor([], dtype=torch.uint8).set_(storage)[:: resource.getpagesize()].sum()


def _storages(models: Iterable[PreTrainedModel | None]) -> list[torch.UntypedStorage]:
    storages = {}
    for model in models:
        if model is not None:
            for tensor in (*model.parameters(), *model.buffers()):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage
    return list(storages.values())


def _status_field(name: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
