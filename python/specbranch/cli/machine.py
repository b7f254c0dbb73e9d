"""The machine and the versions, for `doctor` and for the files that `bench` writes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory in bytes (None: unknown), the widest instruction set that
    torch finds, operating system."""
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": memory_bytes(),
        "isa": instruction_set(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def describe_measuring_machine() -> dict[str, Any]:
    """The same and the instruction-set level of our own kernels, which figures and last bits depend on.

    Raises what the compiled module raises where it cannot run.
    """
    from specbranch_ext import build_info

    return {**describe_machine(), "core_isa": build_info()["isa"]}


def describe_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that the figures depend on; None when one is not installed."""
    names = ("specbranch", "torch", "transformers", "tokenizers", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: package_version(name) for name in names}}


def package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def instruction_set() -> str:
    """The widest instruction set that torch finds on this processor."""
    import torch

    return str(torch.backends.cpu.get_cpu_capability())
