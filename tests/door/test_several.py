"""Several texts of one call: each is what it is alone, whatever shares its rounds."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from captured_pair import capture
from recording_device import NotCapturable
from rotary_models import SWITCH, phi
from tiny_pair import tiny_pair
from untrained import untrained

from specbranch import METHODS, GenerationFailed, GenerationInterrupted, SpecBranch, SpecBranchError, bundled
from specbranch.decoding import Decoding
from specbranch.request import Request
from specbranch.runtime import model as runtime_model
from specbranch.scheduler import Scheduler, Ticket
from specbranch.several import Several

PROMPTS = [each["prompt"] for each in bundled.prompts()[:6]]
IDS = [[5, 9, 2, 3 + place] for place in range(7)]
SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 5},
    {"temperature": 1.2, "top_p": 0.9, "top_k": 20, "seed": 2},
]


def requests(engine: SpecBranch, overlap: bool | None = None) -> list[Request]:
    """Of different methods, lengths and samplings."""
    return [
        engine.request(
            ids,
            max_new_tokens=9 + 4 * place,
            method=METHODS[place % len(METHODS)],
            overlap=overlap,
            **SAMPLINGS[place % len(SAMPLINGS)],
        )
        for place, ids in enumerate(IDS)
    ]


def alone(engine: SpecBranch) -> list[list[int]]:
    return [
        engine.generate(
            ids, max_new_tokens=9 + 4 * place, method="autoregressive", **SAMPLINGS[place % len(SAMPLINGS)]
        ).tokens
        for place, ids in enumerate(IDS)
    ]


def together(engine: SpecBranch, asked: list[Request], most: int, cache_tokens: int | None = None) -> Several:
    several = Several(engine.decoder, [partial(same, request) for request in asked], most, cache_tokens)
    while several.advance():
        assert len(several.scheduler.running) <= most
    return several


def same(request: Request) -> Request:
    return request


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_each_text_is_what_it_is_alone(family: str, dtype: torch.dtype) -> None:
    engine = tiny_pair(family, dtype=dtype)
    expected = alone(engine)
    for overlap in (False, True):
        for most in (2, 7):
            found = together(engine, requests(engine, overlap), most).generations()
            assert [each.tokens for each in found] == expected
    assert sum(each.stats.accepted for each in found) > 0
    assert any(each.stats.overlap for each in found)


@pytest.mark.parametrize("weights", ["lossless", "int8", "int4"])
def test_packed_weights_too(weights: str) -> None:
    engine = SpecBranch.from_pretrained("bundled", "bundled", dtype="bfloat16", target_weights=weights)
    expected = [engine.generate(prompt, max_new_tokens=24, method="autoregressive").tokens for prompt in PROMPTS]
    assert [each.tokens for each in engine.generate(PROMPTS, max_new_tokens=24)] == expected


def test_texts_whose_angles_go_by_their_length() -> None:
    """They share rounds and no forwards; here each crosses the length where angles change in another round."""
    target = phi()
    engine = SpecBranch(target, target, draft_context="all")
    assert not engine.pair.target.model.joins
    prompts = [[3 + place, 7, 9] * (SWITCH // 3 - 2 * place) for place in range(4)]
    expected = [engine.generate(ids, max_new_tokens=26, method="autoregressive").tokens for ids in prompts]
    assert [each.tokens for each in engine.generate(prompts, max_new_tokens=26)] == expected


@pytest.mark.parametrize("overlap", [False, True])
def test_captured_steps(overlap: bool) -> None:
    engine, plain = tiny_pair(), tiny_pair()
    expected = alone(plain)
    capture(engine)
    found = together(engine, requests(engine, overlap), 4).generations()
    assert [each.tokens for each in found] == expected
    assert {each.stats.target_runner for each in found} == {"captured"}
    assert {each.stats.draft_runner for each in found} == {"", "captured"}


def test_a_capture_that_fails_leaves_eager_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, plain = tiny_pair(), tiny_pair()
    expected = alone(plain)
    target, _ = capture(engine)

    def failing(run: object) -> None:
        raise NotCapturable("not today")

    monkeypatch.setattr(target, "capture", failing)
    with pytest.warns(RuntimeWarning, match="steps are not captured any more: not today"):
        found = together(engine, requests(engine), 4).generations()
    assert [each.tokens for each in found] == expected
    assert {each.stats.target_runner for each in found} == {"eager: capture failed: not today"}


def test_a_predictor_looks_at_each_text(bundled_pair: SpecBranch) -> None:
    engine = SpecBranch(bundled_pair.target, bundled_pair.draft, tokenizer=bundled_pair.tokenizer, draft_context="all")
    expected = [each.tokens for each in engine.generate(PROMPTS, max_new_tokens=30)]
    engine.hrad = untrained(engine)
    assert [each.tokens for each in engine.generate(PROMPTS, max_new_tokens=30)] == expected
    found = engine.generate(PROMPTS, max_new_tokens=30, method="specbranch-paper", temperature=0.7, seed=3)
    again = [
        engine.generate(each, max_new_tokens=30, method="autoregressive", temperature=0.7, seed=3) for each in PROMPTS
    ]
    assert [each.tokens for each in found] == [each.tokens for each in again]


def test_lists_of_texts_ids_and_chats(bundled_pair: SpecBranch) -> None:
    one_by_one = [bundled_pair.generate(prompt, max_new_tokens=12).text for prompt in PROMPTS]
    assert [each.text for each in bundled_pair.generate(PROMPTS, max_new_tokens=12)] == one_by_one
    ids = [bundled_pair.encode(prompt) for prompt in PROMPTS]
    assert [each.text for each in bundled_pair.generate(ids, max_new_tokens=12)] == one_by_one
    seeds = [bundled_pair.generate(ids[0], max_new_tokens=9, temperature=1.0, seed=seed).tokens for seed in (4, 8)]
    found = bundled_pair.generate([ids[0], ids[0]], max_new_tokens=9, temperature=1.0, seed=[4, 8])
    assert [each.tokens for each in found] == seeds


def test_streams_give_pieces_with_their_place(bundled_pair: SpecBranch) -> None:
    texts = [""] * len(PROMPTS)
    with bundled_pair.stream(PROMPTS, max_new_tokens=20) as streams:
        for place, piece in streams:
            texts[place] += piece
    assert [streams.generations[place].text for place in range(len(PROMPTS))] == texts
    assert texts == [bundled_pair.generate(prompt, max_new_tokens=20).text for prompt in PROMPTS]
    with bundled_pair.stream(PROMPTS, max_new_tokens=20) as streams:
        next(streams)
    assert not streams._several.scheduler.busy  # it was left, and so is over


def test_rows_are_shared_and_texts_wait_for_them(bundled_pair: SpecBranch) -> None:
    engine = SpecBranch(bundled_pair.target, bundled_pair.draft, tokenizer=bundled_pair.tokenizer)
    ids = [engine.encode(prompt) for prompt in PROMPTS]
    asked = [engine.request(each, max_new_tokens=16) for each in ids]
    rows = max(len(each) for each in ids) + 16 + 256
    several = Several(engine.decoder, [partial(same, request) for request in asked], 6, 2 * rows)
    at_once = 0
    while several.advance():
        at_once = max(at_once, len(several.scheduler.running))
    assert at_once == 2
    expected = [engine.generate(each, max_new_tokens=16).tokens for each in ids]
    assert [each.tokens for each in several.generations()] == expected
    assert several.scheduler.pool._slots == []
    with pytest.raises(SpecBranchError, match=r"prompt 0: .*the cache for texts that are decoded together has 100"):
        Several(engine.decoder, [partial(same, asked[0])], 2, 100)


def test_texts_that_begin_alike_are_read_once(bundled_pair: SpecBranch) -> None:
    engine = SpecBranch(bundled_pair.target, bundled_pair.draft, tokenizer=bundled_pair.tokenizer, prompt_cache=2)
    common = engine.encode(PROMPTS[0]) * 2
    ids = [[*common, *engine.encode(prompt)] for prompt in PROMPTS]
    engine.max_requests = 2
    found = engine.generate(ids, max_new_tokens=12)
    assert [each.stats.reused_tokens >= len(common) for each in found].count(True) >= 3
    plain = [bundled_pair.generate(each, max_new_tokens=12).tokens for each in ids]
    assert [each.tokens for each in found] == plain


class Moody:
    """A rule that raises at the end of one prompt, and of no other."""

    stateless = True

    def __init__(self, last: int, at: int) -> None:
        self.last, self.at = last, at

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] >= self.at and self.last in ids[0, :4]:
            raise RuntimeError("not this one")
        return scores


def test_a_long_prompt_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read between the rounds of the others, and a short one that comes later has its turn before it is."""
    monkeypatch.setattr(runtime_model, "PREFILL_CHUNK", 8)
    engine = tiny_pair()
    prompts, new = [IDS[0], [5 + place % 20 for place in range(150)], IDS[1]], (60, 10, 10)
    expected = [
        engine.generate(ids, max_new_tokens=count, method="autoregressive").tokens
        for ids, count in zip(prompts, new, strict=True)
    ]
    scheduler = Scheduler(engine.decoder, 4, 4000, chunk=8)
    tickets = [
        Ticket(engine.request(ids, max_new_tokens=count, method="speculative"))
        for ids, count in zip(prompts, new, strict=True)
    ]

    def lengths() -> list[int]:
        return [0 if ticket.job is None else len(ticket.job.builder.tokens) for ticket in tickets]

    scheduler.add(tickets[0])
    scheduler.advance()
    for ticket in tickets[1:]:
        scheduler.add(ticket)
    rounds = 0
    while not (now := lengths())[1]:
        scheduler.advance()
        assert scheduler.busy
        assert tickets[0].outcome is not None or lengths()[0] > now[0]
        rounds += 1
    assert rounds > 10
    assert now[2] > 0
    while scheduler.busy:
        scheduler.advance()
    assert [ticket.outcome.tokens for ticket in tickets] == expected


