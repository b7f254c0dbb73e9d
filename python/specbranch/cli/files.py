"""Files that a command writes: refused before the work if they cannot be written, and then written whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def check_writable(path: str | Path) -> None:
    """Say now, not after the run, that a file cannot be written; nothing is changed. Raises OSError."""
    file = Path(path)
    if file.is_dir():
        raise IsADirectoryError(f"{path} is a directory; expected the name of a file")
    if _is_special(file):
        if not os.access(file, os.W_OK):
            raise PermissionError(f"{path}: not writable")
        return
    _new_beside(file).unlink()


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """Where to write a file: beside `path`, whose place it takes at the end, so that a run cut short leaves what was
    there before. A link stays a link, and pipes and devices are written to directly."""
    file = Path(path)
    if _is_special(file):
        yield file
        return
    part = _new_beside(file)
    try:
        yield part
        os.replace(part, file.resolve())
    finally:
        with suppress(FileNotFoundError):
            part.unlink()


def write_json(path: str | Path, value: dict[str, Any]) -> None:
    """Write a file of JSON, whole or not at all."""
    with whole(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _is_special(file: Path) -> bool:
    """A pipe or a device, for example: there is nothing that could be replaced."""
    return file.exists() and not file.is_file()


def _new_beside(file: Path) -> Path:
    """A new, empty file in the same folder; never one that is there already."""
    file = file.resolve()
    number = 0
    while True:
        part = file.with_name(f"{file.name}.{os.getpid()}-{number}.part")
        with suppress(FileExistsError):
            part.open("x").close()
            return part
        number += 1
