"""Strings that end a text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StopStrings:
    strings: tuple[str, ...]

    def find(self, text: str) -> int | None:
        """Where the first of them begins; None where there is none."""
        found = [index for string in self.strings if (index := text.find(string)) >= 0]
        return min(found, default=None)

    def begun(self, text: str) -> int:
        """Length of the longest end of `text` that could be the beginning of one."""
        longest = max((len(string) for string in self.strings), default=0)
        for length in range(min(longest - 1, len(text)), 0, -1):
            if any(string.startswith(text[-length:]) for string in self.strings):
                return length
        return 0
