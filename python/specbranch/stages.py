"""What the decoding loop asks of a draft, of the target, and of the clock; real and replayed ones answer alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from specbranch.core.excerpt import Excerpt
from specbranch.core.messages import Drafted, Forecast, Trunk, Verdict
from specbranch.core.suffix_index import Continuations
from specbranch.core.tree import Tree

ShouldContinue = Callable[[int], bool]
"""Whether the draft is to take one more step, behind so many that are still under way on its device."""


class Pending(Protocol):
    """A verdict that is being made."""

    def done(self) -> bool: ...

    def result(self) -> Verdict: ...


@dataclass(frozen=True, slots=True)
class Ready:
    """A verdict that is there already."""

    verdict: Verdict

    def done(self) -> bool:
        return True

    def result(self) -> Verdict:
        return self.verdict


@dataclass(frozen=True, slots=True)
class Failed:
    """There will be no verdict."""

    error: Exception

    def done(self) -> bool:
        return True

    def result(self) -> Verdict:
        raise self.error


class Verdicts(Protocol):
    """The verdicts of several texts that are being made."""

    def done(self) -> bool: ...

    def results(self) -> list[Verdict | Exception]:
        """Wait for them. An exception concerns its text only."""


@dataclass(frozen=True, slots=True)
class PendingVerdicts:
    """Those of one step, which are there at once."""

    pending: Sequence[Pending]

    def done(self) -> bool:
        return all(each.done() for each in self.pending)

    def results(self) -> list[Verdict | Exception]:
        return [_result(each) for each in self.pending]


def _result(pending: Pending) -> Verdict | Exception:
    try:
        return pending.result()
    except Exception as error:
        return error


class Verifier(Protocol):
    """The target: judges drafted tokens. It sees trunks, which are plain integers, and never the tree."""

    @property
    def most_rows(self) -> int:
        """Of a trunk."""

    def most_tokens(self, position: int) -> int:
        """That a round may commit whose root stands at `position`: there a target may have to begin anew."""

    def begin(self, prompt: Sequence[int]) -> int:
        """Start a text. Returns how many tokens of the prompt are to be read: not the last one, which is the first
        root, and none that are known from an earlier text."""

    def read(self, most: float) -> int:
        """Commit more of the prompt: in whole chunks, until so many tokens are read or none is left. Returns how
        many."""

    def verify(self, trunk: Trunk) -> Pending:
        """Judge a trunk. On a device this only starts; elsewhere the verdict is there when it returns."""

    def commit(self, path: Sequence[int]) -> None:
        """Commit the newest trunk's root and the accepted tokens, given as a verdict does; drop the others."""


class Drafter(Protocol):
    """Proposes tokens."""

    @property
    def room(self) -> int:
        """Nodes that it may still run over before the next commit."""

    @property
    def burst(self) -> int:
        """Steps that are best asked for at once."""

    def begin(self, prompt: Sequence[int]) -> None:
        """Start a text. Nothing is read yet: until `read`, it is only told what is committed."""

    def gap(self, excerpt: Excerpt, tokens: int) -> range:
        """The positions of the prompt that it would leave out of a text of at most so many tokens, told to read no
        more than an excerpt."""

    def unread(self, excerpt: Excerpt, tokens: int) -> int:
        """How many tokens `read` would read."""

    def read(self, excerpt: Excerpt, tokens: int, most: float) -> int:
        """Read more of that, and of what was committed since, but the last token: the root. In whole chunks, until so
        many tokens are read or none is left; then it may propose. Returns how many."""

    def propose(
        self, tree: Tree, nodes: Sequence[int], steps: int = 1, should_continue: ShouldContinue = ...
    ) -> Drafted:
        """Run over `nodes`, then over the first candidates of each step, until there are `steps` steps or
        `should_continue`, asked before each but the first, says no.

        The caller makes nodes of those candidates, as Tree.descend does; the tree is only read.
        """

    def commit(self, path: Sequence[int], survivors: Mapping[int, int], tokens: Sequence[int]) -> None:
        """A round is over. path: the accepted nodes, the root first. survivors: old to new index of the nodes that live
        on. tokens: the committed ones, the target's own at the end."""

    def learn(self, tree: Tree, path: Sequence[int], next_token: int, forecast: Forecast | None) -> None:
        """Take a verdict's labels, and a predictor's forecast for the round to come."""


