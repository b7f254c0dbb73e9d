"""Processors, criteria, a GenerationConfig, messages and log-probabilities in our own `generate` and `stream`."""

from typing import Any

import pytest
import torch
from captured_pair import capture
from tiny import PROMPT
from tiny_pair import tiny_pair
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper
from transformers.generation import logits_process as processors

from specbranch import Generation, GenerationFailed, SpecBranch, SpecBranchError, bundled
from specbranch.core.messages import Trunk
from specbranch.core.sampling import Sampling
from specbranch.door import fused
from specbranch.runtime.rules import DraftRules, Rules, Said, Walk, is_stateless

PROMPTS = [entry["prompt"] for entry in bundled.prompts()]
NEW = 16


class Bans(LogitsProcessor):
    """The likeliest token behind every text of even length."""

    stateless = True

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] % 2 == 0:
            return scores.scatter(1, scores.argmax(-1, keepdim=True), -torch.inf)
        return scores


def greedy(engine: SpecBranch, prompt: str, **arguments: Any) -> list[int]:
    """transformers' own."""
    generate: Any = engine.target.generate
    ids = torch.tensor([engine.encode(prompt)])
    made = generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **arguments)
    return [int(token) for token in made[0, ids.shape[1] :]]


def test_our_own_generate_takes_the_same(bundled_pair: SpecBranch) -> None:
    processors, criterion = [Bans()], lambda ids, scores, **_: torch.full((1,), ids.shape[1] % 13 == 0)
    config = GenerationConfig(max_new_tokens=NEW, repetition_penalty=1.2, no_repeat_ngram_size=3)
    for prompt in PROMPTS[:4]:
        given: dict[str, Any] = {"generation_config": config, "logits_processor": LogitsProcessorList(processors)}
        expected = greedy(bundled_pair, prompt, **given)
        assert bundled_pair.generate(prompt, **given).tokens == expected
        assert bundled_pair.generate(prompt, **given | {"logits_processor": Bans()}).tokens == expected
        with bundled_pair.stream(prompt, **given) as stream:
            text = "".join(stream)
        assert stream.generation is not None
        assert (stream.generation.tokens, stream.generation.text) == (expected, text)
        ended = bundled_pair.generate(prompt, **given, stopping_criteria=criterion)
        assert ended.tokens == greedy(bundled_pair, prompt, **given, stopping_criteria=[criterion])
        assert ended.finish_reason == ("stop" if len(ended.tokens) < NEW else "length")


def test_explicit_arguments_win_over_a_config_and_that_over_the_checkpoint_s(
    bundled_pair: SpecBranch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled_pair.target, "generation_config", GenerationConfig(max_new_tokens=5, top_k=7))
    config = GenerationConfig(do_sample=True, temperature=0.8, max_new_tokens=9)
    sampled = bundled_pair.generate(PROMPTS[0], generation_config=config, seed=4).tokens
    assert sampled == bundled_pair.generate(PROMPTS[0], max_new_tokens=9, temperature=0.8, top_k=7, seed=4).tokens
    assert len(bundled_pair.generate(PROMPTS[0]).tokens) == 5
    plain = bundled_pair.generate(PROMPTS[0], generation_config=config, temperature=0, max_new_tokens=6)
    assert plain.tokens == greedy(bundled_pair, PROMPTS[0], max_new_tokens=6, top_k=None)
    with pytest.raises(SpecBranchError, match="generation_config is 'hot'; expected a GenerationConfig"):
        bundled_pair.generate(PROMPTS[0], generation_config="hot")


def test_a_checkpoint_s_penalty_counts(bundled_pair: SpecBranch, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = bundled_pair.generate(PROMPTS[0], max_new_tokens=NEW).tokens
    config = GenerationConfig(repetition_penalty=1.5, stop_strings=["never in a text"])
    monkeypatch.setattr(bundled_pair.target, "generation_config", config)
    found = bundled_pair.generate(PROMPTS[0], max_new_tokens=NEW).tokens
    assert found != plain
    assert found == greedy(bundled_pair, PROMPTS[0], max_new_tokens=NEW, stop_strings=None)


def test_a_neutral_value_wins_over_the_checkpoint_s(bundled_pair: SpecBranch, monkeypatch: pytest.MonkeyPatch) -> None:
    rules: dict[str, Any] = {"logits_processor": Bans(), "max_new_tokens": NEW}
    expected = bundled_pair.generate(PROMPTS[0], **rules).tokens
    monkeypatch.setattr(bundled_pair.target, "generation_config", GenerationConfig(repetition_penalty=1.5))
    assert bundled_pair.generate(PROMPTS[0], **rules).tokens != expected
    neutral = GenerationConfig(repetition_penalty=1.0)
    assert bundled_pair.generate(PROMPTS[0], generation_config=neutral, **rules).tokens == expected


def test_messages_are_a_prompt(bundled_pair: SpecBranch) -> None:
    assert bundled_pair.tokenizer is not None
    messages = [{"role": "user", "content": "def f(x):"}]
    template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    engine = SpecBranch(bundled_pair.target, bundled_pair.draft, tokenizer=bundled_pair.tokenizer)
    bundled_pair.tokenizer.chat_template = template
    try:
        expected = engine.generate(messages, max_new_tokens=4).tokens
        assert engine.generate(messages=messages, max_new_tokens=4).tokens == expected
        assert (
            "".join(engine.stream(messages=messages, max_new_tokens=4))
            == engine.generate("def f(x):\n", max_new_tokens=4).text
        )
    finally:
        bundled_pair.tokenizer.chat_template = None
    for arguments, message in (
        ({}, "there is no prompt: expected prompt or messages"),
        ({"prompt": "x", "messages": messages}, "there are both prompt and messages"),
        ({"messages": "hello"}, "messages is 'hello'; expected a list of chat messages"),
    ):
        with pytest.raises(SpecBranchError, match=message):
            engine.generate(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"logits_processor": 5}, r"logits_processor\[0\] is 5; expected a callable of ids and scores"),
        ({"stopping_criteria": [None]}, r"stopping_criteria\[0\] is None"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logprobs": "all"}, "logprobs is 'all'; expected an integer"),
    ],
)
def test_bad_rules(bundled_pair: SpecBranch, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecBranchError, match=message):
        bundled_pair.generate("x", max_new_tokens=2, **arguments)


