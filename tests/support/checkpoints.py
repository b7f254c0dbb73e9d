"""Checkpoints made from the bundled target, and what breaks them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from specbranch import bundled

WEIGHTS = "model.safetensors"
Change = Callable[[Path], object]


def copy_of_target(folder: Path) -> Path:
    return shutil.copytree(bundled.path("target"), folder / "target")


def settings(file: str, **values: Any) -> Change:
    """Set these keys of a JSON file."""

    def change(folder: Path) -> None:
        before = json.loads((folder / file).read_text(encoding="utf-8"))
        (folder / file).write_text(json.dumps({**before, **values}), encoding="utf-8")

    return change


def written(file: str, text: str | bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(text.encode() if isinstance(text, str) else text)


def truncated(file: str, size: int) -> Change:
    return lambda folder: os.truncate(folder / file, size)


def without(*files: str) -> Change:
    def change(folder: Path) -> None:
        for file in files:
            (folder / file).unlink()

    return change


def tensors(edit: Callable[[dict[str, Tensor]], object]) -> Change:
    """Change the weights."""

    def change(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        edit(weights)
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    return change


def several(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]
