"""Several texts in one buffer, through forwards that they share: each is what it is alone."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from random_rounds import RandomPolicy, RandomVerifier, SpyDecoding, assert_holds
from tiny import FAMILIES, tiny_model
from torch import Tensor

from specbranch import METHODS
from specbranch.core.excerpt import ALL, Excerpt
from specbranch.core.sampling import Sampling
from specbranch.decoding import Decoding
from specbranch.drafters.model import ModelDrafter
from specbranch.loop import DecodingLoop, Turn
from specbranch.policies.costs import Costs
from specbranch.policies.methods import make_policy
from specbranch.policies.reading import AtOnce
from specbranch.runtime import model as runtime_model
from specbranch.runtime.batch import Batch, Inputs
from specbranch.runtime.cache import BranchCache, Buffers
from specbranch.runtime.model import CachedModel, rows_for
from specbranch.runtime.runner import EagerRunner, Runner
from specbranch.runtime.verifier import ModelVerifier
from specbranch.runtime.workers import Threads
from specbranch.together import Together

ROUNDS = 60
TEXTS = 4  # at once, at most
LONGEST = 28 + 40  # prompt and new tokens
EXCERPTS = (ALL, ALL, Excerpt(3, 3), Excerpt(1, 4))
CLOSE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (0.02, 0.25)}
SAMPLINGS = (Sampling(), Sampling(temperature=0.8, seed=3), Sampling(temperature=1.2, top_k=5, top_p=0.9, seed=8))


@dataclass(eq=False)
class Text:
    """One text in the buffers. shown: tokens of it that were committed, the prompt included."""

    decoding: Decoding
    target: Runner
    draft: Runner
    shown: list[int]

    @property
    def runners(self) -> tuple[Runner, Runner]:
        return self.target, self.draft


@dataclass
class Pair:
    """Two models, and buffers with room for TEXTS texts of each."""

    target: Runner
    draft: Runner
    buffers: tuple[Buffers, Buffers] = field(init=False)
    workers: Threads = field(default_factory=lambda: Threads(1))

    def __post_init__(self) -> None:
        rows = TEXTS * rows_for(LONGEST) + 1
        first, second = (Buffers(runner.model.layers, rows) for runner in (self.target, self.draft))
        self.buffers = first, second

    def take(self, tokens: int) -> tuple[Runner, Runner] | None:
        """Runners of a text of so many tokens; None where there is no room for it."""
        caches = [buffers.take(rows_for(tokens)) for buffers in self.buffers]
        if caches[0] is None or caches[1] is None:
            assert caches == [None, None]  # they are as full as each other
            return None
        target, draft = self.target.beside(caches[0]), self.draft.beside(caches[1])
        target.reset(tokens)
        return target, draft

    def give_back(self, text: Text) -> None:
        for buffers, runner in zip(self.buffers, text.runners, strict=True):
            assert runner.model.cache.buffers is buffers
            buffers.give_back(runner.model.cache)


def pair_of(family: str, dtype: torch.dtype = torch.float32) -> Pair:
    options = FAMILIES[family] | {"max_position_embeddings": 512}
    target = EagerRunner(CachedModel(tiny_model(family, 1, dtype, **options), "target"))
    draft = EagerRunner(CachedModel(tiny_model(family, 2, dtype, **options), "draft"))
    return Pair(target, draft)


def alone(model: CachedModel, batch: Batch, leaves_only: bool) -> tuple[Tensor, CachedModel]:
    """The logits of one text's part of a forward in buffers of its own, and the model with these."""
    fresh = model.another()
    fresh.cache = BranchCache.alone(model.layers, model.cache.capacity)
    length = model.cache.length
    fresh.cache.adopt(model.cache, max(batch.rows) + 1)
    fresh.cache.length = length
    inputs = Inputs.of([replace(batch, start=0)], model.device)
    return fresh.forward(inputs, slice(batch.leaves) if leaves_only else slice(None)), fresh


@contextmanager
def compared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """In every forward each text's logits and rows equal those of a forward for it alone: for the target to the bit.
    Yields how many texts each forward had."""
    forward, texts_of = EagerRunner._forward, list[int]()

    def checked(
        self: EagerRunner, texts: Sequence[tuple[CachedModel, Batch]], leaves_only: bool = False
    ) -> tuple[Inputs, Tensor, list[slice]]:
        inputs, logits, spans = forward(self, texts, leaves_only)
        texts_of.append(len(texts))
        for (model, batch), span in zip(texts, spans, strict=True):
            expected, fresh = alone(model, batch, leaves_only)
            rows = list(batch.rows)
            pairs = [(logits[span], expected)]
            for ours, theirs in zip(model.cache.buffers.tensors(), fresh.cache.buffers.tensors(), strict=True):
                pairs.append((ours[:, [model.cache.start + row for row in rows]], theirs[:, rows]))
            for ours, theirs in pairs:
                if model.role == "target":
                    assert torch.equal(ours, theirs)
                else:
                    rtol, atol = CLOSE[ours.dtype]
                    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
        return inputs, logits, spans

    with monkeypatch.context() as patch:
        patch.setattr(EagerRunner, "_forward", checked)
        yield texts_of


