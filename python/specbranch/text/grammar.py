"""Texts that follow a JSON schema, a regular expression or a grammar: which tokens may come next.

A `Constraint` says what a text may be and is shared; every text has a `Matcher` of its own, which knows how far it is.
The one implementation is over llguidance, which is imported when the first matcher is made.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from specbranch.core.checks import flag, shown
from specbranch.core.errors import SpecBranchError
from specbranch.text.json_schema import document
from specbranch.text.refusals import refused
from specbranch.text.spelling import Spelling, spelling

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from transformers import PreTrainedTokenizerBase


class Matcher(Protocol):
    """How far one text is, and what may follow. Not for several threads at a time."""

    def allowed(self, path: Sequence[int]) -> bytes:
        """Which tokens may follow the committed text and then `path` (tokens that may stand there): a bit each, int32
        words, 4 * ceil(vocabulary / 32) bytes, bit t % 32 of word t // 32 (little end first). At least one is set.

        Raises SpecBranchError for a path that may not stand there, where nothing may follow although the text is not
        complete, and where llguidance's limits are exceeded; the matcher stays as it was.
        """

    def forced(self, path: Sequence[int]) -> list[int]:
        """The tokens that must follow `path`: [] where more than one may, and where the text must end. Maybe not all of
        the run; never wrong. Raises as `allowed`."""

    def accept(self, tokens: Sequence[int]) -> None:
        """These are committed now. Raises SpecBranchError for tokens that may not stand there."""

    @property
    def complete(self) -> bool:
        """Whether the committed text satisfies the grammar as it is."""


class Constraint(ABC):
    """What a text may be. Shared between requests and threads; each text has a matcher of its own."""

    @abstractmethod
    def matcher(self, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int, eos: frozenset[int]) -> Matcher:
        """Of a new text, whose model has so many logits and whose end is one of the tokens `eos`.

        Raises SpecBranchError for a tokenizer that cannot be used, and for what no text satisfies, as far as is found
        without decoding; MissingPackageError where a package is missing.
        """

    @staticmethod
    def json_schema(
        schema: str | Mapping[str, Any] | bool, *, whitespace: bool = False, forced: bool = True
    ) -> Constraint:
        """JSON that a schema (of draft 2020-12 where it does not say; text, or as Python has it) validates.

        The JSON is compact, `{"a":[1,2]}`, unless `whitespace` allows blanks and line breaks wherever JSON does. Its
        properties come in the order of the schema, those that the schema does not name after them, and these may come
        twice. `format` is enforced. What llguidance does not support is refused by name, and so are options for
        llguidance in the schema itself (x-guidance).

        `forced`: whether matchers say which tokens must follow; what is allowed is the same.

        Raises SpecBranchError for text that is not JSON, and for what is no schema.
        """
        return Grammar("json_schema", document(schema, flag("whitespace", whitespace)), forced=forced)

    @staticmethod
    def json_object(*, whitespace: bool = False, forced: bool = True) -> Constraint:
        """Any JSON object. The arguments are those of `json_schema`."""
        return Constraint.json_schema({"type": "object"}, whitespace=whitespace, forced=forced)

    @staticmethod
    def regex(pattern: str, *, forced: bool = True) -> Constraint:
        r"""A regular expression that the whole text matches, in the syntax of Rust's regex crate: no look-around (so no
        \b) and no back-references; `.` matches all but a line break, \d and \w those of Unicode.

        Raises SpecBranchError for what is no text. `matcher` does for an expression that does not compile.
        """
        return Grammar("regex", _text("regex", pattern), forced=forced)

    @staticmethod
    def lark(grammar: str, *, forced: bool = True) -> Constraint:
        """A context-free grammar in llguidance's dialect of Lark, whose rule `start` is the whole text. Special tokens
        that it names (<|…|>, <[5]>) may stand where it says; otherwise none may.

        Raises SpecBranchError for what is no text. `matcher` does for a grammar that does not parse.
        """
        return Grammar("lark", _text("lark", grammar), forced=forced)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise SpecBranchError(f"{name} is {shown(value)}; expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SpecBranchError(f"{name} is {shown(value)}; expected text without half a surrogate pair") from error
    return value


class Grammar(Constraint):
    """A constraint that llguidance compiles: once for a tokenizer, in some milliseconds."""

    def __init__(self, kind: str, source: str, *, forced: bool = True) -> None:
        self.kind = kind
        self._source = source
        self._forced = flag("forced", forced)
        self._lock = threading.Lock()
        self._compiled: WeakKeyDictionary[Spelling, LLMatcher] = WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.kind} {shown(self._source)}>"

    def matcher(self, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int, eos: frozenset[int]) -> Matcher:
        of = spelling(tokenizer, vocabulary, eos)
        with self._lock:
            if of not in self._compiled:
                self._compiled[of] = self._compile(of)
            return GrammarMatcher(self._compiled[of], of, self.kind, self._forced)

    def _compile(self, of: Spelling) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        grammar = self._source
        if self.kind == "regex":
            grammar = LLMatcher.grammar_from_regex(grammar)
        elif self.kind == "lark":
            grammar = LLMatcher.grammar_from_lark(grammar)
        compiled = LLMatcher(of.tokens, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if compiled.is_error():
            raise refused(self.kind, compiled.get_error())
        GrammarMatcher(compiled, of, self.kind).try_first()
        return compiled


class GrammarMatcher:
    """A parser of one text that is moved along. It has read the committed tokens and those of the path that was asked
    about last: of the next path it unreads what differs, so that to go through a tree in depth costs a token a node."""

    def __init__(self, compiled: LLMatcher, of: Spelling, kind: str, forced: bool = True) -> None:
        self._compiled = compiled
        self._parser = compiled.deep_copy()
        self._of = of
        self._kind = kind
        self._forced = forced
        self._committed: list[int] = []
        self._ahead: list[int] = []  # read, not committed
        self._over = False

    def try_first(self) -> None:
        """Whether a text can begin, and tokens be unread: llguidance cannot do that with all it has in Lark."""
        may = int.from_bytes(self.allowed([]), "little") & ~int.from_bytes(self._of.ends, "little")
        if may:
            self._read([(may & -may).bit_length() - 1])
            self._read([])

    def allowed(self, path: Sequence[int]) -> bytes:
        if not self._read(path):
            return self._of.ends
        self._next()
        found = self._parser.compute_bitmask()
        self._check()
        mask = self._of.mask(found, self._parser.is_accepting())
        if mask == bytes(len(mask)):
            raise self._stuck()
        return mask

    def forced(self, path: Sequence[int]) -> list[int]:
        return self._next() if self._forced and self._read(path) else []

    def _next(self) -> list[int]:
        """The tokens that must follow here, the first of which is llguidance's whole mask."""
        tokens = self._parser.compute_ff_tokens()
        self._check()
        tokens = tokens[: self._end(tokens)]
        if not tokens:
            return []
        # They are what the tokenizer makes of the text that must follow, which it need not have spelled as it is.
        right = self._parser.validate_tokens(tokens)
        self._check()
        if right == 0:
            raise self._stuck()
        return tokens[:right]

    def accept(self, tokens: Sequence[int]) -> None:
        text, rest = tokens[: self._end(tokens)], tokens[self._end(tokens) :]
        for token in tokens if self._over else rest:  # nothing else follows the end
            if token not in self._of.eos:
                raise self._misplaced(token)
        if self._over:
            return
        self._read(text)
        if rest and not self._parser.is_accepting():
            raise self._misplaced(rest[0])
        self._committed += text
        self._ahead = []
        self._over = bool(rest)

    @property
    def complete(self) -> bool:
        return not self._read([]) or self._parser.is_accepting()

    def _end(self, tokens: Sequence[int]) -> int:
        """Where the first token is that ends a text; behind all where none does."""
        eos = self._of.eos
        return len(tokens) if eos.isdisjoint(tokens) else next(i for i, token in enumerate(tokens) if token in eos)

    def _read(self, path: Sequence[int]) -> bool:
        """Go to the end of the path; False where the text is over before, which the parser is never told: it cannot
        unread that reliably."""
        if self._over or self._end(path) < len(path):
            return False
        same = 0
        for ours, theirs in zip(self._ahead, path, strict=False):
            if ours != theirs:
                break
            same += 1
        if len(self._ahead) > same:
            self._parser.rollback(len(self._ahead) - same)
        new = list(path[same:])
        read = self._parser.try_consume_tokens(new) if new else 0
        self._ahead[same:] = new[:read]
        self._check()
        if read < len(new):
            raise self._misplaced(new[read])
        return True

    def _check(self) -> None:
        if not self._parser.is_error():
            return
        message = self._parser.get_error()
        # An error stays for good. A path that was only tried must not end the text.
        self._parser = self._compiled.deep_copy()
        self._parser.consume_tokens(self._committed)
        self._ahead = []
        raise self._stuck() if message.startswith("NoExtension") else refused(self._kind, message)

    def _stuck(self) -> SpecBranchError:
        place = "begin the text" if not self._committed and not self._ahead else "follow here"
        return SpecBranchError(f"{self._kind}: no token of this tokenizer may {place}")

    def _misplaced(self, token: int) -> SpecBranchError:
        return SpecBranchError(f"{self._kind}: token {token} may not stand where it is given")
