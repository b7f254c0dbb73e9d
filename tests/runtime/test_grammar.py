"""Constraints and their matchers: what may follow, what is refused, and what is shared."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from functools import cache
from typing import Any

import pytest
from gguf_files import write_pair
from grammars import Tokens, bits, bundled, padded, trained

from specbranch import SpecBranchError
from specbranch.runtime.loading import load_tokenizer
from specbranch.stages import Matcher
from specbranch.text.grammar import Constraint, Grammar

OF = bundled()
EOS = 0
PET: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "cattle"]}, "legs": {"type": "integer"}},
    "required": ["kind", "legs"],
    "additionalProperties": False,
}


def follow(matcher: Matcher, tokens: list[int]) -> bool:
    """Whether the masks allow them, one after the other."""
    return all(token in bits(matcher.allowed(tokens[:place])) for place, token in enumerate(tokens))


def takes(constraint: Constraint, text: str, of: Tokens = OF) -> bool:
    """Whether it is a text of the constraint. Spelled by the masks where they leave one spelling only."""
    matcher, left = of.matcher(constraint), text.encode()
    while left:
        fits = [
            (spelled, token)
            for token in bits(matcher.allowed([]))
            if token not in of.eos and left.startswith(spelled := spelling(of, token))
        ]
        if not fits:
            return False
        spelled, token = max(fits, key=lambda fit: len(fit[0]))
        matcher.accept([token])
        left = left[len(spelled) :]
    return matcher.complete


@cache
def byte_of() -> dict[str, int]:
    """The letters that stand for bytes in byte-level vocabularies: those that can be seen, then from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(other)}


@cache
def spelling(of: Tokens, token: int) -> bytes:
    return bytes(byte_of()[letter] for letter in of.tokenizer.convert_ids_to_tokens(token))


# ---- Masks


def test_a_text_by_a_schema() -> None:
    matcher = OF.matcher(Constraint.json_schema(PET))
    tokens = OF.encode('{"kind":"cat","legs":4}')
    assert follow(matcher, tokens)
    assert bits(matcher.allowed(tokens)) == [EOS]
    assert bits(matcher.allowed([*tokens, EOS])) == bits(matcher.allowed([*tokens, EOS, EOS])) == [EOS]
    assert not matcher.complete
    matcher.accept(tokens[:-1])
    assert not matcher.complete
    matcher.accept([tokens[-1], EOS])
    assert matcher.complete
    assert bits(matcher.allowed([])) == [EOS]
    assert matcher.forced([]) == []
    matcher.accept([EOS])
    with pytest.raises(SpecBranchError, match=r"^json_schema: token 5 may not stand where it is given$"):
        matcher.accept([5])


STATES = [
    (Constraint.json_schema(PET), '{"kind":"cat'),
    (Constraint.json_object(), '{"a b":[12'),
    (Constraint.json_object(whitespace=True), '{"a b": [12'),
    (Constraint.json_object(), '{"a"'),
    (Constraint.regex("(?s)[a-z]+é? .*"), "some"),
    (Constraint.regex("(?s).*"), "def f(x):\n"),
    (Constraint.lark('start: e\ne: N | "(" e ("+" | "-") e ")"\nN: /[0-9]+/'), "((1+22)-"),
]


