"""The files that a command writes: named in its OUTPUTS, and refused before the work if they cannot be written, are in
use, or are somebody else's."""

from __future__ import annotations

import argparse
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specbranch.core.files import claimed, is_special, stream_of, whole, write_json

__all__ = ["Output", "check_writable", "claim", "json_object", "whole", "write_json"]

FILES_READ = ("prompts", "records", "corpus", "files", "json_schema", "grammar")  # arguments
MODELS_READ = ("target", "draft", "tokenizer", "hrad")


@dataclass(frozen=True)
class Output:
    """An argument that names what a command writes.

    kind: what that is. is_one: whether a file that is there is such a thing and may be replaced (None: the command
    looks itself). read_back: a resumed run reads it, so it is no pipe. makes_parents: of the file. in_directory: the
    argument names a directory, and this is the file in it that is claimed; check: raises if the directory holds
    something else.
    """

    argument: str
    kind: str
    is_one: Callable[[Path], bool] | None = None
    read_back: bool = False
    makes_parents: bool = False
    in_directory: str | None = None
    check: Callable[[Path], None] | None = None


@contextmanager
def claim(args: argparse.Namespace, outputs: Sequence[Output]) -> Iterator[None]:
    """The outputs that were asked for are this run's. Raises ValueError or OSError that names the one that cannot be.

    Directories that were made for them and stay empty go again.
    """
    asked = [(output, getattr(args, output.argument)) for output in outputs]
    given = [(output, Path(name)) for output, name in asked if name is not None]
    for place, (output, file) in enumerate(given):
        _check_apart(output, file, given[:place], args)
    with ExitStack() as stack:
        for output, file in given:
            if output.check is not None:
                output.check(file)
            if output.in_directory is not None:
                file = file / output.in_directory
            if output.makes_parents:
                stack.enter_context(_parents(file))
            _check_file(output, file)
            if not is_special(file):
                stack.enter_context(claimed(file))
                _check_replaceable(output, file)  # now that nobody writes it
        yield


def check_writable(path: str | Path) -> None:
    """Say now, not after the run, that a file cannot be written; nothing is changed. Raises OSError."""
    _check_path(Path(path))
    if not is_special(Path(path)):
        with claimed(path):
            pass


def json_object(file: Path) -> dict[str, Any] | None:
    """What is in a file of JSON; None where it is anything else."""
    try:
        with file.open("rb") as stream:
            if stream.read(1) != b"{":  # so that no large file of another kind is read
                return None
            value = json.loads(b"{" + stream.read())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _check_path(file: Path) -> None:
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a directory; expected the name of a file")
    if is_special(file) or file.exists():
        if not os.access(file, os.W_OK):
            raise PermissionError(f"{file}: not writable")
        return
    parent = Path(os.path.realpath(file)).parent
    if not parent.is_dir():
        problem = "Not a directory" if parent.exists() else "No such file or directory"
        raise (NotADirectoryError if parent.exists() else FileNotFoundError)(f"{file}: {problem}: {parent}")


def _check_file(output: Output, file: Path) -> None:
    _check_path(file)
    if output.read_back and is_special(file):
        raise ValueError(f"{file} is not a regular file: a run must be able to read back what it wrote; choose another")


def _check_replaceable(output: Output, file: Path) -> None:
    if output.is_one is not None and file.exists() and file.stat().st_size and not output.is_one(file):
        raise ValueError(f"{file} is not {output.kind}: it stays as it is; delete it or choose another")


def _check_apart(output: Output, file: Path, others: Sequence[tuple[Output, Path]], args: argparse.Namespace) -> None:
    """That an output is neither what the command reads, nor another output, nor where it prints."""
    name = f"--{output.argument} {file}"
    for other, path in others:
        if _same(file, path):
            raise ValueError(f"{name} is --{other.argument} too; choose another")
    for argument in FILES_READ:
        for path in _named(args, argument):
            if _same(file, path):
                raise ValueError(f"{name} is among the {argument} that are read; choose another")
    for argument in MODELS_READ:
        for folder in map(_model_directory, _named(args, argument), [argument]):
            here = os.path.realpath(file) if output.in_directory else os.path.dirname(os.path.realpath(file))
            if folder.is_dir() and here == os.path.realpath(folder):
                where = "is" if output.in_directory else "is in"
                raise ValueError(
                    f"{name} {where} the directory of --{argument}, {folder}: it holds another model, which would be "
                    "overwritten or spoilt; choose another"
                )
    if stream_of(file) is None:
        for number, stream in ((1, "standard output"), (2, "standard error")):
            with suppress(OSError):
                if file.is_file() and os.path.samestat(os.fstat(number), file.stat()):
                    raise ValueError(f"{name} is where {stream} goes; choose another, or /dev/fd/{number}")


def _named(args: argparse.Namespace, argument: str) -> list[Path]:
    """The paths that an argument names, be it one or a list; none for standard input."""
    value = getattr(args, argument, None)
    names = [value] if isinstance(value, str) else value or []
    return [Path(name) for name in names if name != "-"]


def _model_directory(name: Path, argument: str) -> Path:
    from specbranch import bundled

    role = {"tokenizer": "target"}.get(argument, argument)
    return bundled.path(role) if name == Path("bundled") and role in bundled.NAMES else name.expanduser()


def _same(a: Path, b: Path) -> bool:
    """Whether two names are one file, that is there or not; a device may serve for both."""
    if os.path.realpath(a) == os.path.realpath(b):
        return not (a.exists() and stat.S_ISCHR(a.stat().st_mode))
    return a.exists() and b.exists() and a.samefile(b) and not stat.S_ISCHR(a.stat().st_mode)


@contextmanager
def _parents(file: Path) -> Iterator[None]:
    made: list[Path] = []
    parent = Path(os.path.realpath(file)).parent
    for directory in reversed([parent, *parent.parents]):
        if not directory.exists():
            try:
                directory.mkdir()
            except OSError as error:
                raise type(error)(f"{file}: {directory} cannot be made: {error.strerror}") from error
            made.append(directory)
    try:
        yield
    finally:
        for directory in reversed(made):
            with suppress(OSError):  # not empty
                directory.rmdir()
