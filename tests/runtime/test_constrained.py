"""Constrained texts of tiny models: the tokens that a logits processor gives, however they are drafted and run."""

from __future__ import annotations

from typing import Any

import implementations
import pytest
from captured_pair import capture
from made_up import MadeUp
from tiny import PROMPT
from tiny_pair import SAMPLINGS, tiny_pair

from specbranch import METHODS, SpecBranch
from specbranch.core.errors import SpecBranchError
from specbranch.core.generation import GenerationFailed
from specbranch.text.grammar import Constraint

V = 32  # tokens of tiny models
NEW = 60
SEEDS = range(6)


def expected(pair: SpecBranch, constraint: MadeUp, sampling: dict[str, Any]) -> list[int]:
    """By a logits processor, one token after the other."""
    processor = constraint.processor(V)
    more: dict[str, Any] = {"method": "autoregressive", "logits_processor": processor, **sampling}
    return pair.generate(PROMPT, max_new_tokens=NEW, **more).tokens


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_the_tokens_of_a_logits_processor(method: str, sampling: dict[str, Any]) -> None:
    pair, forced = tiny_pair(), 0
    for seed in SEEDS:
        constraint = MadeUp(seed, PROMPT)
        tokens = expected(pair, constraint, sampling)
        assert constraint.holds(tokens, V)
        for overlap in (True, False):
            result = pair.generate(
                PROMPT, max_new_tokens=NEW, method=method, overlap=overlap, constraint=constraint, **sampling
            )
            assert result.tokens == tokens
            forced += result.stats.forced_accepted
    assert (forced > 0) == (method not in ("autoregressive", "specbranch-paper"))


@pytest.mark.parametrize("retrieval", [False, True])
def test_without_a_draft_what_must_follow_is_drafted(retrieval: bool) -> None:
    pair = tiny_pair()
    alone = SpecBranch(pair.target, retrieval=retrieval)
    for seed in SEEDS:
        constraint = MadeUp(seed, PROMPT)
        result = alone.generate(PROMPT, max_new_tokens=NEW, constraint=constraint)
        assert result.tokens == expected(pair, constraint, {})
        assert result.stats.draft_forwards == 0
        assert result.stats.forced_accepted > 0
        assert result.stats.target_forwards <= NEW - result.stats.forced_accepted
    with pytest.raises(SpecBranchError, match="needs a draft"):
        SpecBranch(pair.target, retrieval=False).generate(PROMPT, max_new_tokens=4)


def test_tokens_that_must_follow_need_not_be_drafted() -> None:
    pair, constraint = tiny_pair(), MadeUp(1, PROMPT)
    with_them = pair.generate(PROMPT, max_new_tokens=NEW, constraint=constraint)
    constraint.forced = False
    without = pair.generate(PROMPT, max_new_tokens=NEW, constraint=constraint)
    assert without.tokens == with_them.tokens
    assert without.stats.forced == 0 < with_them.stats.forced


@pytest.mark.parametrize("method", ["specbranch", "pearl", "autoregressive"])
@pytest.mark.parametrize("overlap", [False, True])
def test_captured_steps_take_masks(method: str, overlap: bool) -> None:
    """From memory that the host fills while the forward is under way."""
    pair = tiny_pair()
    for seed in SEEDS:
        constraint, sampling = MadeUp(seed, PROMPT), SAMPLINGS[seed % 2]
        tokens = expected(pair, constraint, sampling)
        target, draft = capture(pair, seed)
        result = pair.generate(
            PROMPT, max_new_tokens=NEW, method=method, overlap=overlap, constraint=constraint, **sampling
        )
        assert result.tokens == tokens
        assert result.stats.target_runner == "captured"
        assert any(graph.replays for graph in target.graphs)
        assert any(graph.replays for graph in draft.graphs) == (method != "autoregressive")
        free = pair.generate(PROMPT, max_new_tokens=20, method=method, overlap=overlap, **sampling)
        assert free.tokens == pair.generate(PROMPT, max_new_tokens=20, method="autoregressive", **sampling).tokens


def test_the_cuda_kernels_take_masks() -> None:
    pair = tiny_pair()
    wanted = [expected(pair, MadeUp(seed, PROMPT), SAMPLINGS[seed % 2]) for seed in SEEDS]
    with implementations.emulated_runtime():
        capture(pair)
        for seed, tokens in zip(SEEDS, wanted, strict=True):
            constraint = MadeUp(seed, PROMPT)
            result = pair.generate(PROMPT, max_new_tokens=NEW, constraint=constraint, **SAMPLINGS[seed % 2])
            assert result.tokens == tokens


