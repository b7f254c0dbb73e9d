"""specbranch: Hugging Face language models answer faster with a small draft model, token for token the same.

    from specbranch import SpecBranch

    model = SpecBranch.from_pretrained("bundled", draft="bundled")
    print(model.generate("def fibonacci(n):").text)

It implements SpecBranch (arXiv 2506.01979) over `specbranch_ext`, the compiled core.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from specbranch.core.errors import SpecBranchError, SpecBranchWarning
    from specbranch.core.generation import Generation, GenerationFailed, GenerationInterrupted, TextStream, TokenLogprob
    from specbranch.core.sampling import Sampling
    from specbranch.core.stats import Stats
    from specbranch.corpus import Corpus
    from specbranch.engine import SpecBranch
    from specbranch.once import generate
    from specbranch.policies.methods import METHODS
    from specbranch.several import TextStreams
    from specbranch.text.grammar import Constraint

__all__ = [
    "METHODS",
    "Constraint",
    "Corpus",
    "Generation",
    "GenerationFailed",
    "GenerationInterrupted",
    "Sampling",
    "SpecBranch",
    "SpecBranchError",
    "SpecBranchWarning",
    "Stats",
    "TextStream",
    "TextStreams",
    "TokenLogprob",
    "__version__",
    "generate",
]

_HOME = {
    "METHODS": "policies.methods",
    "Constraint": "text.grammar",
    "Corpus": "corpus",
    "Generation": "core.generation",
    "GenerationFailed": "core.generation",
    "GenerationInterrupted": "core.generation",
    "Sampling": "core.sampling",
    "SpecBranch": "engine",
    "SpecBranchError": "core.errors",
    "SpecBranchWarning": "core.errors",
    "Stats": "core.stats",
    "TextStream": "core.generation",
    "TextStreams": "several",
    "TokenLogprob": "core.generation",
    "generate": "once",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that the command line answers --help without loading torch."""
    if name == "__version__":  # stands in pyproject.toml
        from importlib.metadata import version

        return version("specbranch")
    if name not in _HOME:
        raise AttributeError(f"module 'specbranch' has no attribute {name!r}")
    from importlib import import_module

    if name in ("Corpus", "SpecBranch"):  # the ops and the values need none of it
        from specbranch.core.extras import check_installed

        check_installed(f"specbranch.{name}", "transformers")
    return getattr(import_module(f"specbranch.{_HOME[name]}"), name)
