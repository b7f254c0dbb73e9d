"""Drafts without a model: what followed the text's end elsewhere, earlier in the text or in a corpus.

A look-up costs microseconds and no forward. What it finds is worth as much as its chance to be accepted, which the
calibration learns (policies/calibration.py). Retrieval as a draft: prompt lookup (A. Saxena 2023), REST (arXiv
2311.08252), suffix decoding (arXiv 2411.04975); beside a draft model: Double (arXiv 2601.05524).
"""

from __future__ import annotations

from collections.abc import Sequence

from specbranch.core.suffix_index import DEPTH, Continuations, SuffixIndex, continuations
from specbranch.core.tree import Tree
from specbranch.policies.calibration import Calibrator
from specbranch.stages import Retrieved

OCCURRENCES = 32  # of the text's end, that are looked at
SURE = 2  # tokens in common from which on it is copied from there
SKIPPED = 12  # tokens of what is copied from that may be left out


class RetrievalDrafter:
    """Finds what followed the text's end; see stages.Retriever."""

    def __init__(self, calibrator: Calibrator, corpora: Sequence[tuple[str, SuffixIndex]] = ()) -> None:
        """calibrator: says how likely a token is that was found, and learns from the verdicts. corpora: texts beside
        the one that is decoded."""
        self.calibrator = calibrator
        self._names, self._corpora = [name for name, _ in corpora], [index for _, index in corpora]
        self._text = SuffixIndex()
        self._end: list[int] = []  # the text's newest tokens
        self._source: tuple[int, int] | None = None  # an index, and where the copied text goes on in it
        self._since = 0  # tokens that came after that

    def begin(self, prompt: Sequence[int]) -> None:
        self._text, self._end, self._source = SuffixIndex(prompt), list(prompt[-DEPTH:]), None

    def find(self, drafted: Sequence[int], longest: int) -> Retrieved:
        found = self._look_up(drafted, longest)
        return Retrieved(found, self.calibrator.chances(found))

    def commit(self, tokens: Sequence[int]) -> None:
        self._text.extend(tokens)
        self._end = [*self._end, *tokens][-DEPTH:]
        self._since += len(tokens)
        found = self._look_up([], 1)
        if len(found) and (found.near[0] or found.match[0] >= SURE):
            self._source, self._since = (found.source[0], found.position[0]), 0

    def _look_up(self, drafted: Sequence[int], depth: int) -> Continuations:
        """A text that is copied with changes goes on, behind a change, a little further than where it was left: there
        little in common says as much as a lot elsewhere."""
        near = None
        if self._source is not None:
            index, position = self._source
            near = index, position - 1, position + self._since + len(drafted) + SKIPPED
        try:
            return continuations(
                [self._text, *self._corpora],
                [*self._end, *drafted],
                len(drafted),
                occurrences=OCCURRENCES,
                depth=depth,
                near=near,
            )
        except ValueError as error:  # of a file: the text's own index is whole
            raise ValueError(f"corpus {', '.join(self._names)}: damaged: {error}") from error

    def learn(self, tree: Tree, path: Sequence[int], next_token: int) -> None:
        self.calibrator.observe_retrieved(tree, path, next_token)
