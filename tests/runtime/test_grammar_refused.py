"""What a constraint refuses before anything is decoded, and in which words."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
from grammars import bundled, trained
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specbranch import SpecBranchError
from specbranch.core.extras import MissingPackageError
from specbranch.text.grammar import Constraint

OF = bundled()
UNSUPPORTED = {
    "uniqueItems": True,
    "contains": {},
    "minContains": 1,
    "maxContains": 1,
    "dependentSchemas": {"a": False},
    "dependentRequired": {"a": ["b"]},
    "dependencies": {"a": ["b"]},
    "if": True,
    "then": False,
    "else": False,
    "not": {"type": "string"},
    "propertyNames": {"maxLength": 1},
    "unevaluatedProperties": False,
    "unevaluatedItems": False,
    "$dynamicRef": "#a",
    "$recursiveRef": "#",
}

J, R, L = Constraint.json_schema, Constraint.regex, Constraint.lark
REFUSED: list[tuple[Callable[..., Constraint], object, str]] = [
    *(
        (J, {name: value}, f"json_schema has keywords that are not supported: {name}")
        for name, value in UNSUPPORTED.items()
    ),
    (J, {"items": {"not": {}, "if": {}}}, "json_schema has keywords that are not supported: if, not"),
    (J, '{"a":', "json_schema is not JSON: Expecting value, line 1, column 6"),
    (J, '{"a": NaN}', "json_schema is not JSON: NaN is no JSON number"),
    (J, {"a": {1}}, "json_schema is not JSON: Object of type set is not JSON serializable"),
    (J, '{"items":' * 99999, "json_schema is not JSON: maximum recursion depth exceeded*"),
    (J, [1, 2], "json_schema is [1, 2]; expected a JSON object, true or false"),
    (J, "null", "json_schema is None; expected a JSON object, true or false"),
    (J, {"x-guidance": {}}, "json_schema has x-guidance: expected no options for llguidance in the schema"),
    (J, False, "json_schema: no text satisfies it: schema is false"),
    (J, {"enum": []}, "json_schema: no text satisfies it: anyOf is empty"),
    (
        J,
        {"type": "integer", "minimum": 5, "maximum": 3},
        "json_schema: no text satisfies it: minimum (5) is greater than maximum (3)",
    ),
    (J, {"allOf": [{"type": "null"}, {"type": "string"}]}, "json_schema: no text satisfies it: incompatible types"),
    (J, {"type": "string", "pattern": "^a$", "minLength": 2}, "json_schema: no text satisfies it: Regex is empty: *"),
    (J, {"$ref": "#"}, "json_schema: no token of this tokenizer may begin the text"),
    (J, {"$ref": "#/a"}, "json_schema cannot be used: Pointer '/a' does not exist"),
    (J, {"type": "string", "format": "colour"}, "json_schema cannot be used: Unknown format: colour"),
    (J, {"type": "string", "pattern": "(?=a)"}, "json_schema cannot be used: look-around, including look-ahead and *"),
    (J, {"const": "\ud800"}, "json_schema cannot be used: unexpected end of hex escape"),
    (
        J,
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        "json_schema has a oneOf whose options may not exclude each other: expected anyOf",
    ),
    (J, {"enum": [{"a": [2**53 + 1]}]}, "json_schema: enum has 9007199254740993; expected a number of at most 2**53"),
    (J, {"enum": ["a\x7f"]}, r"json_schema: enum has 'a\x7f'; expected no control characters but those of \b, \f, *"),
    (J, {"pattern": "^\\x01"}, r"json_schema: pattern has '^\\x01'; expected no control characters but those of \b, *"),
    (J, {"patternProperties": {"\x01": {}}}, r"json_schema: patternProperties has '\x01'; expected no control *"),
    (J, {"minimum": 2**53 + 1}, "json_schema: minimum has 9007199254740993; expected a number of at most 2**53"),
    (
        J,
        {"exclusiveMinimum": 0, "maximum": 0.5},
        "json_schema: between exclusiveMinimum 0 and maximum 0.5 llguidance would let 0 in:"
        " expected bounds at least 1 apart",
    ),
    (R, 3, "regex is 3; expected text"),
    (R, "a\ud800", r"regex is 'a\ud800'; expected text without half a surrogate pair"),
    (R, "a(?=b)", "regex cannot be used: look-around, including look-ahead and look-behind, is not supported"),
    (R, r"(a)\1", "regex cannot be used: backreferences are not supported"),
    (R, "(", "regex cannot be used: unclosed group"),
    (R, r"a\b", "regex cannot be used: lookarounds not supported yet; *"),
    (R, "[^\\s\\S]", "regex: no token of this tokenizer may begin the text"),
    (R, "(" * 9999 + ")" * 9999, "regex cannot be used: exceed the maximum number of nested parentheses*"),
    (L, None, "lark is None; expected text"),
    (L, "", "lark cannot be used: Empty grammar"),
    (L, "start: foo", 'lark cannot be used: line 1, column 8: unknown name: "foo"'),
    (L, "start: x\nx: /a(?=b)/", "lark cannot be used: line 2, column 4: look-around, including look-ahead *"),
    (L, "start: start", "lark: no token of this tokenizer may begin the text"),
    (
        L,
        'start: %json {"not": {}}',
        'lark cannot be used: line 1, column 8: failed to compile JSON schema: Unim*["not"]',
    ),
    (L, "start: " + '"a" ' * 70000, "lark cannot be used: *"),
    (
        L,
        "start: x\nx[max_tokens=3]: /.*/",
        "lark has max_tokens= or stop=, which cannot be taken back: expected suffix= or neither",
    ),
    (
        L,
        'start: x "b"\nx[stop="c"]: /a*/',
        "lark has max_tokens= or stop=, which cannot be taken back: expected suffix= or neither",
    ),
]


@pytest.mark.parametrize(("make", "given", "message"), REFUSED, ids=[message[:70] for _, _, message in REFUSED])
def test_what_is_refused_and_in_which_words(make: Callable[..., Constraint], given: object, message: str) -> None:
    for _ in range(2):  # the second time too
        with pytest.raises(SpecBranchError) as caught:
            OF.matcher(make(given))
        said = str(caught.value)
        assert "\n" not in said
        assert len(said) < 260
        start, _, end = message.partition("*")
        assert said.startswith(start)
        assert said.endswith(end) if "*" in message else said == message


def test_options_are_checked() -> None:
    for make in (lambda: J({}, whitespace="yes"), lambda: J({}, forced=1), lambda: R("a", forced=None)):  # type: ignore[arg-type]
        with pytest.raises(SpecBranchError, match=r"^(whitespace|forced) is .*; expected True or False$"):
            make()


# ---- Tokenizers


def test_tokens_that_cannot_end_a_text() -> None:
    for eos, message in (
        (frozenset(), "a constraint needs a token that ends the text: eos_token_id is not set"),
        (frozenset([0, 2048]), "eos_token_id is 2048; expected an id of the vocabulary, 0 to 2047"),
    ):
        with pytest.raises(SpecBranchError) as caught:
            R("a").matcher(OF.tokenizer, 2048, eos)
        assert str(caught.value) == message


class Slow:
    """One of those that transformers writes in Python."""


def words() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    ("tokenizer", "vocabulary", "message"),
    [
        (None, 9, "a constraint needs a tokenizer: pass tokenizer="),
        (Slow(), 9, "the tokenizer is a Slow; for a constraint expected one of the library tokenizers *"),
        (
            OF.tokenizer,
            2047,
            "the tokenizer has 2048 ids, the model's vocabulary 2047: a constraint needs a row for each",
        ),
        (words(), 3, "the tokenizer cannot be used for a constraint: *"),
    ],
    ids=["none", "slow", "small", "words"],
)
def test_tokenizers_that_are_refused(tokenizer: Any, vocabulary: int, message: str) -> None:
    with pytest.raises(SpecBranchError) as caught:
        R("a").matcher(tokenizer, vocabulary, frozenset([0]))
    assert str(caught.value).startswith(message.removesuffix("*"))
    assert "\n" not in str(caught.value)


def test_a_text_that_the_tokenizer_cannot_begin() -> None:
    tokenizer = trained(alphabet=[])
    with pytest.raises(SpecBranchError, match=r"^regex: no token of this tokenizer may begin the text$"):
        R("~a").matcher(tokenizer, len(tokenizer), frozenset([5]))


def test_without_llguidance_the_line_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(MissingPackageError) as caught:
        R("a").matcher(trained(), 500, frozenset([5]))
    assert str(caught.value) == "a constraint needs llguidance: pip install 'specbranch[grammar]'"
