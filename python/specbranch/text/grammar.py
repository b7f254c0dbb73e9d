"""Texts that follow a JSON schema, a regular expression or a grammar: which tokens may come next.

A `Constraint` says what a text may be and is shared; every text has a `Matcher` of its own, which knows how far it is.
The one implementation is over llguidance, which is imported when the first matcher is made.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from specbranch.core.checks import flag, shown
from specbranch.core.errors import SpecBranchError
from specbranch.stages import Matcher
from specbranch.text.json_schema import document
from specbranch.text.refusals import refused
from specbranch.text.spelling import Spelling, spelling

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from transformers import PreTrainedTokenizerBase


class Constraint(ABC):
    """What a text may be. Shared between requests and threads; each text has a matcher of its own. forced: whether
    tokens that must follow are drafted."""

    forced: bool = True

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
        that it names (<|…|>, <[5]>) may stand where it says; otherwise none may. Of the attributes of its rules,
        temperature= has no effect. A schema within it (%json) is taken as llguidance takes it.

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
        self.forced = flag("forced", forced)
        self._lock = threading.Lock()
        self._compiled: WeakKeyDictionary[Spelling, LLMatcher] = WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.kind} {shown(self._source)}>"

    def matcher(self, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int, eos: frozenset[int]) -> Matcher:
        of = spelling(tokenizer, vocabulary, eos)
        with self._lock:
            if of not in self._compiled:
                self._compiled[of] = self._compile(of)
            return GrammarMatcher(self._compiled[of], of, self.kind, self.forced)

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
        self._check_first(compiled, of)
        return compiled

    def _check_first(self, compiled: LLMatcher, of: Spelling) -> None:
        """Whether a text can begin; and, by taking back its first token, whether what may follow depends on nothing but
        the tokens: in what llguidance cannot take back (max_tokens=, stop=) it hides some of the text."""
        mask = GrammarMatcher(compiled, of, self.kind).allowed([])
        if may := int.from_bytes(mask, "little") & ~int.from_bytes(of.ends, "little"):
            probe = compiled.deep_copy()
            probe.consume_token((may & -may).bit_length() - 1)
            probe.rollback(1)
            if probe.is_error():
                raise refused(self.kind, probe.get_error())


class GrammarMatcher:
    """The parser of one text, and a copy of it that has read on along the path that was asked about last.

    A path that is no continuation of the last begins with a copy anew (some 50 ns per token of the text), and nothing
    is ever unread: llguidance 1.9 remembers its last mask by the states of lexer and parser, which after a rollback may
    be those of another text, and then gives the mask of that.
    """

    def __init__(self, compiled: LLMatcher, of: Spelling, kind: str, forced: bool = True) -> None:
        self._text = compiled.deep_copy()
        self._ahead: LLMatcher | None = None
        self._path: list[int] = []  # that it has read
        self._of = of
        self._kind = kind
        self._forced = forced
        self._begun = False
        self._over = False

    def allowed(self, path: Sequence[int]) -> bytes:
        if (parser := self._at(path)) is None:
            return self._of.ends
        self._next(parser)
        found = parser.compute_bitmask()
        self._check(parser)
        mask = self._of.mask(found, parser.is_accepting())
        if mask == bytes(len(mask)):
            raise self._stuck()
        return mask

    def forced(self, path: Sequence[int]) -> list[int]:
        return self._next(parser) if self._forced and (parser := self._at(path)) is not None else []

    def accept(self, tokens: Sequence[int]) -> None:
        tokens = list(tokens)
        text, rest = tokens[: self._end(tokens)], tokens[self._end(tokens) :]
        for token in tokens if self._over else rest:  # nothing else follows the end
            if token not in self._of.eos:
                raise self._misplaced(token)
        parser = self._at(text) if rest else None
        if parser is not None and not parser.is_accepting():
            raise self._misplaced(rest[0])
        if text:
            self._commit(text)
        self._over = self._over or bool(rest)

    def _commit(self, text: list[int]) -> None:
        if self._ahead is not None and self._path == text:
            self._text, self._ahead, self._path = self._ahead, None, []
        else:
            read = self._text.validate_tokens(text)
            self._check(self._text)
            if read < len(text):
                raise self._misplaced(text[read])
            self._text.consume_tokens(text)
            self._check(self._text)
            if self._path[: len(text)] != text:
                self._ahead = None
            self._path = [] if self._ahead is None else self._path[len(text) :]
        self._begun = True

    @property
    def complete(self) -> bool:
        return self._over or self._text.is_accepting()

    def _end(self, tokens: Sequence[int]) -> int:
        """Where the first token is that ends a text; behind all where none does."""
        eos = self._of.eos
        return len(tokens) if eos.isdisjoint(tokens) else next(i for i, token in enumerate(tokens) if token in eos)

    def _at(self, path: Sequence[int]) -> LLMatcher | None:
        """A parser that has read the text and the path; None where the text is over before its end."""
        if self._over or self._end(path) < len(path):
            return None
        if not path:
            return self._text
        path = list(path)
        if self._ahead is None or path[: len(self._path)] != self._path:
            self._ahead, self._path = self._text.deep_copy(), []
        parser, new = self._ahead, path[len(self._path) :]
        read = parser.try_consume_tokens(new) if new else 0
        self._path += new[:read]
        self._check(parser)
        if read < len(new):
            raise self._misplaced(new[read])
        return parser

    def _next(self, parser: LLMatcher) -> list[int]:
        """The tokens that must follow, the first of which is the whole mask of llguidance."""
        tokens = parser.compute_ff_tokens()
        self._check(parser)
        tokens = tokens[: self._end(tokens)]
        if not tokens:
            return []
        # They are what the tokenizer makes of the text that must follow, which it need not have spelled as it is.
        right = parser.validate_tokens(tokens)
        self._check(parser)
        if right == 0:
            raise self._stuck()
        return tokens[:right]

    def _check(self, parser: LLMatcher) -> None:
        if not parser.is_error():
            return
        self._ahead, self._path = None, []  # an error stays; a path that was only tried must not end the text
        message = parser.get_error()
        raise self._stuck() if message.startswith("NoExtension") else refused(self._kind, message)

    def _stuck(self) -> SpecBranchError:
        place = "follow here" if self._begun or self._path else "begin the text"
        return SpecBranchError(f"{self._kind}: no token of this tokenizer may {place}")

    def _misplaced(self, token: int) -> SpecBranchError:
        return SpecBranchError(f"{self._kind}: token {token} may not stand where it is given")
