"""The packages that parts of specbranch need beyond torch and numpy, and the line that installs what is missing."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from specbranch.core.errors import SpecBranchError

MODELS = ("transformers", "safetensors", "tokenizers", "gguf")
PACKAGES = {  # of each extra in pyproject.toml, under the names by which they are imported
    "transformers": MODELS,
    "cli": (*MODELS, "rich"),
    "serve": (*MODELS, "rich", "starlette", "uvicorn"),
    "plot": ("matplotlib",),
    "accelerate": ("accelerate",),
    "grammar": (*MODELS, "llguidance"),
}


class MissingPackageError(SpecBranchError, ImportError):
    """A package is missing that comes with an extra."""


def check_installed(what: str, extra: str) -> None:
    """Raises MissingPackageError, saying that `what` needs it, for the first package of an extra that is not there or
    has a version that does not do: pip looks after the versions of an extra only where it was asked for."""
    for package in PACKAGES[extra]:
        if not _is_there(package):
            found = ""
        elif package == "transformers" and (wanted := _other_version(package)):
            package, found = f"transformers {wanted}", f"found {version(package)}; "
        else:
            continue
        raise MissingPackageError(f"{what} needs {package}: {found}pip install 'specbranch[{extra}]'")


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # something stands in its place
        return False


def _other_version(package: str) -> str:
    """The range in pyproject.toml, such as ">=5.17,<6", where what is installed lies outside it; else nothing."""
    try:
        wanted = next((line for line in requires("specbranch") or () if line.startswith(package)), "")
        found = _release(version(package))
    except PackageNotFoundError:  # run from its sources
        return ""
    bounds = re.search(r">=([\d.]+)", wanted), re.search(r"<([\d.]+)", wanted)
    if bounds[0] is None or bounds[1] is None or _release(bounds[0][1]) <= found < _release(bounds[1][1]):
        return ""
    return f"{bounds[0][0]},{bounds[1][0]}"


def _release(text: str) -> tuple[int, ...]:
    """5.24.0.dev0 to (5, 24, 0)."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()
