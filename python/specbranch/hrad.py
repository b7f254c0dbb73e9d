"""H-RAD, the hybrid rollback-aware draft of SpecBranch (arXiv 2506.01979): how much of the trunk will be accepted."""

from __future__ import annotations

from enum import Enum
from typing import Protocol

from torch import Tensor


class Outlook(Enum):
    """NONE of the drafted tokens will stand, SOME will (ask the confidence), or ALL."""

    NONE = 0
    SOME = 1
    ALL = 2


class HRad(Protocol):
    def predict(self, features: Tensor) -> Outlook: ...
