"""Strings that end a text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specbranch.core.checks import shown
from specbranch.core.errors import SpecBranchError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def stop_strings(stop: object, tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, ...]:
    """The strings that end a text, of one or several, or None. Raises SpecBranchError for anything else, for an empty
    one, and where there is no tokenizer to make text."""
    if isinstance(stop, str):
        stop = (stop,)
    elif not isinstance(stop, Iterable) or isinstance(stop, (bytes, bytearray)):
        if stop is not None:
            raise SpecBranchError(f"stop is {shown(stop)}; expected text, or a list of texts")
        stop = ()
    strings = tuple(stop)
    for place, string in enumerate(strings):
        if not isinstance(string, str):
            raise SpecBranchError(f"stop[{place}] is {shown(string)}; expected text")
        if not string:
            raise SpecBranchError("a stop string is empty")
    if strings and tokenizer is None:
        raise SpecBranchError("stop strings need a tokenizer: pass tokenizer=")
    return strings
