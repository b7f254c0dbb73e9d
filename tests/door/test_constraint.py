"""Texts under a constraint, by every door of the engine: each is the one of plain decoding under the same masks."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

import specbranch
from specbranch import METHODS, Constraint, GenerationFailed, SpecBranch, SpecBranchError, bundled
from specbranch.runtime.runner import Runner

PROMPTS = [each["prompt"] for each in bundled.prompts()[:4]]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["function", "class", "module"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2},
        "ok": {"type": "boolean"},
    },
    "required": ["name", "kind", "size", "tags", "ok"],
    "additionalProperties": False,
}
KINDS: dict[str, Constraint] = {
    "json_schema": Constraint.json_schema(SCHEMA),
    "json_object": Constraint.json_object(whitespace=True),
    "regex": Constraint.regex(r"def [a-z_]{3,9}\(self\):\n {4}return [0-9]{1,3}\n"),
    "lark": Constraint.lark('start: (line "\\n")+\nline: NAME " = " /[0-9]{1,4}/\nNAME: /[a-z]{2,6}/\n'),
}
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 5},
    {"temperature": 1.3, "top_p": 0.9, "top_k": 30, "seed": 2},
]
NEW = 48


class Masked(LogitsProcessor):
    """llguidance's own masks, for transformers' `generate`."""

    def __init__(self, engine: SpecBranch, grammar: str, prompt: int) -> None:
        from llguidance import LLMatcher
        from llguidance.hf import from_tokenizer

        assert engine.tokenizer is not None
        vocabulary = engine.pair.vocabulary
        self.matcher = LLMatcher(from_tokenizer(engine.tokenizer, vocabulary), grammar)  # type: ignore[arg-type]
        self.read = prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.matcher.consume_tokens(input_ids[0, self.read :].tolist())
        self.read = input_ids.shape[1]
        mask = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(mask, count=scores.shape[1], bitorder="little").astype(bool)
        return scores.masked_fill(~torch.from_numpy(allowed), -torch.inf)


def plain(engine: SpecBranch, prompt: str, constraint: Constraint | None, **options: Any) -> list[int]:
    """One token a forward."""
    options = {"max_new_tokens": NEW, **options, "method": "autoregressive"}
    return engine.generate(prompt, constraint=constraint, **options).tokens


@cache
def expected(engine: SpecBranch, kind: str, place: int, sampling: int) -> list[int]:
    return plain(engine, PROMPTS[place], KINDS[kind], **SAMPLINGS[sampling])


# ---- the same text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sampling", range(len(SAMPLINGS)))
def test_every_method_gives_the_text_of_plain_decoding(
    bundled_pair: SpecBranch, kind: str, method: str, sampling: int
) -> None:
    for place, overlap in enumerate((False, True)):
        options = {**SAMPLINGS[sampling], "max_new_tokens": NEW, "method": method, "overlap": overlap}
        found = bundled_pair.generate(PROMPTS[place], constraint=KINDS[kind], **options)
        assert found.tokens == expected(bundled_pair, kind, place, sampling)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("autoregressive", "specbranch-paper")])
def test_without_a_draft_and_by_retrieval(bundled_pair: SpecBranch, kind: str, method: str) -> None:
    alone = SpecBranch(bundled_pair.target, tokenizer=bundled_pair.tokenizer)
    for options in ({}, {"retrieval": True}):
        for place in range(2):
            found = alone.generate(PROMPTS[place], constraint=KINDS[kind], max_new_tokens=NEW, method=method, **options)
            assert found.tokens == expected(bundled_pair, kind, place, 0)


@pytest.mark.parametrize(
    ("kind", "grammar"),
    [
        ("json_schema", json.dumps({**SCHEMA, "x-guidance": {"whitespace_flexible": False}})),
        ("regex", r"def [a-z_]{3,9}\(self\):\n {4}return [0-9]{1,3}\n"),
    ],
)
def test_greedy_texts_are_those_of_transformers_with_a_logits_processor(
    bundled_pair: SpecBranch, kind: str, grammar: str
) -> None:
    from llguidance import LLMatcher

    made = LLMatcher.grammar_from_regex(grammar) if kind == "regex" else LLMatcher.grammar_from_json_schema(grammar)
    generate: Any = bundled_pair.target.generate
    for place, prompt in enumerate(PROMPTS):
        ids = torch.tensor([bundled_pair.encode(prompt)])
        processor = Masked(bundled_pair, made, ids.shape[1])
        theirs = generate(ids, max_new_tokens=NEW, logits_processor=[processor], do_sample=False)
        assert theirs[0, ids.shape[1] :].tolist() == expected(bundled_pair, kind, place, 0)


def test_what_must_follow_is_drafted_for_free(bundled_pair: SpecBranch) -> None:
    alone = SpecBranch(bundled_pair.target, tokenizer=bundled_pair.tokenizer)
    constraint = KINDS["json_schema"]
    found = alone.generate(PROMPTS[0], constraint=constraint, max_new_tokens=NEW, method="specbranch")
    stats = found.stats.as_dict()
    assert stats["forced_accepted_tokens"] > 5
    assert stats["target_forwards"] < len(found.tokens) - 5
    measured = Constraint.json_schema(SCHEMA, forced=False)
    found = bundled_pair.generate(PROMPTS[0], constraint=measured, max_new_tokens=NEW)
    assert found.tokens == expected(bundled_pair, "json_schema", 0, 0)
    assert found.stats.as_dict()["forced_tokens"] == 0


# ---- how texts end


def test_a_complete_text_stops_and_one_that_is_cut_off_has_the_length(bundled_pair: SpecBranch) -> None:
    for method in METHODS:
        options = {"constraint": KINDS["json_schema"], "method": method}
        whole = bundled_pair.generate(PROMPTS[0], max_new_tokens=NEW, **options)
        assert whole.finish_reason == "stop"
        assert list(json.loads(whole.text)) == SCHEMA["required"]
        count = len(whole.tokens)
        for cut in (1, count // 2, count - 1):
            part = bundled_pair.generate(PROMPTS[0], max_new_tokens=cut, **options)
            assert (part.tokens, part.finish_reason) == (whole.tokens[:cut], "length")
        assert bundled_pair.generate(PROMPTS[0], max_new_tokens=count, **options).finish_reason == "stop"


def test_the_end_is_the_checkpoints_or_what_the_caller_says(bundled_pair: SpecBranch) -> None:
    """Only the tokens that end a text may follow one that is complete."""
    from transformers import GenerationConfig

    once = Constraint.regex("[0-9]{3}")
    usual = bundled_pair.generate(PROMPTS[0], max_new_tokens=9, constraint=once)
    (eos,) = [bundled_pair.target.generation_config.eos_token_id]
    assert usual.tokens[-1] == eos
    other = bundled_pair.encode("z")[-1]
    config = GenerationConfig(eos_token_id=[other])
    found = bundled_pair.generate(PROMPTS[0], max_new_tokens=9, constraint=once, generation_config=config)
    assert found.tokens == [*usual.tokens[:-1], other]
    assert found.finish_reason == "stop"


@pytest.mark.parametrize("sampling", range(len(SAMPLINGS)))
def test_stop_strings_beside_a_constraint(bundled_pair: SpecBranch, sampling: int) -> None:
    options = {**SAMPLINGS[sampling], "max_new_tokens": NEW, "constraint": KINDS["json_schema"]}
    whole = bundled_pair.generate(PROMPTS[1], **options).text
    found = bundled_pair.generate(PROMPTS[1], stop=['"kind"', "\0"], **options)
    assert found.text == whole[: whole.index('"kind"')]
    assert found.finish_reason == "stop"


# ---- with other rules


class NoDigits(LogitsProcessor):
    """As a caller's: of the digits only 7 may stand."""

    def __init__(self, engine: SpecBranch, stateless: bool) -> None:
        assert engine.tokenizer is not None
        self.stateless = stateless
        vocabulary = engine.tokenizer.get_vocab()
        self.banned = [ids for text, ids in vocabulary.items() if any(each in text for each in "012345689")]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.banned] = -torch.inf
        return scores


