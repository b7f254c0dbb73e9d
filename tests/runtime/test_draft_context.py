"""A draft that reads the ends of a prompt, or reads late: each token at its own position, and the target's text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captured_pair import capture
from hypothesis import given, settings
from hypothesis import strategies as st
from own_forward import own_logits
from rotary_models import SWITCH, phi
from tiny import FAMILIES, tiny_model
from tiny_pair import SAMPLINGS, tiny_pair
from torch import Tensor
from transformers import PreTrainedModel

from specbranch import METHODS, SpecBranch, SpecBranchError
from specbranch.core.excerpt import ALL, Excerpt, check_draft_context
from specbranch.core.sampling import Sampling
from specbranch.core.tree import Tree
from specbranch.drafters.model import ModelDrafter
from specbranch.policies.methods import make_policy
from specbranch.runtime.batch import Inputs
from specbranch.runtime.model import CachedModel
from specbranch.runtime.runner import EagerRunner

PROMPT = [(7 * i * i + 3 * i) % 31 + 1 for i in range(60)]
EXCERPTS = (Excerpt(20, 8), Excerpt(0, 9), Excerpt(9, 0), Excerpt(1, 1))
RUNS = [
    (method, overlap)
    for method in METHODS[1:]
    for overlap in ((False, True) if make_policy(method, {}).overlaps else (False,))
]


def drafter_of(model: PreTrainedModel) -> ModelDrafter:
    return ModelDrafter(EagerRunner(CachedModel(model, "draft")), Sampling(), 3, 32)


def rows_of(drafter: ModelDrafter) -> list[Tensor]:
    cache = drafter.runner.model.cache
    return [buffer[:, : cache.length].clone() for buffer in cache.buffers.tensors()]


@pytest.mark.parametrize("excerpt", EXCERPTS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_that_is_read_has_its_own_position(family: str, excerpt: Excerpt) -> None:
    """Windows too: they count positions, however many rows there are."""
    model = tiny_model(family.split("-")[0], **FAMILIES[family])
    drafter = drafter_of(model)
    drafter.begin(PROMPT)
    gap = excerpt.gap(len(PROMPT))
    with drafter.runner.model.attached():
        drafter.read(excerpt, len(PROMPT) + 20)
        cached = drafter.runner.model
        assert (cached.cache.length, cached.position) == (len(PROMPT) - 1 - len(gap), len(PROMPT) - 1)
        batch = cached.place([0], [-1], [PROMPT[-1]], [len(PROMPT) - 1])
        logits = cached.forward(Inputs.of([batch], cached.device))[0]
    places = [place for place in range(len(PROMPT)) if place not in gap]
    expected = own_logits(model, [PROMPT[place] for place in places], places)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    close = own_logits(model, [PROMPT[place] for place in places], range(len(places)))
    if excerpt.head > 1 and family in ("llama", "gpt_neox"):  # else there may be no difference
        assert not torch.allclose(logits, close, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_gap_that_is_narrower_than_a_window_is_read(family: str) -> None:
    drafter = drafter_of(tiny_model(family, sliding_window=32))
    drafter.begin(PROMPT)
    end = len(PROMPT) + 20
    assert drafter.gap(Excerpt(10, 18), end) == range(10, 42)
    assert len(drafter.gap(Excerpt(10, 19), end)) == 0
    wide = drafter_of(tiny_model(family, sliding_window=end))  # wider than the text: it hides nothing
    wide.begin(PROMPT)
    assert wide.gap(Excerpt(10, 19), end) == range(10, 41)
    assert len(wide.gap(Excerpt(10, 19), end + 1)) == 0


@pytest.mark.parametrize("excerpt", [ALL, *EXCERPTS], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_reading_late_is_reading_at_once(family: str, excerpt: Excerpt) -> None:
    """The rows are the same, and what was committed meanwhile is read too, prompt or not."""
    model, said = tiny_model(family, **FAMILIES[family]), [5, 9, 2, 17, 4]
    late, early = drafter_of(model), drafter_of(model)
    for drafter in (late, early):
        drafter.begin(PROMPT)
    with late.runner.model.attached():
        for token in said:
            late.commit([0], {}, [token])
        late.read(excerpt, len(PROMPT) + 20)
    with early.runner.model.attached():
        early.read(excerpt, len(PROMPT) + 20)
        for token in said:
            early.commit([0], {}, [token])
        tree = Tree(said[-1], len(PROMPT) + len(said) - 1)
        found = [drafter.propose(tree, [0]).proposals[0][0] for drafter in (early, late)]
    assert found[0].tokens == found[1].tokens
    assert found[0].confidence == pytest.approx(found[1].confidence, rel=1e-4)
    for a, b in zip(rows_of(early), rows_of(late), strict=True):
        torch.testing.assert_close(a, b[:, : a.shape[1]], rtol=1e-4, atol=1e-4)
    assert late.runner.model.position == len(PROMPT) + len(said) - 1


def test_the_cache_of_a_gap_is_small() -> None:
    pair = tiny_pair()
    draft = pair.pair.draft
    assert draft is not None
    whole = pair.generate(PROMPT, max_new_tokens=20, draft_context="all")
    assert whole.stats.draft_context_tokens == len(PROMPT)
    assert draft.model.cache.length + 20 >= len(PROMPT)
    capacity = draft.model.cache.capacity
    other = tiny_pair()
    ends = other.generate(PROMPT, max_new_tokens=20, draft_context="8+4")
    assert other.pair.draft is not None
    assert ends.stats.draft_context_tokens == 12
    assert other.pair.draft.model.cache.capacity == capacity - (len(PROMPT) - 12)
    assert ends.tokens == whole.tokens


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_every_method_gives_the_same_text_whatever_the_draft_read(
    family: str, captured: bool, sampling: dict[str, Any]
) -> None:
    pair = tiny_pair(family)
    expected = pair.generate(PROMPT, max_new_tokens=24, method="autoregressive", **sampling).tokens
    if captured:
        capture(pair)
    for number, (method, overlap) in enumerate(RUNS):
        for context in ("auto", "all", ("20+8", "0+9", "9+0", "1+1")[number % 4]):
            made = pair.generate(
                PROMPT, max_new_tokens=24, method=method, overlap=overlap, draft_context=context, **sampling
            )
            assert made.tokens == expected, (method, overlap, context)
            assert made.stats.draft_runner == ("captured" if captured else "eager")


def test_captured_steps_draft_what_eager_ones_do_behind_a_gap() -> None:
    """Texts with gaps and without, in turn: where windows end is part of a captured step."""
    eager, captured = tiny_pair("gemma2"), tiny_pair("gemma2")
    capture(captured)
    for context in ("20+8", "all", "9+0", "20+8"):
        runs = [
            pair.generate(PROMPT, max_new_tokens=40, method="speculative", draft_context=context)
            for pair in (eager, captured)
        ]
        assert runs[0].tokens == runs[1].tokens
        assert runs[1].stats.draft_runner == "captured"
        for name in ("accepted", "verified", "draft_context_tokens"):
            assert getattr(runs[0].stats, name) == getattr(runs[1].stats, name), (context, name)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 60),
    new_tokens=st.integers(1, 24),
    ends=st.tuples(st.integers(0, 70), st.integers(0, 70)).filter(any),
    run=st.sampled_from(RUNS),
    temperature=st.sampled_from((0.0, 0.8)),
)
def test_any_ends_of_any_prompt(
    length: int, new_tokens: int, ends: tuple[int, int], run: tuple[str, bool], temperature: float
) -> None:
    arguments: dict[str, Any] = {"max_new_tokens": new_tokens, "temperature": temperature, "seed": 2}
    plain = PAIR.generate(PROMPT[:length], method="autoregressive", **arguments)
    method, overlap = run
    made = PAIR.generate(
        PROMPT[:length], method=method, overlap=overlap, draft_context=f"{ends[0]}+{ends[1]}", **arguments
    )
    assert made.tokens == plain.tokens
    assert made.stats.draft_context_tokens == min(length, ends[0] + max(ends[1], 1))


PAIR = tiny_pair()


@pytest.mark.parametrize("length", [SWITCH - 5, SWITCH + 3])
def test_a_gap_where_rotary_embeddings_choose_by_length(length: int) -> None:
    """Both models read anew at the switch; the draft, without what it left out."""
    model = phi()
    prompt = [(5 * i) % 29 + 1 for i in range(length)]
    engine = SpecBranch(model, phi(), threads=1)
    expected = engine.generate(prompt, max_new_tokens=24, method="autoregressive").tokens
    made = engine.generate(prompt, max_new_tokens=24, method="speculative", draft_context="6+4")
    assert made.tokens == expected
    draft = engine.pair.draft
    assert draft is not None
    assert len(draft.model.gap) in (0, length - 10)
    assert draft.model.prompt_end == max(SWITCH, length - 1)


@pytest.mark.parametrize("late", [False, True])
def test_rows_that_are_read_anew_are_those_of_the_longer_text(late: bool) -> None:
    model, prompt = phi(), [(5 * i) % 29 + 1 for i in range(SWITCH - 2)]
    said = [4, 8, 15, 16, 23]
    drafter = drafter_of(model)
    drafter.begin(prompt)
    excerpt = Excerpt(6, 4)
    with drafter.runner.model.attached():
        if not late:
            drafter.read(excerpt, SWITCH + 30)
        for token in said:
            drafter.commit([0], {}, [token])
        if late:
            drafter.read(excerpt, SWITCH + 30)
        drafter.propose(Tree(said[-1], len(prompt) + len(said) - 1), [0])
        found = rows_of(drafter)
        text = [*prompt, *said]
        fresh = drafter_of(model)
        fresh.begin(text[: SWITCH + 1])
        fresh.runner.model.reset(SWITCH + 30)
        gap = fresh.runner.model.may_skip(excerpt.gap(len(prompt)), SWITCH + 30) and excerpt.gap(len(prompt))
        assert gap
        fresh.runner.model.begin(text[: SWITCH + 1], gap)
        fresh.runner.prefill(text[: gap.start])
        fresh.runner.prefill(text[gap.stop : -1])
    for a, b in zip(found, rows_of(fresh), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_draft_is_not_asked_for_more_positions_than_it_has() -> None:
    pair = SpecBranch(tiny_model(), tiny_model(seed=1, max_position_embeddings=64))
    with pytest.raises(SpecBranchError, match="the draft model's context holds 64"):
        pair.generate(PROMPT, max_new_tokens=10, draft_context="4+4")  # its positions are those of the text
    with pytest.raises(SpecBranchError, match=r"draft_context is 60\+5; expected at most 64 tokens together"):
        pair.generate(PROMPT[:9], draft_context="60+5")
    with pytest.raises(SpecBranchError, match=r"draft_context is 60\+5; expected at most 64 tokens together"):
        SpecBranch(pair.target, pair.draft, draft_context="60+5")
    assert len(pair.generate(PROMPT[:9], max_new_tokens=4, draft_context="60+4").tokens) == 4


BAD: list[Any] = ["0", "0+0", "", "1", "+", "3+", "+3", "-1+4", "4+-1", "1.5+2", "4 + 4", "ALL", "٣+4", "9" * 10 + "+1"]


@pytest.mark.parametrize("value", [*BAD, 0, 5, True, None, (1, 2), b"1+1"])
def test_bad_contexts_are_named(value: Any) -> None:
    with pytest.raises(SpecBranchError, match=r"draft_context is .*; expected 'auto', 'all' or 'H\+N'") as caught:
        check_draft_context(value)
    assert "\n" not in str(caught.value)
    if value is not None:
        with pytest.raises(SpecBranchError, match="draft_context is"):
            PAIR.generate(PROMPT[:4], draft_context=value)


def test_what_contexts_mean() -> None:
    assert check_draft_context("auto") is None
    assert check_draft_context("all") == ALL
    assert check_draft_context("3+0") == Excerpt(3, 0)
    assert [str(check_draft_context(text)) for text in ("all", "256+128")] == ["all", "256+128"]
    assert Excerpt(3, 2).gap(10) == range(3, 8)
    assert Excerpt(3, 0).gap(10) == range(3, 9)  # the last token is where drafting begins
    assert [len(Excerpt(3, 2).gap(length)) for length in (1, 4, 5, 6)] == [0, 0, 0, 1]
    assert len(ALL.gap(10**6)) == 0
