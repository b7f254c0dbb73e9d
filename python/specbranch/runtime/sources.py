"""What the name of a checkpoint means, and errors that name it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from specbranch import bundled
from specbranch.core.checks import shown
from specbranch.core.errors import SpecBranchError
from specbranch.runtime.checkpoint import ADAPTER_CONFIG, folder_of, is_gguf, weights_fault

LONGEST_REASON = 300


def resolve(source: str | os.PathLike[str], role: str) -> str:
    """The directory, GGUF file or hub name that `source` means; "bundled" is the pair in this package.

    Raises SpecBranchError for a path that is not there.
    """
    if not isinstance(source, (str, os.PathLike)) or not (name := os.fspath(source)) or not isinstance(name, str):
        raise SpecBranchError(
            f"{role} is {shown(source)}; expected a directory, a GGUF file, a hub name or a model of transformers"
        )
    if name == "bundled":
        return str(bundled.path(role))
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            if not any((path / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
                raise SpecBranchError(f"{role} {name}: the directory has no config.json, so it is no checkpoint")
            return str(path)
        if path.exists() and is_gguf(name):
            return str(path)
        if path.exists():
            raise SpecBranchError(f"{role} {name}: expected the directory of a checkpoint or a file named *.gguf")
    except OSError as error:
        raise SpecBranchError(f"{role} {name}: {error.strerror or error}") from error
    if is_gguf(name):
        raise SpecBranchError(f"{role} {name}: there is no such file")
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise SpecBranchError(f"{role} {name}: there is no such directory")
    return name


@contextmanager
def named(name: str, role: str) -> Iterator[None]:
    """The context in which an error of ours gets the model's name."""
    try:
        yield
    except SpecBranchError as error:
        raise SpecBranchError(f"{role} {name}: {error}") from None


@contextmanager
def loading(
    name: str, role: str, fault: Callable[[Path], str | None] = weights_fault, what: str = ""
) -> Iterator[None]:
    """Whatever fails in this block is a SpecBranchError of one line that names the model and the file at fault.

    fault: finds that file in a checkpoint's folder, if it is a file's. what: is loaded, if it is not the model.
    """
    try:
        yield
    except SpecBranchError:
        raise
    except Exception as error:  # transformers raises whatever the libraries below it do
        folder = None if isinstance(error, MemoryError) else folder_of(name)
        at_fault = None if folder is None else fault(folder)
        raise SpecBranchError(f"{role} {name}: {_reason(error, at_fault, what)}") from error


def _reason(error: Exception, at_fault: str | None, what: str) -> str:
    message = " ".join(str(error).split())
    if "trust_remote_code" in message:
        return (
            "it comes with code of its own, which is not run unless you trust it: --trust-remote-code on the command "
            "line, trust_remote_code=True in Python"
        )
    if other := re.search(r"Unrecognized configuration class <class '[\w.]*?(\w+)'>", message):
        return f"expected a decoder-only causal language model, found {other[1]}"
    if at_fault is not None:
        return f"{what}cannot be loaded: {at_fault}"
    kind = "" if message and isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    return f"{what}cannot be loaded: {kind}{message}"[:LONGEST_REASON].rstrip(": ")