@pytest.mark.parametrize("stateless", [False, True])
@pytest.mark.parametrize("sampling", range(len(SAMPLINGS)))
def test_a_logits_processor_and_a_constraint(bundled_pair: SpecBranch, stateless: bool, sampling: int) -> None:
    constraint = Constraint.regex(r"[0-9]{2}-[0-9a-c]{2,7}")
    options = {**SAMPLINGS[sampling], "logits_processor": [NoDigits(bundled_pair, stateless)], "constraint": constraint}
    text = plain(bundled_pair, PROMPTS[2], **options)
    for method in METHODS[1:]:
        found = bundled_pair.generate(PROMPTS[2], max_new_tokens=NEW, method=method, **options)
        assert found.tokens == text
        assert found.text.startswith("77-")


def test_nothing_is_left_by_a_processor_and_a_constraint_together(bundled_pair: SpecBranch) -> None:
    options = {"logits_processor": [NoDigits(bundled_pair, False)], "constraint": Constraint.regex("7[0-6]")}
    for method in ("autoregressive", "specbranch"):
        with pytest.raises((GenerationFailed, ValueError), match="masks every token"):
            bundled_pair.generate(PROMPTS[0], max_new_tokens=5, method=method, **options)


@pytest.mark.parametrize("sampling", range(len(SAMPLINGS)))
def test_log_probabilities_under_a_constraint(bundled_pair: SpecBranch, sampling: int) -> None:
    """They are the model's own, and each token has its own."""
    options = {**SAMPLINGS[sampling], "max_new_tokens": NEW, "constraint": KINDS["json_schema"], "logprobs": 2}
    found = bundled_pair.generate(PROMPTS[3], **options)
    assert found.tokens == expected(bundled_pair, "json_schema", 3, sampling)
    assert found.logprobs is not None
    assert [entry.token for entry in found.logprobs] == found.tokens
    with torch.inference_mode():
        ids = torch.tensor([[*bundled_pair.encode(PROMPTS[3]), *found.tokens]])
        rows = bundled_pair.target(ids).logits[0, -1 - len(found.tokens) : -1].log_softmax(-1)
    for entry, row in zip(found.logprobs, rows, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token]), abs=1e-3)
        assert len(entry.top) == 2


