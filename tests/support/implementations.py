"""The compiled implementations of the ops, each in the place of `specbranch_ext._C`: an op's tests run on all of them.

cpu: the CPU kernels. emulated: the CUDA kernels on the CPU (csrc/emulator). cuda: the CUDA kernels on a device, where
there is one; their arguments are copied there and back, so that the tests are the same.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from specbranch_ext import _C, build_info, ops
from specbranch_ext.ops import _library, _tickets

on_cpu = pytest.mark.parametrize("implementation", ["cpu"], indirect=True)
"""For tests of what only the CPU can do: raise for bad data."""

on_emulated = pytest.mark.parametrize("implementation", ["emulated"], indirect=True)
"""For tests of what only the emulator can do: choose the order of blocks."""

HAS_DEVICE = torch.cuda.is_available() and build_info()["cuda"]
ON_DEVICE = [pytest.param("cuda", marks=pytest.mark.cuda)] if HAS_DEVICE else []
NAMES = ["cpu", "emulated", *ON_DEVICE]
"""Parameters of the fixture `implementation`; those that need a GPU carry the marker that says so."""


def _to_device(value: Any, copies: list[tuple[Tensor, Tensor]]) -> Any:
    """The same bytes with the same strides on the device; tensors that share memory go on sharing it."""
    if isinstance(value, list):
        return [_to_device(item, copies) for item in value]
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage()
    on_device = next((b for a, b in copies if a.untyped_storage().data_ptr() == storage.data_ptr()), None)
    if on_device is None or storage.nbytes() == 0:
        whole = torch.empty(0, dtype=torch.uint8).set_(storage)
        on_device = whole.cuda()
        copies.append((whole, on_device))
    return torch.empty(0, dtype=value.dtype, device="cuda").set_(
        on_device.untyped_storage(), value.storage_offset(), value.size(), value.stride()
    )


def _through_the_device(op: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> None:
        copies: list[tuple[Tensor, Tensor]] = []
        op(*(_to_device(argument, copies) for argument in arguments))
        for host, device in copies:
            after = device.cpu()
            if not torch.equal(host, after):  # some hosts' memory may only be read
                host.copy_(after)

    return run


def _cuda_core() -> SimpleNamespace:
    core = SimpleNamespace(**{name: getattr(_C, name) for name in dir(_C) if not name.startswith("__")})
    core.emulated = True  # workspace for tensors on the CPU too
    for op in set(ops.__all__) & set(dir(_emulated())):  # those that have a CUDA kernel
        setattr(core, op, _through_the_device(getattr(_C, op)))
    return core


def _emulated() -> Any:
    """The module that an editable install builds, or the one in the folder of SPECBRANCH_EMULATED_MODULE."""
    if folder := os.environ.get("SPECBRANCH_EMULATED_MODULE"):
        sys.path.insert(0, folder)
        try:
            return importlib.import_module("_emulated")
        finally:
            sys.path.remove(folder)
    return importlib.import_module("specbranch_ext._emulated")


def use(name: str) -> Iterator[str]:
    """Run every op on the implementation, until the generator goes on."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "emulated":
            patch.setattr(_library, "core", _emulated())
        elif name == "cuda":
            patch.setattr(_library, "core", _cuda_core())
            patch.setattr(_library, "launch_handle", lambda tensor: torch.cuda.current_stream().cuda_stream)
        yield name
        assert not _tickets._host.any(), "a kernel left its tickets used"


@contextmanager
def emulated_runtime() -> Iterator[None]:
    """The emulated CUDA kernels where there are any, and the CPU's `linear`: what a whole model needs."""
    emulated = _emulated()
    core = SimpleNamespace(**{name: getattr(_C, name) for name in dir(_C) if not name.startswith("__")})
    for name in dir(emulated):
        if not name.startswith("__"):
            setattr(core, name, getattr(emulated, name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_library, "core", core)
        yield
