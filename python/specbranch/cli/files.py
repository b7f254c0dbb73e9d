"""Files that a subcommand writes: refused before the work if they cannot be written, and then written whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def check_writable(path: str | Path) -> None:
    """Say now, not after the run, that a file cannot be written. Raises OSError."""
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a directory; expected the name of a file")
    with part(path).open("a"):
        pass
    part(path).unlink()


def write_json(path: str | Path, value: dict[str, Any]) -> None:
    """Whole or not at all: a run cut short keeps the file written last."""
    part(path).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(part(path), path)


def part(path: str | Path) -> Path:
    """Where a file is written before it takes its place."""
    return Path(f"{path}.part")
