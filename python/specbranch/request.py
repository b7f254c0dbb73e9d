"""What one generation is asked for, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from specbranch.constrained import Constrained
from specbranch.core.sampling import Sampling
from specbranch.runtime.rules import Rules
from specbranch.stages import Matcher


@dataclass(frozen=True, eq=False)
class Drafting:
    """How it is drafted, which changes no text; None: as the engine does. options: of the policy."""

    method: str | None = None
    overlap: bool | str | None = None
    draft_context: str | None = None
    retrieval: bool | str | None = None
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Request:
    """One text. ids: the prompt. padding: ids of padding before it, which only rules see. eos: ids that end the text;
    stop: strings that do. matcher: makes the state of the constraint that the text is under; None for none.
    forces: whether tokens that must follow are drafted."""

    ids: Sequence[int]
    new_tokens: int
    sampling: Sampling
    eos: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    padding: Sequence[int] = ()
    rules: Rules = field(default_factory=Rules)
    matcher: Callable[[], Matcher] | None = None
    forces: bool = True
    drafting: Drafting = field(default_factory=Drafting)

    def constrained(self, vocabulary: int) -> Constrained | None:
        """What may follow, at the beginning of the text; None without a constraint. vocabulary: the target's."""
        if self.matcher is None:
            return None
        return Constrained(self.matcher(), vocabulary, self.eos, self.forces)

    @property
    def tokens(self) -> int:
        """Of the text at most, its prompt included."""
        return len(self.ids) + self.new_tokens