@pytest.mark.parametrize("captured", [False, True])
def test_several_texts_each_with_a_constraint_or_none(captured: bool) -> None:
    pair = tiny_pair()
    prompts = [PROMPT[: 3 + seed] for seed in range(6)]
    each = [None if seed % 3 == 0 else MadeUp(seed, prompts[seed]) for seed in range(6)]
    alone = [
        pair.generate(
            prompt, max_new_tokens=30, method="autoregressive", constraint=constraint, seed=4, temperature=0.8
        )
        for prompt, constraint in zip(prompts, each, strict=True)
    ]
    if captured:
        capture(pair)
    together = pair.generate(prompts, max_new_tokens=30, constraint=each, seed=4, temperature=0.8)
    assert [one.tokens for one in together] == [one.tokens for one in alone]


def test_a_constraint_beside_rules() -> None:
    """Which are asked about every token, and so see those that nothing else can stand for."""
    pair, constraint, seen = tiny_pair(), MadeUp(2, PROMPT), []

    def watch(ids: Any, scores: Any) -> Any:
        seen.append(ids.shape[1])
        return scores

    result = pair.generate(PROMPT, max_new_tokens=NEW, constraint=constraint, logits_processor=watch)
    assert result.tokens == expected(pair, constraint, {})
    assert seen == list(range(len(PROMPT), len(PROMPT) + NEW))
    shown = pair.generate(PROMPT, max_new_tokens=NEW, constraint=constraint, logprobs=2)
    assert shown.tokens == result.tokens
    assert shown.logprobs is not None
    assert [each.token for each in shown.logprobs] == shown.tokens


class DeadEnd(MadeUp):
    """Nothing may follow some tokens of the text."""

    def matcher(self, tokenizer: Any, vocabulary: int, eos: frozenset[int]) -> Any:
        matcher = super().matcher(tokenizer, vocabulary, eos)
        allowed, begun = matcher.allowed, len(self.prompt)
        matcher.allowed = lambda path: (  # type: ignore[method-assign]
            bytes(4) if len(self.made[-1].text) + len(path) >= begun + 7 else allowed(path)
        )
        return matcher


@pytest.mark.parametrize("method", ["specbranch", "autoregressive", "pearl"])
def test_a_dead_end_is_the_text_s_error_and_keeps_what_was_committed(method: str) -> None:
    pair = tiny_pair()
    whole = pair.generate(PROMPT, max_new_tokens=NEW, constraint=MadeUp(4, PROMPT), method="autoregressive")
    with pytest.raises(GenerationFailed, match="no token may follow the text") as raised:
        pair.generate(PROMPT, max_new_tokens=NEW, constraint=DeadEnd(4, PROMPT), method=method)
    kept = raised.value.generation
    assert kept.finish_reason == "error"
    assert 0 < len(kept.tokens) <= 7
    assert kept.tokens == whole.tokens[: len(kept.tokens)]
    assert pair.generate(PROMPT, max_new_tokens=8, method=method).tokens  # the engine goes on


class Impossible(Constraint):
    def matcher(self, tokenizer: Any, vocabulary: int, eos: frozenset[int]) -> Any:
        matcher = MadeUp(1, PROMPT).matcher(tokenizer, vocabulary, eos)
        matcher.allowed = lambda path: bytes(4)  # type: ignore[method-assign]
        return matcher


def test_what_no_text_can_be_is_said_before_the_first_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = tiny_pair()
    monkeypatch.setattr(type(pair.target), "forward", lambda *_, **__: pytest.fail("a forward"))
    with pytest.raises(SpecBranchError, match="no token may follow the text"):
        pair.generate(PROMPT, max_new_tokens=4, constraint=Impossible())


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        ("[0-9]+", "constraint is '\\[0-9\\]\\+'; expected a Constraint"),
        ([None, None], "constraint has 2 elements; expected one for each of 1 prompts"),
        (Constraint.regex("a+"), "a constraint needs a tokenizer"),
    ],
)
def test_a_wrong_constraint_is_refused_by_name(constraint: Any, said: str) -> None:
    with pytest.raises(SpecBranchError, match=said):
        tiny_pair().generate(PROMPT, max_new_tokens=4, constraint=constraint)