@pytest.mark.parametrize("of", [OF, padded()], ids=["bundled", "padded"])
@pytest.mark.parametrize(("constraint", "text"), STATES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_token_is_allowed_if_and_only_if_it_can_be_read(of: Tokens, constraint: Constraint, text: str) -> None:
    """By trying all of them. (Where tokens are forced, other spellings of the same text can be read as well.)"""
    path = of.encode(text)
    allowed = set(bits(of.matcher(constraint).allowed(path)))
    forced = of.matcher(constraint).forced(path)
    assert not forced or allowed == {forced[0]}
    matcher = of.matcher(constraint)
    for token in range(of.vocabulary if not forced else 0):
        try:
            matcher.allowed([*path, token])
        except SpecBranchError:
            assert token not in allowed
        else:
            assert token in allowed or token in of.eos
    matcher.accept(path)
    assert matcher.complete == bool(of.eos & allowed) == (of.eos <= allowed)


def test_special_tokens_and_what_is_no_token_are_never_allowed() -> None:
    of = padded()
    mask = of.matcher(Constraint.regex("(?s).*")).allowed([])
    assert len(mask) == 4 * -(-of.vocabulary // 32)
    special = {*of.tokenizer.added_tokens_decoder}
    assert of.tokenizer.get_vocab()["<|im_start|>"] in special
    assert set(bits(mask)) & special == of.eos
    assert max(bits(mask)) < len(of.tokenizer) < of.vocabulary
    assert takes(Constraint.regex("(?s).*"), "<|im_start|>", of)  # by its letters


def test_a_grammar_may_name_a_special_token() -> None:
    of = padded()
    matcher = of.matcher(Constraint.lark('start: "a" <|im_start|> "b"'))
    start = of.tokenizer.get_vocab()["<|im_start|>"]
    assert bits(matcher.allowed(of.encode("a"))) == [start]
    matcher.accept([*of.encode("a"), start, *of.encode("b")])
    assert matcher.complete


def test_what_ends_a_text_does_so_only_where_the_text_is_complete() -> None:
    matcher = OF.matcher(Constraint.lark('start: "a" <|endoftext|> "b" | "c"'))
    with pytest.raises(SpecBranchError, match=r"^lark: no token of this tokenizer may follow here$"):
        matcher.allowed(OF.encode("a"))
    with pytest.raises(SpecBranchError, match=r"^lark: token 0 may not stand where it is given$"):
        matcher.accept([*OF.encode("a"), EOS])
    matcher.accept([*OF.encode("c"), EOS])  # it stayed as it was
    assert matcher.complete


def test_a_path_that_leads_nowhere_leaves_the_matcher_as_it_is() -> None:
    of = Tokens(tokenizer := trained(alphabet=[]), len(tokenizer), frozenset([len(tokenizer) - 1]))  # without ~
    matcher = of.matcher(Constraint.regex("(a~|m)z"))
    for _ in range(2):
        with pytest.raises(SpecBranchError, match=r"^regex: no token of this tokenizer may follow here$"):
            matcher.allowed(of.encode("a"))
        with pytest.raises(SpecBranchError, match=r"^regex: token \d+ may not stand where it is given$"):
            matcher.allowed(of.encode("ma"))
        assert bits(matcher.allowed(of.encode("m"))) == of.encode("z")
    with pytest.raises(SpecBranchError, match=r"^regex: token \d+ may not stand where it is given$"):
        matcher.accept(of.encode("ma"))
    matcher.accept(of.encode("mz"))
    assert matcher.complete


def test_the_mask_after_another_branch_is_not_that_of_the_branch() -> None:
    """llguidance's own rollback gives the first one's: both end in a number, in the same row of its parser."""
    of, sums = padded(), Constraint.lark('start: e\ne: N | "(" e ("+" | "-") e ")"\nN: /[0-9]+/\n%ignore / /')
    matcher = of.matcher(sums)
    first, second = of.encode("(61- 12"), [*of.encode("(61-"), *of.encode("(7")]
    closing = of.encode(")")[0]
    assert closing in bits(matcher.allowed(first))
    assert closing not in bits(matcher.allowed(second))
    assert closing in bits(matcher.allowed(first))


# ---- Forced tokens


def test_forced_tokens() -> None:
    matcher = OF.matcher(Constraint.json_schema(PET))
    run = matcher.forced([])
    assert OF.decode(run).startswith('{"kind')
    assert matcher.forced(run[:2]) == run[2:]
    assert bits(matcher.allowed(run[:1])) == [run[1]]
    assert matcher.forced(OF.encode('{"kind":"cat')) == []
    assert matcher.forced(OF.encode('{"kind":"cat","legs":4}')) == []  # the end is not said
    matcher.accept(run[:1])
    assert matcher.forced([]) == run[1:]


def test_forced_tokens_can_be_left_out() -> None:
    plain, silent = (OF.matcher(Constraint.json_schema(PET, forced=forced)) for forced in (True, False))
    tokens = OF.encode('{"kind":"cattle","legs":4}')
    for place in range(len(tokens) + 1):
        assert silent.forced(tokens[:place]) == []
        assert silent.allowed(tokens[:place]) == plain.allowed(tokens[:place])
    for other in (Constraint.regex("abc", forced=False), Constraint.lark('start: "abc"', forced=False)):
        assert OF.matcher(other).forced([]) == []
    assert OF.matcher(Constraint.json_object(forced=False)).forced([]) == []


def test_forced_text_is_spelled_as_it_is_where_the_tokenizer_composes_characters() -> None:
    of, text = padded(), '"cafe\u0301"'
    assert of.decode(of.encode(text)) != text
    matcher = of.matcher(Constraint.json_schema({"const": "cafe\u0301"}))
    found: list[int] = []
    while not matcher.complete:
        token = bits(matcher.allowed([]))[0]
        matcher.accept([token])
        found.append(token)
    assert of.decode(found) == text
    assert of.tokenizer.backend_tokenizer.normalizer is not None


# ---- What a constraint says


JSON_TEXTS = [
    ({"type": "object"}, '{"b":1,"a":[]}', True),
    ({"type": "object"}, '{"a": 1}', False),  # compact
    ({"type": "object"}, "[]", False),
    ({"properties": {"a": {}, "b": {}}, "type": "object"}, '{"b":1,"a":1}', False),  # in the order of the schema
    ({"properties": {"a": {"type": "null"}}, "type": "object"}, r'{"\u0061":1}', False),
    ({"properties": {"a/b": {"type": "null"}}, "type": "object"}, r'{"a\/b":1}', False),
    ({"const": "\n"}, r'"\n"', True),
    ({"type": "string"}, r'"\u0001"', False),
    ({"type": "string", "pattern": r"^[\x00-\x20]$"}, '" "', True),
    ({"type": "string"}, '"é 😀\u2028"', True),
    ({"type": "string"}, r'"\n\t\"\\"', True),
    ({"type": "integer"}, "1.0", False),
    ({"type": "number"}, "-1.5e-7", True),
    (True, "null", True),
    (
        {"$ref": "#/$defs/n", "$defs": {"n": {"type": "null"}}, "title": "t", "default": 1, "deprecated": True},
        "null",
        True,
    ),
    ({"type": "string", "format": "date"}, '"2024-02-31"', False),
]


@pytest.mark.parametrize(("schema", "text", "right"), JSON_TEXTS, ids=str)
def test_texts_of_schemas(schema: dict[str, Any] | bool, text: str, right: bool) -> None:
    assert takes(Constraint.json_schema(schema), text) == right
    assert takes(Constraint.json_schema(json.dumps(schema)), text) == right


def test_json_objects() -> None:
    assert takes(Constraint.json_object(), '{"a":{"b":[1,null]}}')
    assert not takes(Constraint.json_object(), "3")
    assert not takes(Constraint.json_object(), '{"a": 1}')
    assert takes(Constraint.json_object(whitespace=True), '{ "a":\n 1}')
    assert takes(Constraint.json_schema(PET, whitespace=True), '{"kind": "cat", "legs": 4}')


def test_a_schema_is_taken_when_it_is_given() -> None:
    schema = {"enum": ["a"]}
    constraint = Constraint.json_schema(schema)
    schema["enum"].append("b")
    assert not takes(constraint, '"b"')


REGEX_TEXTS = [
    (r"a+b?", "aab", True),
    (r"a+b?", "xaab", False),  # all of the text
    (r"^(a|b)$", "b", True),
    (r"a.b", "a\nb", False),
    (r"(?s)a.b", "a\nb", True),
    (r"(?i)é", "É", True),
    (r"\d/\w", "٣/é", True),
    ("", "", True),
    (r"a*?b", "aab", True),
]


@pytest.mark.parametrize(("pattern", "text", "right"), REGEX_TEXTS, ids=repr)
def test_texts_of_regular_expressions(pattern: str, text: str, right: bool) -> None:
    assert takes(Constraint.regex(pattern), text) == right


def test_what_only_describes_is_not_refused() -> None:
    described = {"title": "t", "description": "d", "default": 3, "examples": [1], "$comment": "c", "deprecated": True}
    more = {"readOnly": True, "writeOnly": True, "contentEncoding": "base64", "$anchor": "a", "x-other": 1}
    bounds = {"maximum": 2**63 - 1}
    assert takes(Constraint.json_schema({"type": "integer", **described, **more, **bounds}), "12")


# ---- Tokenizers


def test_a_tokenizer_of_a_gguf_file(tmp_path: Any) -> None:
    write_pair(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path / "target.gguf"), "target")
    assert tokenizer is not None
    of = Tokens(tokenizer, 2048, frozenset([0]))
    constraint = Constraint.json_schema(PET)
    tokens = OF.encode('{"kind":"cat","legs":4}')
    for place in range(len(tokens) + 1):
        assert of.matcher(constraint).allowed(tokens[:place]) == OF.matcher(constraint).allowed(tokens[:place])


# ---- What is shared


def test_a_constraint_serves_several_tokenizers_and_ends() -> None:
    constraint = Constraint.regex("(?s)a*")
    for of in (OF, padded(), OF._replace(eos=frozenset([0, 5])), OF._replace(vocabulary=2100)):
        mask = of.matcher(constraint).allowed([])
        assert len(mask) == 4 * -(-of.vocabulary // 32)
        assert of.eos <= {*bits(mask)}


def test_a_tokenizer_can_go() -> None:
    constraint, tokenizer = Constraint.regex("a"), trained()
    matcher = constraint.matcher(tokenizer, 500, frozenset([5]))
    assert isinstance(constraint, Grammar)
    gone, compiled = weakref.ref(tokenizer), constraint._compiled
    assert len(compiled) == 1
    del tokenizer, matcher
    gc.collect()
    assert gone() is None
    assert len(compiled) == 0


def test_matchers_of_several_threads() -> None:
    tokenizer, constraint, found = trained(), Constraint.json_schema(PET), list[bytes]()

    def ask() -> None:
        matcher = constraint.matcher(tokenizer, 500, frozenset([5]))
        found.append(b"".join(matcher.allowed(path) for path in ([], matcher.forced([]))))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


def test_a_constraint_is_shown_on_one_line() -> None:
    assert repr(Constraint.regex("a\nb" * 99)).startswith("<Grammar regex 'a")
    assert len(repr(Constraint.regex("a\nb" * 99))) < 100
