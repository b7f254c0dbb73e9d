"""Kernels for speculative decoding with trees: attention, verification, drafting and KV-cache commits.

Usable on its own in any decoder: see `specbranch_ext.ops` for the functions and
`specbranch_ext.reference` for the same in plain torch. `specbranch_ext.integrations` runs other libraries' models with
them, and is imported by itself: it needs these libraries.
"""

from pathlib import Path

import torch  # noqa: F401  (first: torch and the compiled module then share one OpenMP runtime)

try:
    from . import _C
except ImportError as error:
    _folder = Path(__file__).parent
    _message = (
        "specbranch_ext was imported without its compiled module `specbranch_ext._C`. "
        "Build it with `pip install .` or, to work on the source, `pip install -e .` in the repository root."
    )
    if (_folder.parent / "setup.py").exists():
        _message += (
            f" (Python found the source folder {_folder} first: after `pip install .` "
            "run from another folder, or use an editable install.)"
        )
    raise ImportError(f"{_message} The cause: {error}") from error

from . import ops
from .masks import tree_mask
from .ops import *  # noqa: F403
from .packed import PackedWeight

build_info = _C.build_info


def cuda_device_problem(index: int) -> str:
    """Why the CUDA kernels of this build cannot run on a device, in one line; empty when they can.

    The build may have none, the driver may be too old for its CUDA runtime, or it may not be for the device's
    architecture.
    """
    info = build_info()
    return _C.cuda_device_problem(index) if info["cuda"] else f"this build has no CUDA kernels: {info['cuda_reason']}"


__all__ = ["PackedWeight", "build_info", "cuda_device_problem", "tree_mask"]
__all__ += ops.__all__
