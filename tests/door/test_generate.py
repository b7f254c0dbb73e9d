"""The door from transformers: `target.generate(…, custom_generate=engine)` gives what `target.generate(…)` gives."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import tiny_model
from tiny_pair import tiny_pair
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, pipeline, set_seed
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

import specbranch
from specbranch import SpecBranch, SpecBranchError, bundled

PROMPTS = [entry["prompt"] for entry in bundled.prompts()]
NEW = 16


class EveryThirdIsAnother(LogitsProcessor):
    """Counts its calls: of every third token it takes the likeliest away."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(tuple(input_ids[0].tolist()))
        if len(self.seen) % 3 == 0:
            scores[0, scores.argmax()] = -torch.inf  # in place, as some do
        return scores


class Forces(LogitsProcessor):
    """A token, by +inf, at every multiple of 5."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] % 5 == 0:
            scores = scores.clone()
            scores[:, 11] = torch.inf
        return scores


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "repetition penalty": lambda: {"repetition_penalty": 1.3, "encoder_repetition_penalty": 1.2},
    "n-gram ban": lambda: {"no_repeat_ngram_size": 2},
    "biases": lambda: {"sequence_bias": [[[198], -3.0], [[13, 14], 5.0]], "bad_words_ids": [[5], [6, 7]]},
    "suppressed": lambda: {"suppress_tokens": [3, 9, 30], "begin_suppress_tokens": [2, 11], "renormalize_logits": True},
    "length": lambda: {"min_new_tokens": 12, "forced_eos_token_id": 4, "eos_token_id": [26, 198]},
    "decay": lambda: {"exponential_decay_length_penalty": (4, 1.2), "repetition_penalty": 1.1},
    "guidance": lambda: {"guidance_scale": 1.7},
    "allowed tokens": lambda: {"prefix_allowed_tokens_fn": lambda batch, ids: range(len(ids) % 3, 600, 2)},
    "with a state": lambda: {"logits_processor": [EveryThirdIsAnother()]},
    "user's": lambda: {"logits_processor": [Forces()], "repetition_penalty": 1.1},
}


USERS = ("allowed tokens", "with a state", "user's")  # of which the draft does not know


def inputs_of(engine: SpecBranch, prompt: str) -> dict[str, Tensor]:
    assert engine.tokenizer is not None
    return dict(engine.tokenizer(prompt, return_tensors="pt"))


def call(engine: SpecBranch, **arguments: Any) -> Any:
    generate: Any = engine.target.generate
    return generate(**arguments)


def ours(engine: SpecBranch, **arguments: Any) -> Any:
    return call(engine, custom_generate=engine, **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_every_prompt_greedily(bundled_pair: SpecBranch, kind: str) -> None:
    tokens = forwards = 0
    for prompt in PROMPTS if kind != "guidance" else PROMPTS[:8]:  # which takes two forwards a token
        inputs = inputs_of(bundled_pair, prompt)
        expected = call(bundled_pair, **inputs, max_new_tokens=NEW, **KINDS[kind]())
        found = ours(bundled_pair, **inputs, max_new_tokens=NEW, method="speculative", **KINDS[kind]())
        assert torch.equal(found, expected), prompt
        assert bundled_pair.last is not None
        tokens += bundled_pair.last.stats.new_tokens
        forwards += bundled_pair.last.stats.target_forwards
    assert forwards < (0.9 if kind in USERS else 0.6) * tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overlap", [False, True])
def test_the_default_method(bundled_pair: SpecBranch, kind: str, overlap: bool) -> None:
    for prompt in PROMPTS[:3]:
        inputs = inputs_of(bundled_pair, prompt)
        expected = call(bundled_pair, **inputs, max_new_tokens=NEW, **KINDS[kind]())
        assert torch.equal(ours(bundled_pair, **inputs, max_new_tokens=NEW, overlap=overlap, **KINDS[kind]()), expected)


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.3, "top_k": 0, "top_p": 0.9, "min_p": 0.02},
    {"typical_p": 0.8},
    {"top_h": 0.6, "temperature": 0.8},
    {"epsilon_cutoff": 0.01, "eta_cutoff": 0.01},
    {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "temperature": 0.9},
    {"top_k": 20, "renormalize_logits": True, "min_new_tokens": 10},
]


@pytest.mark.parametrize("settings", SAMPLED, ids=str)
def test_sampled_texts_are_those_of_our_autoregressive_decoding(
    bundled_pair: SpecBranch, settings: dict[str, Any]
) -> None:
    inputs = inputs_of(bundled_pair, PROMPTS[0])
    texts = []
    for seed in (3, 4):
        arguments = {**inputs, "max_new_tokens": NEW, "do_sample": True, "seed": seed, **settings}
        expected = ours(bundled_pair, method="autoregressive", **arguments)
        for method, overlap in (("specbranch", True), ("specbranch", False), ("pearl", True), ("speculative", False)):
            assert torch.equal(ours(bundled_pair, method=method, overlap=overlap, **arguments), expected)
        texts.append(expected)
    assert not torch.equal(*texts)


def test_set_seed_decides_where_no_seed_is_given(bundled_pair: SpecBranch) -> None:
    arguments = {**inputs_of(bundled_pair, PROMPTS[0]), "max_new_tokens": NEW, "do_sample": True}
    set_seed(5)
    first, second = (ours(bundled_pair, **arguments) for _ in range(2))
    assert not torch.equal(first, second)
    set_seed(5)
    assert torch.equal(first, ours(bundled_pair, **arguments))
    state = torch.get_rng_state()
    ours(bundled_pair, **{**arguments, "do_sample": False})
    ours(bundled_pair, seed=1, **arguments)
    assert torch.equal(state, torch.get_rng_state())


def test_rules_are_called_once_a_token_in_the_order_of_the_text(bundled_pair: SpecBranch) -> None:
    """So what has a state of its own sees what it would see in transformers."""

    class Sees(StoppingCriteria):
        def __init__(self) -> None:
            self.seen: list[tuple[int, ...]] = []

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
            self.seen.append(tuple(input_ids[0].tolist()))
            return torch.full((1,), len(self.seen) == 13)

    inputs, seen = inputs_of(bundled_pair, PROMPTS[1]), []
    for decode in (call, ours):
        processor, criterion = EveryThirdIsAnother(), Sees()
        decode(bundled_pair, **inputs, max_new_tokens=30, logits_processor=[processor], stopping_criteria=[criterion])
        seen.append((processor.seen, criterion.seen))
    assert seen[0] == seen[1]
    assert len(seen[0][1]) == 13


@pytest.mark.parametrize(
    "ends",
    [
        {"max_length": 60},
        {"max_time": 1e-9},
        {"eos_token_id": [11, 13, 262]},
        {"generation_config": GenerationConfig(max_new_tokens=9, repetition_penalty=1.2)},
        {"stopping_criteria": [lambda ids, scores, **_: torch.full((1,), ids.shape[1] % 11 == 0)]},
    ],
    ids=["max_length", "max_time", "eos", "config", "criterion"],
)
def test_where_a_text_ends(bundled_pair: SpecBranch, ends: dict[str, Any]) -> None:
    for prompt in PROMPTS[:4]:
        inputs = inputs_of(bundled_pair, prompt)
        assert torch.equal(
            ours(bundled_pair, **inputs, method="speculative", **ends), call(bundled_pair, **inputs, **ends)
        )


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.heard.append(value.tolist())

    def end(self) -> None:
        self.heard.append("end")


def test_a_streamer_hears_what_it_hears_from_transformers(bundled_pair: SpecBranch) -> None:
    inputs, heard = inputs_of(bundled_pair, PROMPTS[2]), []
    for decode in (call, ours):
        for kind in ("plain", "with a state"):
            heard.append(Heard())
            decode(bundled_pair, **inputs, max_new_tokens=NEW, streamer=heard[-1], **KINDS[kind]())
    assert [each.heard for each in heard[:2]] == [each.heard for each in heard[2:]]
    heard.append(Heard())
    bundled_pair.generate(inputs, max_new_tokens=NEW, streamer=heard[-1])
    assert heard[-1].heard == heard[0].heard


def test_padding_on_the_left(bundled_pair: SpecBranch) -> None:
    inputs = inputs_of(bundled_pair, PROMPTS[0])
    padded = {
        "input_ids": torch.cat([torch.full((1, 5), 7), inputs["input_ids"]], 1),
        "attention_mask": torch.cat([torch.zeros(1, 5, dtype=torch.int64), inputs["attention_mask"]], 1),
    }
    for kind in ("plain", "repetition penalty", "n-gram ban"):  # whose rules see the padding
        expected = call(bundled_pair, **padded, max_new_tokens=NEW, **KINDS[kind]())
        assert torch.equal(ours(bundled_pair, **padded, max_new_tokens=NEW, **KINDS[kind]()), expected), kind


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}, {"eos_token_id": [198, 262], "pad_token_id": 0}])
def test_a_batch_is_decoded_one_text_after_the_other(bundled_pair: SpecBranch, settings: dict[str, Any]) -> None:
    rows = [bundled_pair.encode(prompt) for prompt in PROMPTS[:3]]
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }
    expected = call(bundled_pair, **inputs, max_new_tokens=NEW, **settings)
    assert torch.equal(ours(bundled_pair, **inputs, max_new_tokens=NEW, **settings), expected)


def test_scores_and_logits_are_returned(bundled_pair: SpecBranch) -> None:
    inputs = inputs_of(bundled_pair, PROMPTS[0])
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.3}
    expected, found = (decode(bundled_pair, **inputs, max_new_tokens=NEW, **wanted) for decode in (call, ours))
    assert type(found) is type(expected)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert len(found[name]) == len(expected[name]) == NEW
        for mine, theirs in zip(found[name], expected[name], strict=True):
            assert mine.shape == theirs.shape
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    sampled = {**wanted, "do_sample": True, "temperature": 0.8, "top_k": 30, "seed": 2}
    by_method = [
        ours(bundled_pair, **inputs, max_new_tokens=NEW, method=method, **sampled)
        for method in ("autoregressive", "specbranch")
    ]
    assert all(torch.equal(a, b) for a, b in zip(by_method[0].scores, by_method[1].scores, strict=True))
    assert all((scores > -torch.inf).sum() <= 30 for scores in by_method[0].scores)


def test_what_a_rule_raises_comes_out_and_the_engine_works_on(bundled_pair: SpecBranch) -> None:
    class Fails(Exception):
        pass

    def fail(ids: Tensor, scores: Any, **_: Any) -> Any:
        if ids.shape[1] > 30:
            raise Fails("here")
        return scores

    inputs = inputs_of(bundled_pair, PROMPTS[0])
    expected = call(bundled_pair, **inputs, max_new_tokens=NEW)
    for overlap in (False, True):
        with pytest.raises(Fails, match="here"):
            ours(bundled_pair, **inputs, max_new_tokens=NEW, logits_processor=[fail], overlap=overlap)
        assert torch.equal(ours(bundled_pair, **inputs, max_new_tokens=NEW, overlap=overlap), expected)

    def wrong(ids: Tensor, scores: Tensor) -> Tensor:
        return scores[:, :5]

    with pytest.raises(SpecBranchError, match=r"logits_processor gave \[1, 5\]; expected scores of \[1, \d+\]"):
        ours(bundled_pair, **inputs, max_new_tokens=NEW, logits_processor=[wrong])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"num_beams": 2}, "generate asks for beam_search"),
    ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences 2"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
    ({"dola_layers": "low"}, "dola"),
    ({"cache_implementation": "quantized"}, "quantized|quantization"),
    ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions"),
    ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states"),
    ({"attention_mask": torch.tensor([[1, 0, 1, 1]])}, r"attention_mask \[1, 0, 1, 1\].*zeros \(padding\) on the left"),
    ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "attention_mask"),
    ({"position_ids": torch.tensor([[3, 4, 5, 6]])}, "position_ids"),
    ({"input_ids": torch.tensor([[3, 99]])}, "token id 99 is outside the target's vocabulary of 32"),
    ({"inputs_embeds": torch.ones(1, 4, 32)}, "inputs_embeds"),
    ({"past_key_values": "a cache"}, "(past_key_values|cache), .*no cache: it keeps its own"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[message[:30] for _, message in REFUSED])
def test_what_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    from transformers import DynamicCache

    engine = tiny_pair()
    arguments: dict[str, Any] = {"input_ids": torch.tensor([[3, 4, 5, 6]]), "max_new_tokens": 4, **settings}
    if settings.get("past_key_values"):
        arguments["past_key_values"] = DynamicCache(config=engine.target.config)
    if "inputs_embeds" in settings:
        del arguments["input_ids"]
    with pytest.raises((SpecBranchError, ImportError, ValueError), match=message):
        ours(engine, **arguments)


def test_another_model_and_an_assistant_are_refused() -> None:
    engine, other = tiny_pair(), tiny_pair()
    with pytest.raises(SpecBranchError, match="this SpecBranch decodes another LlamaForCausalLM"):
        call(other, input_ids=torch.tensor([[3, 4]]), custom_generate=engine)
    with pytest.raises(SpecBranchError, match="assistant_model"):
        ours(engine, input_ids=torch.tensor([[3, 4]]), assistant_model=other.draft)


def test_rules_with_a_state_are_for_one_text_at_a_time() -> None:
    engine, ids = tiny_pair(), torch.tensor([[3, 4], [5, 6]])
    for settings in (
        {"logits_processor": [EveryThirdIsAnother()]},
        {"encoder_repetition_penalty": 1.2},
        {"stopping_criteria": [lambda ids, scores, **_: torch.zeros(2, dtype=torch.bool)]},
        {"return_dict_in_generate": True, "output_scores": True},
    ):
        with pytest.raises(SpecBranchError, match=r"for one text at a time, found (several|a batch of 2)"):
            ours(engine, input_ids=ids, max_new_tokens=4, **settings)


def test_code_that_only_calls_generate(bundled_pair: SpecBranch) -> None:
    """A pipeline, and a trainer that samples in the middle of its work: in training mode, with a config of its own."""
    text: Any = pipeline("text-generation", model=bundled_pair.target, tokenizer=bundled_pair.tokenizer)  # type: ignore[call-overload]
    settings = {"max_new_tokens": NEW, "do_sample": False}
    assert text(PROMPTS[:2], custom_generate=bundled_pair, **settings) == text(PROMPTS[:2], **settings)
    engine = tiny_pair()
    config = GenerationConfig(max_new_tokens=9, do_sample=False, repetition_penalty=1.1)
    engine.target.train()
    with torch.no_grad():
        found = ours(engine, input_ids=torch.tensor([[3, 4], [5, 6]]), generation_config=config)
    assert engine.target.training
    assert torch.equal(found, call(engine, input_ids=torch.tensor([[3, 4], [5, 6]]), generation_config=config))
    engine.target(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()


@pytest.fixture
def loud() -> Iterator[None]:
    """Warnings are errors, and transformers may say what it likes."""
    before = logging.get_verbosity()
    logging.set_verbosity_warning()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    logging.set_verbosity(before)


def test_no_warning_reaches_the_user(
    bundled_pair: SpecBranch, loud: None, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    inputs = inputs_of(bundled_pair, PROMPTS[0])
    ours(bundled_pair, **inputs, max_new_tokens=8)
    ours(bundled_pair, **inputs, max_new_tokens=8, do_sample=True, temperature=0.7, repetition_penalty=1.1)
    bundled_pair.generate(inputs, max_new_tokens=8, generation_config=GenerationConfig(repetition_penalty=1.2))
    captured = capfd.readouterr()
    assert (captured.out, captured.err, caplog.text) == ("", "", "")


# ---- specbranch.generate


def test_one_call(bundled_pair: SpecBranch) -> None:
    target, draft = copy.deepcopy(bundled_pair.target), bundled_pair.draft
    inputs = inputs_of(bundled_pair, PROMPTS[0])
    expected = call(bundled_pair, **inputs, max_new_tokens=NEW, repetition_penalty=1.2)
    found = specbranch.generate(target, draft, **inputs, max_new_tokens=NEW, repetition_penalty=1.2)  # type: ignore[arg-type]
    assert isinstance(found, Tensor)
    assert torch.equal(found, expected)
    engine = vars(target)["_specbranch"].engine
    short = specbranch.generate(target, draft, inputs["input_ids"], max_new_tokens=3)
    assert torch.equal(short, call(bundled_pair, **inputs, max_new_tokens=3))  # type: ignore[arg-type]
    assert vars(target)["_specbranch"].engine is engine
    assert vars(copy.deepcopy(target))["_specbranch"].engine is None
    assert torch.equal(specbranch.generate(target, **inputs, max_new_tokens=NEW, repetition_penalty=1.2), expected)  # type: ignore[arg-type]
    retrieved = specbranch.generate(target, **inputs, max_new_tokens=NEW, repetition_penalty=1.2, retrieval=True)  # type: ignore[arg-type]
    assert torch.equal(retrieved, expected)  # type: ignore[arg-type]
    stop = {"stop_strings": [bundled_pair.generate(PROMPTS[0], max_new_tokens=NEW).text[20:23]], "max_new_tokens": NEW}
    expected = call(bundled_pair, **inputs, tokenizer=bundled_pair.tokenizer, **stop)
    assert expected.shape[1] < inputs["input_ids"].shape[1] + NEW
    for where in (stop, {"generation_config": GenerationConfig(**stop)}):
        made = specbranch.generate(target, draft, **inputs, tokenizer=bundled_pair.tokenizer, **where)  # type: ignore[arg-type]
        assert torch.equal(made, expected)  # type: ignore[arg-type]
    with pytest.raises(SpecBranchError, match="stop strings need a tokenizer"):
        specbranch.generate(target, draft, **inputs, **stop)  # type: ignore[arg-type]


def test_a_model_that_is_no_pair_s_keeps_nothing() -> None:
    model = tiny_model()
    engine = SpecBranch(model, method="autoregressive")
    ours(engine, input_ids=torch.tensor([[3, 4]]), max_new_tokens=2)
    assert "_specbranch" not in vars(model)