def begin_random(pair: Pair, chance: random.Random) -> Text | None:
    prompt = [chance.randrange(32) for _ in range(chance.randint(1, 28))]
    new = chance.randint(1, 40)
    runners = pair.take(len(prompt) + new)
    if runners is None:
        return None
    target, draft = runners
    verifier = RandomVerifier(target, Sampling())
    verifier.chance = chance
    drafter = ModelDrafter(draft, chance.choice(SAMPLINGS), chance.choice((2, 3, 5)), 32)
    policy = RandomPolicy(chance, idle=0.05)
    excerpt = chance.choice(EXCERPTS)
    decoding = SpyDecoding(verifier, drafter, policy, Costs(), pair.workers, False, AtOnce(excerpt))
    verifier.decoding = decoding
    decoding.begin(prompt, new)
    return Text(decoding, target, draft, prompt)


CASES = [
    *(("llama", dtype) for dtype in (torch.float32, torch.bfloat16)),
    *((family, torch.float32) for family in ("mistral", "gemma2")),
    pytest.param("gemma2", torch.bfloat16, marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("family", "dtype"), CASES, ids=str)
def test_texts_that_come_and_go_leave_each_other_s_rows_alone(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random trees and verdicts, as in test_rounds: after every round the caches of all texts, of those too that were
    left out of it, equal a fresh forward. With gaps in some, with windows, and with a backlog behind an idle draft."""
    chance, pair = random.Random(5), pair_of(family, dtype)
    monkeypatch.setattr(runtime_model, "PREFILL_CHUNK", 4)  # where a prompt is cut does not change a bit
    loop, live = DecodingLoop(pair.workers, Together(), chunk=12), list[Text]()
    full = cut = gaps = backlogs = 0
    _, atol = CLOSE[dtype]
    place = CachedModel.place

    def spied(self: CachedModel, *arguments: Any) -> Batch:
        nonlocal backlogs
        batch = place(self, *arguments)
        backlogs += len(batch) > batch.leaves
        return batch

    monkeypatch.setattr(CachedModel, "place", spied)
    with compared(monkeypatch) as texts_of:
        for _ in range(ROUNDS):
            with pair.target.model.attached(), pair.draft.model.attached():
                while len(live) < chance.choice((1, 2, 3, 4, 5)):
                    if (text := begin_random(pair, chance)) is None:
                        full += 1
                        break
                    live.append(text)
                asked = [text for text in live if chance.random() < 0.8] or live
                turns = loop.round([text.decoding for text in asked])
            for text, turn in zip(asked, turns, strict=True):
                text.shown += committed(turn)
            for text in live:
                gaps += bool(text.draft.model.gap)
                if not text.decoding.ready:
                    cut += text.target.model.cache.length > 0
                    continue
                assert text.target.model.cache.length == len(text.shown) - 1
                for runner in text.runners:
                    if runner.model.cache.length:  # or it is not read to its end
                        assert_holds(runner.model, text.shown, atol)
                assert_equals_a_prefill(text.target, text.shown)
            for text in [text for text in live if text.decoding.remaining == 0 or chance.random() < 0.05]:
                live.remove(text)
                pair.give_back(text)
    assert full
    assert cut > ROUNDS // 12
    assert gaps > ROUNDS // 8
    assert backlogs > ROUNDS // 12
    assert sum(count > 1 for count in texts_of) > len(texts_of) // 4


def assert_equals_a_prefill(target: Runner, text: list[int]) -> None:
    """To the bit: it shows what a tolerance hides."""
    if len(text) == 1:
        return
    fresh = target.another()
    fresh.reset(len(text))
    with fresh.model.attached(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime_model, "PREFILL_CHUNK", len(text))
        fresh.prefill(text[:-1])
    rows, start = len(text) - 1, target.model.cache.start
    for ours, theirs in zip(target.model.cache.buffers.tensors(), fresh.model.cache.buffers.tensors(), strict=True):
        assert torch.equal(ours[:, start : start + rows], theirs[:, :rows])


def committed(turn: Turn) -> list[int]:
    if turn.error is not None:
        raise turn.error
    return turn.committed


def begin(pair: Pair, prompt: list[int], new: int, method: str, sampling: Sampling, overlap: bool) -> Text:
    runners = pair.take(len(prompt) + new)
    assert runners is not None
    target, draft = runners
    policy = make_policy(method, {})
    drafter = ModelDrafter(draft, sampling, policy.candidates, 32) if policy.candidates else None
    decoding = Decoding(ModelVerifier(target, sampling), drafter, policy, Costs(), pair.workers, overlap)
    decoding.begin(prompt, new)
    return Text(decoding, target, draft, prompt)


def alone_tokens(pair: Pair, prompt: list[int], new: int, sampling: Sampling) -> list[int]:
    """Without a draft, in buffers of its own."""
    target = pair.target.another()
    target.reset(len(prompt) + new)
    decoding = Decoding(
        ModelVerifier(target, sampling), None, make_policy("autoregressive", {}), Costs(), pair.workers, False
    )
    with target.model.attached():
        return [token for tokens in DecodingLoop(pair.workers).rounds(decoding, prompt, new) for token in tokens]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_texts_of_any_method_are_what_each_is_alone(family: str, overlap: bool) -> None:
    chance, pair = random.Random(7), pair_of(family)
    loop, waiting, live = DecodingLoop(pair.workers, Together()), list(METHODS), list[tuple[Text, list[int]]]()
    while waiting or live:
        with pair.target.model.attached(), pair.draft.model.attached():
            while waiting and len(live) < 3:
                prompt = [chance.randrange(32) for _ in range(chance.randint(1, 28))]
                new, sampling = chance.randint(8, 24), chance.choice(SAMPLINGS)
                text = begin(pair, list(prompt), new, waiting.pop(), sampling, overlap)
                live.append((text, prompt + alone_tokens(pair, prompt, new, sampling)))
            turns = loop.round([text.decoding for text, _ in live])
        for (text, expected), turn in zip(list(live), turns, strict=True):
            text.shown += committed(turn)
            assert text.shown == expected[: len(text.shown)]
            if text.decoding.remaining == 0:
                assert text.shown == expected
                live.remove((text, expected))
                pair.give_back(text)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("role", ["target", "draft"])
def test_logits_that_cannot_be_sampled_are_the_error_of_their_text(
    role: str, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, sampling = pair_of("llama"), Sampling()
    loop, forward, spoiled = DecodingLoop(pair.workers, Together()), EagerRunner._forward, list[CachedModel]()

    def spoiling(self: EagerRunner, texts: Sequence[tuple[CachedModel, Batch]], leaves_only: bool = False) -> Any:
        inputs, logits, spans = forward(self, texts, leaves_only)
        for (model, _), span in zip(texts, spans, strict=True):
            if model in spoiled:
                logits[span] = torch.nan
        return inputs, logits, spans

    monkeypatch.setattr(EagerRunner, "_forward", torch.inference_mode()(spoiling))
    prompts = [[3, 1, 4], [1, 5, 9, 2], [6, 5]]
    expected = [prompt + alone_tokens(pair, prompt, 20, sampling) for prompt in prompts]
    with pair.target.model.attached(), pair.draft.model.attached():
        texts = [begin(pair, list(prompt), 20, "specbranch", sampling, overlap) for prompt in prompts]
        for text in texts:
            text.decoding.policy = make_policy("specbranch", {"thrifty": False})
        loop.round([text.decoding for text in texts])
        good, bad = [texts[0], texts[2]], texts[1]
        spoiled.append((bad.target if role == "target" else bad.draft).model)
        before = list(bad.decoding.tree.token)
        _, turn, _ = loop.round([text.decoding for text in texts])
        assert isinstance(turn.error, ValueError)
        assert "NaN" in str(turn.error)
        assert (turn.committed, bad.decoding.tree.token[: len(before)]) == ([], before)
        while going := [text.decoding for text in good if text.decoding.remaining]:
            for turn in loop.round(going):
                committed(turn)
    for text, tokens in zip(good, (expected[0], expected[2]), strict=True):
        held = text.decoding.verifier
        assert isinstance(held, ModelVerifier)
        assert held._text == tokens[:-1]


def test_rows_are_taken_between_those_of_others() -> None:
    chance, buffers = random.Random(3), Buffers(1, 101)
    taken: list[BranchCache] = []
    refused = 0
    for _ in range(2000):
        if taken and chance.random() < 0.5:
            buffers.give_back(taken.pop(chance.randrange(len(taken))))
            continue
        rows = chance.randint(1, 40)
        mine = buffers.take(rows)
        used = {row for cache in taken for row in range(cache.start, cache.start + cache.capacity)}
        free = [all(row not in used for row in range(start, start + rows)) for start in range(100 - rows + 1)]
        if mine is None:
            assert not any(free)
            refused += 1
        else:
            assert mine.capacity == rows
            assert free[mine.start]
            taken.append(mine)
    assert refused > 100