class Retrieved(NamedTuple):
    """Tokens that were found for what comes next, and the chance that the target picks each, if it picks those before
    it."""

    found: Continuations
    chances: Sequence[float]


class Retriever(Protocol):
    """Finds tokens without a forward."""

    def begin(self, prompt: Sequence[int]) -> None:
        """Start a text."""

    def find(self, drafted: Sequence[int], longest: int) -> Retrieved:
        """What may come behind the text and some drafted tokens, at most `longest` tokens deep."""

    def commit(self, tokens: Sequence[int]) -> None:
        """The text goes on with these."""

    def learn(self, tree: Tree, path: Sequence[int], next_token: int) -> None:
        """Take a verdict's labels."""


class Matcher(Protocol):
    """How far one text is under a constraint, and what may follow. Not for several threads at a time. `path`: tokens
    behind the committed text, all of which may stand there."""

    def allowed(self, path: Sequence[int]) -> bytes:
        """Which tokens may follow a path: a bit each, in int32 words, so 4 * ceil(vocabulary / 32) bytes; bit t % 8 of
        byte t // 8 is token t's. At least one is set.

        Raises SpecBranchError for a path that may not stand there, and where nothing may follow although the text is
        not complete; the matcher stays as it was.
        """

    def forced(self, path: Sequence[int]) -> list[int]:
        """The tokens that must follow a path: none where more than one may, and where the text must end. Maybe not all
        of the run; never wrong. Raises as `allowed`."""

    def accept(self, tokens: Sequence[int]) -> None:
        """These are committed. Raises SpecBranchError for tokens that may not stand there."""

    @property
    def complete(self) -> bool:
        """Whether the committed text is all that it has to be, as it is."""


Nodes = tuple[Drafter, Tree, Sequence[int]]
"""Where in a text's tree its draft is to run."""


class Forwards(Protocol):
    """How the trunks and the draft steps of several texts are run: together where the models can."""

    def verify(self, texts: Sequence[tuple[Verifier, Trunk]]) -> Sequence[Pending]:
        """Judge a trunk of each text."""

    def propose(self, texts: Sequence[Nodes], steps: int, should_continue: ShouldContinue) -> list[Drafted | Exception]:
        """See Drafter.propose. A text whose logits cannot be sampled has the error."""


class OneByOne:
    """Each text by itself."""

    def verify(self, texts: Sequence[tuple[Verifier, Trunk]]) -> Sequence[Pending]:
        return [_verified(*text) for text in texts]

    def propose(self, texts: Sequence[Nodes], steps: int, should_continue: ShouldContinue) -> list[Drafted | Exception]:
        return [_proposed(*text, steps, should_continue) for text in texts]


def _verified(verifier: Verifier, trunk: Trunk) -> Pending:
    try:
        return verifier.verify(trunk)
    except Exception as error:
        return Failed(error)


def _proposed(
    drafter: Drafter, tree: Tree, nodes: Sequence[int], steps: int, should_continue: ShouldContinue
) -> Drafted | Exception:
    try:
        return drafter.propose(tree, nodes, steps, should_continue)
    except Exception as error:
        return error


class Workers(Protocol):
    """Runs the target beside the draft, and is the clock."""

    def clock(self) -> float:
        """Seconds."""

    def submit(self, verify: Callable[[], Sequence[Pending]]) -> Verdicts:
        """Start verifying; the caller goes on."""

    def draft_threads(self) -> AbstractContextManager[None]:
        """The context in which the draft runs beside the target."""

    def wait(self) -> None:
        """Return when neither model has work."""
