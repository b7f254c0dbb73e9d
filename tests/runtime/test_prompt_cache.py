"""Texts that begin alike read the rest only, and are the same texts."""

import copy
from typing import Any

import pytest
import torch
from captured_pair import capture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rotary_models import phi
from tiny import FAMILIES, tiny_model
from tiny_pair import tiny_pair

from specbranch import SpecBranch, SpecBranchError
from specbranch.runtime.kept import LEAST
from specbranch.runtime.model import PREFILL_CHUNK, CachedModel
from specbranch.runtime.pair import KEPT

SYSTEM = [5, 9, 3, 17, 4, 21, 30, 11, 2, 8, 19, 25, 6, 14, 7, 7, 1, 28]
NEW = 12


def keeping(engine: SpecBranch, texts: int = 2, **options: Any) -> SpecBranch:
    """An engine over the same models that keeps texts."""
    kept = SpecBranch(engine.target, engine.draft, prompt_cache=texts, **{"draft_context": "all", **options})
    kept.decoder._costs = engine.decoder._costs
    return kept


def alone(engine: SpecBranch, prompt: list[int], **how: Any) -> list[int]:
    return engine.generate(prompt, max_new_tokens=NEW, **{**how, "method": "autoregressive"}).tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_next_turn_of_a_chat(family: str, dtype: torch.dtype) -> None:
    plain = tiny_pair(family, dtype=dtype)
    engine = keeping(plain)
    for how in (
        {},
        {"temperature": 0.9, "seed": 4},
        {"method": "pearl", "overlap": True},
        {"method": "autoregressive"},
    ):
        engine.forget()
        prompt, reused = SYSTEM[: 14 + len(how)], 0
        for turn in range(3):
            made = engine.generate(prompt, max_new_tokens=NEW, **how)
            assert made.tokens == alone(plain, prompt, **how), (how, turn)
            assert made.stats.reused_tokens == reused
            assert made.stats.as_dict()["reused_tokens"] == reused
            reused = len(prompt) + NEW - 1  # all but the newest token, which no forward has seen
            prompt = [*prompt, *made.tokens, 3 + turn, 20, 9 - turn, 12]


def test_a_text_that_parts_from_the_last_one_goes_back(bundled_pair: SpecBranch) -> None:
    engine = keeping(bundled_pair, 1, tokenizer=bundled_pair.tokenizer)
    text = bundled_pair.encode("def count_words(text):\n    counts = {}\n    for word in text.split():\n")
    for end in (len(text), len(text) - 4, len(text) - 1, 3, len(text)):
        made = engine.generate([*text[:end], 7, 9], max_new_tokens=NEW)
        assert made.tokens == alone(bundled_pair, [*text[:end], 7, 9])
    assert engine.generate(text, max_new_tokens=NEW).tokens == alone(bundled_pair, text)
    again = engine.generate(text, max_new_tokens=NEW)
    assert (again.tokens, again.stats.reused_tokens) == (alone(bundled_pair, text), len(text) - 1)


def test_chats_with_the_same_beginning_do_not_take_each_other_s_caches() -> None:
    plain = tiny_pair()
    engine = keeping(plain, 3)
    chats = [[*SYSTEM, token] for token in (4, 9, 13)]
    for turn in range(3):
        for place, chat in enumerate(chats):
            made = engine.generate(chat, max_new_tokens=NEW)
            assert made.tokens == alone(plain, chat)
            if turn or place:
                assert made.stats.reused_tokens == (len(chat) - 3 if turn else len(SYSTEM)), (turn, place)
            chats[place] = [*chat, *made.tokens, 11, 5]
    assert len(engine.pair._slots) == 3


def test_the_text_that_was_used_longest_ago_goes() -> None:
    plain = tiny_pair()
    engine = keeping(plain, 2)
    texts = [[start, *SYSTEM] for start in (1, 2, 3)]
    for text in texts:
        engine.generate(text, max_new_tokens=2)
    assert len(engine.pair._slots) == 2
    reused = [
        engine.generate(text, max_new_tokens=2).stats.reused_tokens > 0 for text in (texts[2], texts[1], texts[0])
    ]
    assert reused == [True, True, False]
    streams = [engine.stream(text, max_new_tokens=4) for text in texts]
    for stream in streams:
        stream.advance()
    assert len(engine.pair._slots) == 3
    for stream in streams:
        stream.close()
    assert len(engine.pair._slots) == max(KEPT, 2)
    engine.forget()
    assert engine.pair._slots == [engine.pair.first]
    assert engine.generate(texts[0], max_new_tokens=2).stats.reused_tokens == 0


def test_a_longer_text_needs_another_cache_and_keeps_the_rows() -> None:
    plain = tiny_pair()
    engine = keeping(plain, 1)
    prompt = SYSTEM
    made = engine.generate(prompt, max_new_tokens=NEW)
    capacity = engine.pair.target.model.cache.capacity
    longer = [*prompt, *made.tokens, *(token % 31 for token in range(500))]
    made = engine.generate(longer, max_new_tokens=NEW)
    assert made.stats.reused_tokens == len(prompt) + NEW - 1
    assert engine.pair.target.model.cache.capacity > capacity
    assert made.tokens == alone(plain, longer)


