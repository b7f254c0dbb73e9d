"""Tokenizers, schemas with values, and walks, for the tests of constrained texts."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import specbranch
from specbranch.stages import Matcher
from specbranch.text.grammar import Constraint


class Tokens(NamedTuple):
    """What a matcher is made for."""

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    eos: frozenset[int]

    def matcher(self, constraint: Constraint) -> Matcher:
        return constraint.matcher(*self)

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer.encode(text, add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Without the end."""
        text = self.tokenizer.decode([token for token in tokens if token not in self.eos])
        assert isinstance(text, str)
        return text


@lru_cache
def bundled() -> Tokens:
    tokenizer = AutoTokenizer.from_pretrained(Path(specbranch.__file__).parent / "bundled" / "target")
    return Tokens(tokenizer, 2048, frozenset([0]))


def trained(*, vocabulary: int = 420, alphabet: Sequence[str] | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE in the manner of Qwen's, that composes characters (NFC) and has special tokens at its end."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet is None else alphabet
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=list(letters), show_progress=False)
    lines = [
        json.dumps({"name": "Ann", "tags": ["red", "green"], "size": [12, 3.5], "ok": True}, separators=(",", ":"))
    ]
    backend.train_from_iterator(lines * 3 + ["the café of naïve cafés", "false true null"], trainer)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", clean_up_tokenization_spaces=False)


@lru_cache
def padded() -> Tokens:
    """Its model has more logits than it has tokens, no multiple of 32, and two tokens end a text."""
    tokenizer = trained()
    words = tokenizer.get_vocab()
    return Tokens(tokenizer, len(words) + 45 - len(words) % 32, frozenset([words["<|im_end|>"], words["<|end|>"]]))


def bits(mask: bytes) -> list[int]:
    """The tokens of a mask."""
    return [8 * place + bit for place, byte in enumerate(mask) if byte for bit in range(8) if byte >> bit & 1]


def walk(of: Tokens, constraint: Constraint, seed: int, most: int = 400) -> list[int] | None:
    """Random tokens of the masks to the end of the text; what closes something, and the end, are taken gladly. None
    where `most` tokens are not enough."""
    drawn, matcher, found = random.Random(seed), of.matcher(constraint), list[int]()
    closing = {token for text in '"}],:' for token in of.encode(text)} | of.eos
    while len(found) < most:
        tokens = bits(matcher.allowed([]))
        gladly = [token for token in tokens if token in closing]
        token = drawn.choice(gladly if gladly and drawn.random() < 0.1 + len(found) / 40 else tokens)
        matcher.accept([token])
        found.append(token)
        if token in of.eos:
            assert matcher.complete
            return found
    return None


# ---- Schemas, and a value that each validates with its keys in the order of the schema

Pair = tuple[dict[str, Any], Any]
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=6)
NAMES = ["a", "b", "name", "café", 'quo"te', "a/b", "back\\slash", "a b"]


@st.composite
def _integers(draw: st.DrawFn) -> Pair:
    value = draw(st.integers(-300, 300))
    schema: dict[str, Any] = {"type": "integer"}
    for name, bound in (("minimum", value - draw(st.integers(0, 40))), ("maximum", value + draw(st.integers(0, 40)))):
        if draw(st.booleans()):
            schema[name] = bound
    if draw(st.booleans()):
        step = draw(st.integers(1, 9))
        schema["multipleOf"], value = step, value - value % step
        if value < schema.get("minimum", value):
            del schema["minimum"]
    return schema, value


@st.composite
def _strings(draw: st.DrawFn) -> Pair:
    kind = draw(st.sampled_from(["free", "length", "pattern", "format"]))
    if kind == "pattern":
        pattern, value = draw(
            st.sampled_from([("^[a-c]{2,4}$", "abc"), (r"\d", "x7é"), ("^(é|ab)+", 'éab"'), ("", "")])
        )
        return {"type": "string", "pattern": pattern}, value
    if kind == "format":
        name, value = draw(
            st.sampled_from(
                [("date", "2024-02-03"), ("uuid", "00000000-0000-4000-8000-00000000000a"), ("ipv4", "1.2.3.4")]
            )
        )
        return {"type": "string", "format": name}, value
    value = draw(TEXT)
    if kind == "free":
        return {"type": "string"}, value
    return {
        "type": "string",
        "minLength": max(0, len(value) - 2),
        "maxLength": len(value) + draw(st.integers(0, 3)),
    }, value


LEAVES = st.one_of(
    _integers(),
    _strings(),
    st.sampled_from(
        [({"type": "boolean"}, True), ({"type": "null"}, None), ({"type": "number"}, -2.5), ({}, [1, {"é": None}])]
    ),
    st.lists(st.one_of(TEXT, st.integers(-99, 99), st.booleans(), st.none()), min_size=1, max_size=4).map(
        lambda values: ({"enum": values}, values[-1])
    ),
    TEXT.map(lambda value: ({"const": [value]}, [value])),
    st.just(({"type": ["integer", "string"], "description": "either"}, "x")),
)


@st.composite
def _arrays(draw: st.DrawFn, children: st.SearchStrategy[Pair]) -> Pair:
    if draw(st.booleans()):
        parts = draw(st.lists(children, min_size=1, max_size=3))
        schemas = [schema for schema, _ in parts]
        return {"type": "array", "prefixItems": schemas, "items": False}, [value for _, value in parts]
    item, value = draw(children)
    count = draw(st.integers(0, 3))
    return {"type": "array", "items": item, "minItems": draw(st.integers(0, count)), "maxItems": 3}, [value] * count


@st.composite
def _objects(draw: st.DrawFn, children: st.SearchStrategy[Pair]) -> Pair:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=3))
    parts = {name: draw(children) for name in names}
    there = [name for name in names if draw(st.booleans())]
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {name: schema for name, (schema, _) in parts.items()},
        "required": [name for name in there if draw(st.booleans())],
    }
    value = {name: parts[name][1] for name in there}
    if draw(st.booleans()):
        more, other = draw(children)
        schema["additionalProperties"] = more
        if draw(st.booleans()):
            value["zz"] = other
    else:
        schema["additionalProperties"] = False
    return schema, value


@st.composite
def _choices(draw: st.DrawFn, children: st.SearchStrategy[Pair]) -> Pair:
    parts = draw(st.lists(children, min_size=1, max_size=3))
    return {"anyOf": [schema for schema, _ in parts]}, draw(st.sampled_from(parts))[1]


def pairs() -> st.SearchStrategy[Pair]:
    return st.recursive(LEAVES, lambda of: st.one_of(_arrays(of), _objects(of), _choices(of)), max_leaves=6)


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
