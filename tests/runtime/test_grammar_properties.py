"""What holds for every constraint and every path: masks, forced tokens, and texts against the schema."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
from grammars import Pair, Tokens, bits, bundled, compact, padded, pairs, walk
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from specbranch.text.grammar import Constraint

TOKENS = pytest.mark.parametrize("of", [bundled(), padded()], ids=["bundled", "padded"])
quick = settings(deadline=None, max_examples=40)
GRAMMARS = [
    Constraint.json_object(),
    Constraint.json_object(whitespace=True),
    Constraint.json_schema(
        {
            "type": "object",
            "properties": {"kind": {"enum": ["cat", "cattle", "cafe\u0301"]}, "legs": {"type": "integer"}},
            "required": ["kind", "legs"],
            "additionalProperties": False,
        }
    ),
    Constraint.json_schema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "number"}}]}),
    Constraint.regex(r"(?s)(abc|abcd|é)?x*.{0,3}"),
    Constraint.regex("yes|no|yesterday"),
    Constraint.lark('start: e\ne: N | "(" e ("+" | "-") e ")"\nN: /[0-9]+/\n%ignore / /'),
    Constraint.lark('start: head %json {"type": "object"}\nhead[lazy]: /[a-z]*=/'),
]
grammars = st.sampled_from(GRAMMARS)


@TOKENS
@quick
@given(pair=pairs())
def test_every_compact_dump_of_a_valid_value_is_allowed(of: Tokens, pair: Pair) -> None:
    schema, value = pair
    jsonschema.validate(value, schema)
    matcher = of.matcher(Constraint.json_schema(schema))
    text = compact(value)
    for token in of.encode(text):
        assert token in bits(matcher.allowed([])), (schema, text)
        matcher.accept([token])
    assert matcher.complete
    assert of.eos <= {*bits(matcher.allowed([]))}
    matcher.accept([max(of.eos)])
    assert matcher.complete


@TOKENS
@quick
@given(pair=pairs(), seed=st.integers(0, 2**32), whitespace=st.booleans())
def test_what_is_walked_validates(of: Tokens, pair: Pair, seed: int, whitespace: bool) -> None:
    tokens = walk(of, Constraint.json_schema(pair[0], whitespace=whitespace), seed)
    assume(tokens is not None)
    assert tokens is not None
    text = of.decode(tokens)
    jsonschema.validate(json.loads(text), pair[0], format_checker=jsonschema.FormatChecker(["ipv4", "uuid"]))


def tree(of: Tokens, constraint: Constraint, drawn: random.Random, size: int) -> list[list[int]]:
    """Paths from the beginning, each a longer one than one before, of a few random tokens everywhere, in any order."""
    paths: list[list[int]] = [[]]
    while len(paths) < size:
        path = drawn.choice(paths[-4:])
        tokens = bits(of.matcher(constraint).allowed(path))
        paths.append([*path, drawn.choice(tokens)])
    return paths


@TOKENS
@quick
@given(constraint=grammars, seed=st.integers(0, 2**32))
def test_paths_in_any_order_are_as_by_a_fresh_matcher(of: Tokens, constraint: Constraint, seed: int) -> None:
    drawn = random.Random(seed)
    paths = tree(of, constraint, drawn, 30)
    matcher, committed = of.matcher(constraint), list[int]()
    for _ in range(40):
        path = drawn.choice([path for path in paths if path[: len(committed)] == committed])
        rest, fresh = path[len(committed) :], of.matcher(constraint)
        if drawn.random() < 0.5:
            assert matcher.allowed(rest) == fresh.allowed(path)
        if drawn.random() < 0.5:
            assert matcher.forced(rest) == fresh.forced(path)
        if drawn.random() < 0.1 and rest:
            matcher.accept(rest[:1])
            committed.append(rest[0])
        if drawn.random() < 0.2:
            fresh = of.matcher(constraint)
            fresh.accept(committed)
            assert matcher.complete == fresh.complete


@TOKENS
@quick
@given(constraint=grammars, seed=st.integers(0, 2**32))
def test_a_forced_token_is_the_only_bit_at_its_place(of: Tokens, constraint: Constraint, seed: int) -> None:
    unforced = of.matcher(constraint)
    for path in tree(of, constraint, random.Random(seed), 12):
        matcher = of.matcher(constraint)
        for token in matcher.forced(path):
            assert bits(unforced.allowed(path)) == [token]
            path = [*path, token]


@TOKENS
@quick
@given(constraint=grammars, seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)), order=st.lists(st.booleans()))
def test_texts_of_one_constraint_do_not_disturb_each_other(
    of: Tokens, constraint: Constraint, seeds: tuple[int, int], order: list[bool]
) -> None:
    texts = [[token for token in walk(of, constraint, seed, most=60) or [] if token not in of.eos] for seed in seeds]
    alone: list[list[Any]] = []
    for text in texts:
        matcher = of.matcher(constraint)
        alone.append([matcher.allowed(text[:place]) for place in range(len(text) + 1)])
    matchers, places = [of.matcher(constraint) for _ in texts], [0, 0]
    for which in map(int, order):
        text, place = texts[which], places[which]
        assert matchers[which].allowed([]) == alone[which][place]
        if place < len(text):
            matchers[which].accept([text[place]])
            places[which] += 1