@pytest.mark.parametrize("change", ["in place", "replaced", "buffer", "nothing"])
def test_another_model_reads_anew(change: str) -> None:
    plain = tiny_pair()
    engine = keeping(plain, 1)
    engine.generate(SYSTEM, max_new_tokens=4)
    layer: Any = plain.target.model.layers[0].self_attn.v_proj
    with torch.no_grad():
        if change == "in place":
            layer.weight.mul_(-1)
        elif change == "replaced":
            layer.weight = torch.nn.Parameter(-layer.weight)
        elif change == "buffer":
            plain.target.model.rotary_emb.inv_freq.mul_(2)
    made = engine.generate(SYSTEM, max_new_tokens=NEW)
    assert made.stats.reused_tokens == (len(SYSTEM) - 1 if change == "nothing" else 0)
    assert made.tokens == alone(SpecBranch(plain.target), SYSTEM)


def test_what_keeps_nothing() -> None:
    """Models whose rows depend on the length of the text; engines that were not told to keep; targets on a device, but
    for whole chunks."""
    model = phi()
    engine = SpecBranch(model, copy.deepcopy(model), prompt_cache=2)
    for _ in range(2):
        assert engine.generate(SYSTEM[:6], max_new_tokens=2).stats.reused_tokens == 0
    engine = tiny_pair()
    for _ in range(2):
        assert engine.generate(SYSTEM, max_new_tokens=2).stats.reused_tokens == 0
    cached = CachedModel(tiny_model(max_position_embeddings=2048), "target")
    text = [token % 31 for token in range(2 * PREFILL_CHUNK + 40)]
    cached.reset(len(text) + 8)
    cached.device = torch.device("cuda")
    cached.cache.length = len(text)
    cached.keep(text, len(text) - 9)
    assert cached.known(text) == cached.known(text[:-1]) == 2 * PREFILL_CHUNK
    assert cached.known(text[: 2 * PREFILL_CHUNK - 1]) == PREFILL_CHUNK
    cached.keep(text, PREFILL_CHUNK - 1)
    assert cached.known(text) == 0
    with pytest.raises(SpecBranchError, match="prompt_cache is -1"):
        SpecBranch(tiny_model(), prompt_cache=-1)


def test_a_text_that_was_put_aside_serves_the_next() -> None:
    plain = tiny_pair()
    engine = keeping(plain, 1)
    stream = engine.stream(SYSTEM, max_new_tokens=40, method="speculative", overlap=False)
    stream.advance()
    stream.close()
    made = engine.generate(SYSTEM, max_new_tokens=NEW)
    assert (made.tokens, made.stats.reused_tokens) == (alone(plain, SYSTEM), len(SYSTEM) - 1)


def test_captured_steps_go_on_from_kept_rows() -> None:
    plain = tiny_pair()
    engine = keeping(plain, 2)
    capture(engine)
    prompt = SYSTEM
    for _ in range(3):
        made = engine.generate(prompt, max_new_tokens=NEW, method="specbranch", overlap=True)
        assert made.tokens == alone(plain, prompt)
        assert made.stats.target_runner == "captured"
        prompt = [*prompt, *made.tokens, 4, 4]
    assert made.stats.reused_tokens > 0


TURNS = st.lists(
    st.tuples(
        st.integers(0, 40),  # of which earlier text
        st.floats(0, 1),  # how much of it
        st.lists(st.integers(1, 31), min_size=1, max_size=30),  # and what follows
        st.sampled_from(["speculative", "pearl", "specbranch", "autoregressive"]),
        st.sampled_from(["all", "6+4", "auto"]),
        st.integers(1, 9),
    ),
    min_size=2,
    max_size=8,
)
ENGINES = {texts: keeping(tiny_pair(), texts) for texts in (1, 3)}
PLAIN = {texts: SpecBranch(engine.target) for texts, engine in ENGINES.items()}


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(turns=TURNS, texts=st.sampled_from([1, 3]))
def test_any_texts_in_any_order(turns: list[Any], texts: int) -> None:
    engine, plain, known = ENGINES[texts], PLAIN[texts], [SYSTEM]
    engine.forget()
    for which, share, rest, method, context, new in turns:
        earlier = known[which % len(known)]
        prompt = [*earlier[: int(share * len(earlier))], *rest]
        how: dict[str, Any] = {"draft_context": context, "overlap": False}
        made = engine.generate(prompt, max_new_tokens=new, method=method, **how)
        expected = plain.generate(prompt, max_new_tokens=new, method="autoregressive").tokens
        assert made.tokens == expected
        assert made.stats.reused_tokens <= len(prompt) - 1
        known.append([*prompt, *made.tokens])
    assert len(engine.pair._slots) <= max(KEPT, texts)
    assert LEAST > 1
