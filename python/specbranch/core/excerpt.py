"""What of a prompt a draft reads: all of it, or its beginning and its end.

A draft that has not read the middle guesses nearly as well, and its prefill and cache no longer grow with the prompt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from specbranch.core.checks import shown
from specbranch.core.errors import SpecBranchError


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The first `head` tokens of a prompt and its last `tail` ones; the very last, where the draft begins, always."""

    head: int
    tail: int

    def gap(self, prompt_tokens: int) -> range:
        """The positions of a prompt that are left out."""
        gap = range(self.head, prompt_tokens - max(self.tail, 1))
        return gap if gap else NO_GAP

    @property
    def size(self) -> int:
        """Tokens, of a prompt that is longer."""
        return self.head + self.tail

    def __str__(self) -> str:
        return "all" if self == ALL else f"{self.head}+{self.tail}"


NO_GAP = range(0)
ALL = Excerpt(2**62, 0)


def check_draft_context(value: object) -> Excerpt | None:
    """What "all" or "H+N" means; None for "auto". Raises SpecBranchError for anything else."""
    if value == "auto":
        return None
    if value == "all":
        return ALL
    found = re.fullmatch(r"(\d{1,9})\+(\d{1,9})", value, re.ASCII) if isinstance(value, str) else None
    if found is None or not any(ends := [int(part) for part in found.groups()]):
        raise SpecBranchError(
            f"draft_context is {shown(value)}; expected 'auto', 'all' or 'H+N', the first H tokens of a prompt and its "
            "last N, not both 0"
        )
    return Excerpt(*ends)
