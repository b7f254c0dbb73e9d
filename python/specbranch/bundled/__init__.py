"""The bundled pair: a tiny target and draft with one tokenizer, for the demo and the tests.

They know Python's standard library a little and nothing else. scripts/train_bundled.py made them; CARD.json
says from what and how good they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAMES = ("target", "draft")


def path(name: str) -> Path:
    """The folder of a bundled model, to be given to `from_pretrained`; `name` is "target" or "draft".

    Raises ValueError for any other name.
    """
    if name not in NAMES:
        raise ValueError(f"bundled model name must be one of {', '.join(NAMES)}, got {name!r}")
    return Path(__file__).parent / name


def prompts() -> list[dict[str, Any]]:
    """Sample prompts, beginnings of Python code: dicts with "task", "id", "prompt", "chat" (always False)."""
    lines = (Path(__file__).parent / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def card() -> dict[str, Any]:
    """Data, license, sizes, and the loss and greedy agreement measured on held-out files."""
    text = (Path(__file__).parent / "CARD.json").read_text(encoding="utf-8")
    result: dict[str, Any] = json.loads(text)
    return result
