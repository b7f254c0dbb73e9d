"""specbranch: Hugging Face language models answer faster with a small draft model, token for token the same.

    from specbranch import SpecBranch

    model = SpecBranch.from_pretrained("bundled", draft="bundled")
    print(model.generate("def fibonacci(n):").text)

It implements SpecBranch (arXiv 2506.01979) over `specbranch_ext`, the compiled core.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from specbranch.engine import SpecBranch
    from specbranch.errors import GenerationFailed, GenerationInterrupted, SpecBranchError
    from specbranch.generation import Generation, TextStream
    from specbranch.methods import METHODS
    from specbranch.sampling import Sampling
    from specbranch.stats import Stats

__all__ = [
    "METHODS",
    "Generation",
    "GenerationFailed",
    "GenerationInterrupted",
    "Sampling",
    "SpecBranch",
    "SpecBranchError",
    "Stats",
    "TextStream",
    "__version__",
]

_HOME = {
    "METHODS": "methods",
    "Generation": "generation",
    "GenerationFailed": "errors",
    "GenerationInterrupted": "errors",
    "Sampling": "sampling",
    "SpecBranch": "engine",
    "SpecBranchError": "errors",
    "Stats": "stats",
    "TextStream": "generation",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line answers --help without loading torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'specbranch' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"specbranch.{_HOME[name]}"), name)