# ---- several texts, streams, and transformers' generate


def test_each_of_several_prompts_has_its_constraint_or_none(bundled_pair: SpecBranch) -> None:
    constraints = [KINDS["regex"], None, KINDS["json_schema"], KINDS["lark"]]
    for sampling in SAMPLINGS:
        alone = [plain(bundled_pair, *each, **sampling) for each in zip(PROMPTS, constraints, strict=True)]
        for method in ("specbranch", "speculative", "pearl"):
            options = {**sampling, "max_new_tokens": NEW, "method": method}
            found = bundled_pair.generate(PROMPTS, constraint=constraints, **options)
            assert [each.tokens for each in found] == alone
    shared = bundled_pair.generate(PROMPTS, constraint=KINDS["regex"], max_new_tokens=NEW)
    assert [each.tokens for each in shared] == [expected(bundled_pair, "regex", place, 0) for place in range(4)]


def test_streams(bundled_pair: SpecBranch) -> None:
    options = {"max_new_tokens": NEW, "constraint": KINDS["json_schema"]}
    whole = bundled_pair.generate(PROMPTS[0], **options)
    stream = bundled_pair.stream(PROMPTS[0], **options)
    assert "".join(stream) == whole.text
    assert stream.generation is not None
    assert stream.generation.tokens == whole.tokens
    texts = ["", ""]
    several = bundled_pair.stream(PROMPTS[:2], max_new_tokens=NEW, constraint=[KINDS["json_schema"], None])
    for place, piece in several:
        texts[place] += piece
    assert texts == [whole.text, bundled_pair.generate(PROMPTS[1], max_new_tokens=NEW).text]


def test_custom_generate_with_a_batch(bundled_pair: SpecBranch) -> None:
    generate: Any = bundled_pair.target.generate
    rows = [bundled_pair.encode(prompt) for prompt in PROMPTS[:3]]
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        "max_new_tokens": NEW,
        "custom_generate": bundled_pair,
    }
    constraints = [KINDS["json_schema"], None, KINDS["regex"]]
    alone = [plain(bundled_pair, *each) for each in zip(PROMPTS, constraints, strict=False)]
    found = generate(**inputs, constraint=constraints)[:, width:].tolist()
    assert [row[: len(text)] for row, text in zip(found, alone, strict=True)] == alone
    found = generate(**inputs, constraint=KINDS["regex"])[:, width:].tolist()
    texts = [expected(bundled_pair, "regex", place, 0) for place in range(3)]
    assert [row[: len(text)] for row, text in zip(found, texts, strict=True)] == texts