def test_an_error_of_one_text_ends_it_alone() -> None:
    engine = tiny_pair()
    expected = [engine.generate(ids, max_new_tokens=12).tokens for ids in IDS]
    with pytest.raises(GenerationFailed, match="prompt 3: generation ended early: not this one") as failure:
        engine.generate(IDS, max_new_tokens=12, logits_processor=Moody(last=IDS[3][3], at=9))
    found = failure.value.generations
    assert failure.value.generation is found[3]
    assert [each.finish_reason for each in found] == ["error" if place == 3 else "length" for place in range(7)]
    assert [each.tokens for place, each in enumerate(found) if place != 3] == expected[:3] + expected[4:]
    assert found[3].tokens == expected[3][: len(found[3].tokens)]


def test_an_interrupt_hands_in_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_pair()
    expected = [engine.generate(ids, max_new_tokens=30).tokens for ids in IDS]
    commit, left = Decoding.commit, iter(range(20))

    def interrupted(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return commit(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Decoding, "commit", interrupted)
        with pytest.raises(GenerationInterrupted) as interrupt:
            engine.generate(IDS, max_new_tokens=30)
    found = interrupt.value.generations
    assert {each.finish_reason for each in found} == {"interrupted"}
    assert sum(len(each.tokens) for each in found) > 7
    assert all(each.tokens == text[: len(each.tokens)] for each, text in zip(found, expected, strict=True))
    assert [each.tokens for each in engine.generate(IDS, max_new_tokens=30)] == expected


def test_bad_input_is_named_and_nothing_is_begun(bundled_pair: SpecBranch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoding, "begin", None)
    asked: list[tuple[Any, dict[str, Any], str]] = [
        (["one", ""], {}, "prompt 1: the prompt is empty"),
        ([[3], [1 << 30]], {}, "prompt 1: token id 1073741824 is outside"),
        (["one", "two"], {"seed": [1, 2, 3]}, "seed has 3 elements; expected one for each of 2 prompts"),
        (["one", "two"], {"streamer": object()}, "streamer is for one prompt"),
        (["one", "two"], {"logits_processor": lambda ids, scores: scores}, "for one text at a time"),
        (["one", "two"], {"max_new_tokens": 10**6}, "prompt 0: "),
    ]
    for prompts, options, message in asked:
        with pytest.raises(SpecBranchError, match=message):
            bundled_pair.generate(prompts, **options)
    for name, value in (("max_requests", 0), ("cache_tokens", 0), ("max_requests", "many")):
        with pytest.raises(SpecBranchError, match=f"{name} is"):
            SpecBranch(bundled_pair.target, bundled_pair.draft, **{name: value})  # type: ignore[arg-type]
