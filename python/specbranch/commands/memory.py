"""Resident memory of this process, and what of it is neither weights nor caches."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    storages = {}
    for model in models:
        if model is not None:
            for tensor in (*model.parameters(), *model.buffers()):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _status_field(name: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
