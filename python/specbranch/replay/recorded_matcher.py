"""What a recorded text was under: known along the text alone, and there only where nothing else could stand."""

from __future__ import annotations

from collections.abc import Sequence

from specbranch.constrained import Constrained
from specbranch.replay.record import RecordedText


class RecordedMatcher:
    """Where the record says that a token was forced that token may follow, elsewhere everything; see stages.Matcher."""

    def __init__(self, tokens: Sequence[int], forced: Sequence[bool], vocabulary: int) -> None:
        self._tokens, self._forced = list(tokens), list(forced)
        self._all = b"\xff" * (4 * -(-vocabulary // 32))
        self._at = 0  # tokens committed

    def allowed(self, path: Sequence[int]) -> bytes:
        forced = self.forced(path)
        return (1 << forced[0]).to_bytes(len(self._all), "little") if forced else self._all

    def forced(self, path: Sequence[int]) -> list[int]:
        begin = end = self._at + len(path)
        if list(path) != self._tokens[self._at : begin]:
            return []
        while end < len(self._tokens) and self._forced[end]:
            end += 1
        return self._tokens[begin:end]

    def accept(self, tokens: Sequence[int]) -> None:
        self._at += len(tokens)

    @property
    def complete(self) -> bool:
        return self._at >= len(self._tokens)


def constrained(text: RecordedText) -> Constrained | None:
    """None where nothing was forced."""
    if text.forced is None:
        return None
    tokens: list[int] = text.tokens.tolist()
    others = [text.proposals.tokens, text.tails.tokens, *([] if text.prompt_ids is None else [text.prompt_ids])]
    vocabulary = 1 + max([*tokens, *(int(each.max()) for each in others if each.numel())])
    matcher = RecordedMatcher(tokens, text.forced.tolist(), vocabulary)
    return Constrained(matcher, vocabulary, frozenset())
