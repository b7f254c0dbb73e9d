"""Which models a file was made with: records and predictors are of use for one pair only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelIdentity:
    """Which model: its name for people, and a fingerprint of its shape and some of its weights for the check."""

    name: str
    fingerprint: str