# ---- Log-probabilities


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 2}, {"overlap": True}])
def test_logprobs_are_those_of_the_model(bundled_pair: SpecBranch, settings: dict[str, Any]) -> None:
    ids = bundled_pair.encode(PROMPTS[0])
    made = bundled_pair.generate(ids, max_new_tokens=NEW, logprobs=3, **settings)
    assert made.tokens == bundled_pair.generate(ids, max_new_tokens=NEW, **settings).tokens
    assert made.logprobs is not None
    with torch.no_grad():
        logits = bundled_pair.target(input_ids=torch.tensor([[*ids, *made.tokens]])).logits[0, len(ids) - 1 : -1]
    expected = logits.log_softmax(-1)
    assert [each.token for each in made.logprobs] == made.tokens
    for row, each in zip(expected, made.logprobs, strict=True):
        assert each.logprob == pytest.approx(float(row[each.token]), abs=1e-4)
        best = row.topk(3)
        assert [token for token, _ in each.top] == best.indices.tolist()
        assert [value for _, value in each.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_logprobs_arrive_with_a_stream_and_end_with_the_text(bundled_pair: SpecBranch) -> None:
    whole = bundled_pair.generate(PROMPTS[0], max_new_tokens=32).text
    stream = bundled_pair.stream(PROMPTS[0], max_new_tokens=32, stop=whole[20:24], logprobs=0)
    seen = 0
    for _ in stream:
        assert len(stream.logprobs) > seen
        seen = len(stream.logprobs)
    assert stream.generation is not None
    assert stream.generation.logprobs is not None
    assert [each.token for each in stream.generation.logprobs] == stream.generation.tokens
    assert not any(each.top for each in stream.generation.logprobs)
    assert bundled_pair.generate(PROMPTS[0], max_new_tokens=2).logprobs is None


# ---- The draft guesses under the rules


def test_the_draft_follows_what_has_no_state() -> None:
    """A draft that is the target is always right then, also within a burst, and below branches."""
    engine = tiny_pair(noise=0)
    rules: dict[str, Any] = {"generation_config": GenerationConfig(repetition_penalty=2.0, no_repeat_ngram_size=2)}
    choices: list[dict[str, Any]] = [{}, {"logits_processor": Bans()}]
    for more in choices:
        for method in ("speculative", "specbranch", "pearl"):
            stats = engine.generate(
                PROMPT, max_new_tokens=24, method=method, overlap=False, retrieval=False, **rules, **more
            ).stats
            assert stats.rejected == 0, (method, more)
            assert stats.accepted > 12 or method == "specbranch"  # which drafts where that pays


def test_what_the_draft_may_call() -> None:
    assert is_stateless(TemperatureLogitsWarper(0.5))
    assert is_stateless(Bans())
    assert not is_stateless(lambda ids, scores: scores)
    assert not is_stateless(type("Mine", (TemperatureLogitsWarper,), {})(0.5))  # who knows


def test_rules_that_fail_at_a_guess_change_no_text(bundled_pair: SpecBranch) -> None:
    """A text that is only guessed may be one that a processor is not made for."""

    class Narrow(LogitsProcessor):
        stateless = True

        def __init__(self, texts: list[list[int]], nothing: bool) -> None:
            self.texts, self.nothing = texts, nothing

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if input_ids[0].tolist() in self.texts:
                return scores
            if self.nothing:
                return torch.full_like(scores, -torch.inf)
            raise KeyError("no such text")

    for prompt in PROMPTS[:3]:
        ids = bundled_pair.encode(prompt)
        tokens = bundled_pair.generate(ids, max_new_tokens=NEW).tokens
        texts = [[*ids, *tokens[:count]] for count in range(NEW)]
        for nothing in (False, True):
            made = bundled_pair.generate(ids, max_new_tokens=NEW, logits_processor=Narrow(texts, nothing), length=5)
            assert made.tokens == tokens


def test_a_row_that_allows_nothing_ends_the_generation(bundled_pair: SpecBranch) -> None:
    def nothing(ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf) if ids.shape[1] > 40 else scores

    for temperature in (0.0, 1.0):
        with pytest.raises(GenerationFailed, match="mask") as caught:
            bundled_pair.generate(PROMPTS[0], max_new_tokens=32, logits_processor=nothing, temperature=temperature)
        assert len(caught.value.generation.tokens) > 0


def test_a_draft_of_a_smaller_vocabulary_is_asked_in_the_target_s() -> None:
    rules = DraftRules([processors.SuppressTokensLogitsProcessor([9, 3])], torch.tensor([[5, 6]]), 2, 10)
    rows = rules(torch.zeros(2, 8), [5, 6, 7], [[], [1]])
    assert rows.shape == (2, 10)
    assert (rows[:, [3, 8, 9]] == -torch.inf).all()
    assert (rows[:, [0, 1, 2, 4, 5, 6, 7]] == 0).all()


# ---- Captured steps


def test_rules_over_captured_steps() -> None:
    engine = tiny_pair()
    settings: list[dict[str, Any]] = [
        {"generation_config": GenerationConfig(repetition_penalty=1.5)},
        {"logits_processor": Bans(), "temperature": 0.9, "seed": 3},
        {"logprobs": 2},
    ]

    def run(**how: Any) -> Generation:
        return engine.generate(PROMPT, max_new_tokens=24, **how)

    expected = [run(method="autoregressive", **each) for each in settings]
    target, _ = capture(engine)
    for method, overlap in (("specbranch", True), ("speculative", False), ("autoregressive", False)):
        for each, plain in zip(settings, expected, strict=True):
            made = run(method=method, overlap=overlap, **each)
            assert (made.tokens, made.logprobs) == (plain.tokens, plain.logprobs), (method, overlap)
            assert made.stats.target_runner == "captured"
    assert any(graph.replays for graph in target.graphs)


# ---- Filters: fused, or as transformers has them


def warpers(config: GenerationConfig, model: Any) -> list[Any]:
    config.do_sample = True
    return list(model._get_logits_processor(config, device="cpu"))


def test_which_filters_are_fused() -> None:
    model = tiny_pair().target
    plain = GenerationConfig(temperature=0.7, top_k=9, top_p=0.9, min_p=0.1)
    filters, rest, tail = fused(warpers(plain, model), True)
    assert (filters, rest, len(tail)) == ({"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.1}, [], 4)
    filters, rest, _ = fused(warpers(GenerationConfig(repetition_penalty=1.1, top_k=3), model), True)
    assert filters == {"temperature": 1.0, "top_k": 3}
    assert [type(each).__name__ for each in rest] == ["RepetitionPenaltyLogitsProcessor"]
    filters, rest, _ = fused(warpers(GenerationConfig(temperature=0.5, top_k=3, typical_p=0.5), model), True)
    assert (filters, len(rest)) == ({"temperature": 1.0}, 3)  # the last one sees what the others leave
    odd = [processors.TopPLogitsWarper(0.5, min_tokens_to_keep=2)]
    assert fused(odd, True)[:2] == ({"temperature": 1.0}, odd)
    assert fused(odd, False) == ({"temperature": 0.0}, odd, [])


@pytest.mark.parametrize(
    "config",
    [
        {"temperature": 0.8, "top_k": 6, "repetition_penalty": 1.5},
        {"typical_p": 0.7},
        {"top_h": 0.7, "temperature": 1.2},
        {"epsilon_cutoff": 0.04},
        {"eta_cutoff": 0.1, "top_p": 0.9},
    ],
    ids=str,
)
def test_tokens_follow_the_law_of_transformers(config: dict[str, Any]) -> None:
    """Of one token after random logits, 4,000 draws."""
    model, draws = tiny_pair().target, 4000
    logits = torch.randn(1, 32, generator=torch.Generator().manual_seed(3))
    ids: Any = torch.tensor([PROMPT])
    own = warpers(GenerationConfig(**config), model)
    expected = LogitsProcessorList(own)(ids, logits.clone()).softmax(-1)[0] * draws
    filters, rest, tail = fused(own, True)
    counts = torch.zeros(32)
    for seed in range(draws):
        walk = Walk(Rules(rest, tail), ids, Sampling(**filters, seed=seed), lambda token: True, Said())
        counts[walk(Trunk((5,), (-1,), 11), logits)[1]] += 1
    kept = expected > 0
    assert counts[~kept].sum() == 0
    assert kept.sum() > 2
    freedom = int(kept.sum()) - 1
    chi_square = float(((counts - expected)[kept] ** 2 / expected[kept]).sum())
    assert chi_square < freedom + 4.5 * (2 * freedom) ** 0.5