def test_scores_of_custom_generate_are_masked(bundled_pair: SpecBranch) -> None:
    generate: Any = bundled_pair.target.generate
    ids = torch.tensor([bundled_pair.encode(PROMPTS[0])])
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    found = generate(ids, max_new_tokens=4, custom_generate=bundled_pair, constraint=KINDS["regex"], **wanted)
    assert int((found.scores[0] > -torch.inf).sum()) < 9  # beginnings of "def"
    assert all(bool(logits.isfinite().all()) for logits in found.logits)


def test_the_one_call(bundled_pair: SpecBranch) -> None:
    tokenizer = bundled_pair.tokenizer
    ids = torch.tensor([bundled_pair.encode(PROMPTS[0])])
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_new_tokens": NEW, "constraint": KINDS["json_schema"]}
    for draft in (bundled_pair.draft, None):
        found = specbranch.generate(bundled_pair.target, draft, ids, **options)
        assert isinstance(found, Tensor)
        assert found[0, ids.shape[1] :].tolist() == expected(bundled_pair, "json_schema", 0, 0)
    stopped = specbranch.generate(bundled_pair.target, bundled_pair.draft, ids, stop_strings=['"kind"'], **options)
    assert isinstance(stopped, Tensor)
    new = stopped[0, ids.shape[1] :].tolist()
    assert new == expected(bundled_pair, "json_schema", 0, 0)[: len(new)]
    assert tokenizer is not None
    assert '"kind"' in tokenizer.decode(new)
    assert '"kind"' not in tokenizer.decode(new[:-1])


# ---- bad input


@pytest.fixture
def no_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("a model ran")

    for name in ("prefill", "verify", "draft"):
        monkeypatch.setattr(Runner, name, fail)


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ("[0-9]", r"constraint is '\[0-9\]'; expected a Constraint, such as Constraint.regex"),
        ([None, None], "constraint has 2 elements; expected one for each of 1 prompts"),
        (Constraint.regex("("), "regex cannot be used: unclosed group"),
        (Constraint.lark("start: x"), "lark cannot be used: line 1, column 8: unknown name"),
        (Constraint.json_schema({"not": {}}), "json_schema has keywords that are not supported: not"),
        (Constraint.json_schema(False), "json_schema: no text satisfies it"),
    ],
)
def test_bad_constraints_are_refused_before_any_forward(
    bundled_pair: SpecBranch, no_forwards: None, constraint: Any, message: str
) -> None:
    generate: Any = bundled_pair.target.generate
    ids = torch.tensor([bundled_pair.encode(PROMPTS[0])])
    calls = [
        lambda: bundled_pair.generate(PROMPTS[0], constraint=constraint),
        lambda: list(bundled_pair.stream(PROMPTS[0], constraint=constraint)),
        lambda: bundled_pair.request(PROMPTS[0], constraint=constraint),
        lambda: generate(ids, custom_generate=bundled_pair, constraint=constraint, max_new_tokens=9),
    ]
    for call in calls:
        with pytest.raises(SpecBranchError, match=message):
            call()
    if isinstance(constraint, Constraint):
        with pytest.raises(SpecBranchError, match=message):
            bundled_pair.prepare(constraint)
        with pytest.raises(SpecBranchError, match=f"prompt 1: {message}"):
            bundled_pair.generate(PROMPTS[:2], constraint=[None, constraint])


def test_a_constraint_needs_a_tokenizer(bundled_pair: SpecBranch, no_forwards: None) -> None:
    engine = SpecBranch(bundled_pair.target, bundled_pair.draft)
    for call in (lambda: engine.generate([5, 9], constraint=KINDS["regex"]), lambda: engine.prepare(KINDS["regex"])):
        with pytest.raises(SpecBranchError, match="a constraint needs a tokenizer: pass tokenizer="):
            call()
