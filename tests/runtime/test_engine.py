"""The public class: arguments, results, stats, and every kind of bad input."""

import itertools
import signal
import threading
from typing import Any

import pytest
import torch
from tiny import tiny_model

from specbranch import (
    GenerationFailed,
    GenerationInterrupted,
    SpecBranch,
    SpecBranchError,
)
from specbranch.core.stats import Stats
from specbranch.text.encoding import encode

PROMPT = "def area(width, height):\n"


def test_prompts_may_be_text_ids_or_tensors(bundled_pair: SpecBranch) -> None:
    ids = encode(bundled_pair.tokenizer, PROMPT)
    results = [
        bundled_pair.generate(prompt, max_new_tokens=12).tokens
        for prompt in (PROMPT, ids, torch.tensor(ids), torch.tensor([ids]))
    ]
    assert results[0] == results[1] == results[2] == results[3]
    assert len(results[0]) == 12


@pytest.mark.parametrize("overlap", [False, True])
def test_stats_add_up(bundled_pair: SpecBranch, overlap: bool) -> None:
    for method in ("autoregressive", "speculative", "pearl", "specbranch"):
        stats = bundled_pair.generate(PROMPT, max_new_tokens=40, method=method, overlap=overlap).stats
        row = stats.as_dict()
        assert row["method"] == method
        assert row["new_tokens"] == 40
        assert stats.accepted + stats.rounds == 40  # every round commits what it accepted and one token more
        assert row["target_forwards"] == stats.rounds
        assert row["tokens_per_target_forward"] == 40 / stats.rounds
        assert 0 <= row["wasted_tokens"] <= stats.drafted
        assert stats.hits <= stats.rounds
        assert all(0 <= row[name] <= 1 for name in ("acceptance_rate", "hit_rate", "rollback_rate"))
        assert 0 < row["prefill_seconds"] < row["seconds"]
        if method == "autoregressive":
            assert (stats.rounds, stats.drafted, row["bubble_seconds"]) == (40, 0, 0)


def test_stream_gives_the_same_text(bundled_pair: SpecBranch) -> None:
    whole = bundled_pair.generate(PROMPT, max_new_tokens=48, temperature=0.9, seed=4)
    stream = bundled_pair.stream(PROMPT, max_new_tokens=48, temperature=0.9, seed=4)
    assert stream.generation is None
    pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == whole.text
    assert stream.generation is not None
    assert stream.generation.tokens == whole.tokens


def test_a_stream_may_be_left_in_the_middle(bundled_pair: SpecBranch) -> None:
    stream = bundled_pair.stream(PROMPT, max_new_tokens=48, overlap=True)
    next(iter(stream))
    stream.close()
    assert bundled_pair.target.config._attn_implementation != "specbranch"
    again = bundled_pair.generate(PROMPT, max_new_tokens=8)
    assert again.tokens == bundled_pair.generate(PROMPT, max_new_tokens=8, method="autoregressive").tokens


def test_stop_strings_and_end_of_sequence(bundled_pair: SpecBranch, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = bundled_pair.generate(PROMPT, max_new_tokens=64)
    assert plain.finish_reason in ("length", "stop")
    stop = plain.text[10:14]
    stopped = bundled_pair.generate(PROMPT, max_new_tokens=64, stop=stop)
    assert stopped.finish_reason == "stop"
    assert stopped.text == plain.text[: plain.text.index(stop)]
    assert plain.tokens[: len(stopped.tokens)] == stopped.tokens

    eos = plain.tokens[20]
    pair = SpecBranch(bundled_pair.target, bundled_pair.draft, tokenizer=bundled_pair.tokenizer)
    monkeypatch.setattr(pair.target.generation_config, "eos_token_id", eos)
    for method in ("autoregressive", "specbranch"):
        ended = pair.generate(PROMPT, max_new_tokens=64, method=method)
        assert ended.tokens == plain.tokens[: plain.tokens.index(eos) + 1]
        assert ended.stats.new_tokens == len(ended.tokens)


def test_torch_threads_are_given_back(bundled_pair: SpecBranch) -> None:
    before = torch.get_num_threads()
    pair = SpecBranch(bundled_pair.target, bundled_pair.draft, threads=1)
    pair.generate([1, 2, 3], max_new_tokens=4, overlap=True)
    assert torch.get_num_threads() == before


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": []}, "prompt is empty"),
    ({"prompt": [1, 10**6]}, "token id 1000000 is outside the target's vocabulary"),
    ({"prompt": torch.ones(2, 3, dtype=torch.int64)}, "batch of 2"),
    ({"prompt": [1] * 2000}, "context holds"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"max_new_tokens": 10**6}, "context holds"),
    ({"method": "magic"}, "unknown method 'magic'"),
    ({"temperature": -1.0}, "temperature is -1"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"top_p": 0.0}, "top_p is 0"),
    ({"top_k": -2}, "top_k is -2"),
    ({"min_p": 1.5}, "min_p is 1.5"),
    ({"seed": -1}, "seed is -1"),
    ({"stop": ""}, "stop string is empty"),
    ({"overlap": "maybe"}, "overlap is 'maybe'"),
    ({"num_beams": 2}, "num_beams"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS, ids=[m for _, m in BAD_ARGUMENTS])
def test_bad_arguments_are_named(bundled_pair: SpecBranch, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecBranchError, match=message):
        bundled_pair.generate(**{"prompt": PROMPT, "max_new_tokens": 4, **arguments})
    assert bundled_pair.target.config._attn_implementation != "specbranch"


def test_a_method_that_drafts_needs_a_draft(bundled_pair: SpecBranch) -> None:
    alone = SpecBranch(bundled_pair.target, tokenizer=bundled_pair.tokenizer)
    with pytest.raises(SpecBranchError, match="needs a draft"):
        alone.generate(PROMPT, max_new_tokens=4)
    assert len(alone.generate(PROMPT, max_new_tokens=4, method="autoregressive").tokens) == 4


def test_text_needs_a_tokenizer() -> None:
    pair = SpecBranch(tiny_model(), tiny_model(seed=1))
    with pytest.raises(SpecBranchError, match="tokenizer"):
        pair.generate("text", max_new_tokens=2)
    with pytest.raises(SpecBranchError, match="tokenizer"):
        pair.generate([1], max_new_tokens=2, stop="x")
    assert pair.generate([1], max_new_tokens=2).text == ""


def test_checkpoints_that_are_not_there_or_not_causal_models(tmp_path: Any) -> None:
    with pytest.raises(SpecBranchError, match="no such directory"):
        SpecBranch.from_pretrained("./nowhere", draft="bundled")
    with pytest.raises(SpecBranchError, match=r"no config\.json"):
        SpecBranch.from_pretrained(tmp_path, draft="bundled")
    with pytest.raises(SpecBranchError, match="dtype 'int3'"):
        SpecBranch.from_pretrained("bundled", dtype="int3")


def test_a_draft_with_another_vocabulary_is_refused(tmp_path: Any, bundled_pair: SpecBranch) -> None:
    tokenizer = bundled_pair.tokenizer
    assert tokenizer is not None
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    vocabulary = tokenizer.get_vocab()
    first, second = (sorted(vocabulary, key=vocabulary.__getitem__)[i] for i in (100, 101))
    swapped = text.replace(f'"{first}": 100', '"@": 100').replace(f'"{second}": 101', f'"{first}": 101')
    path.write_text(swapped.replace('"@": 100', f'"{second}": 100'), encoding="utf-8")
    bundled_pair.draft.save_pretrained(tmp_path)
    with pytest.raises(SpecBranchError, match=r"another vocabulary.*2 ids differ.*100 \("):
        SpecBranch.from_pretrained("bundled", draft=str(tmp_path))


def test_nan_logits_are_an_error_that_names_them() -> None:
    target = tiny_model()
    with torch.no_grad():
        target.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"target_logits.*NaN"):
        SpecBranch(target, tiny_model(seed=1)).generate([1, 2], max_new_tokens=4, method="autoregressive")


@pytest.mark.parametrize("overlap", [False, True])
def test_ctrl_c_keeps_what_was_committed(
    bundled_pair: SpecBranch, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the fourth round on, wherever the main thread is then. It is the one that signals come to: pytest-xdist runs
    tests on it since 3.6."""
    whole = bundled_pair.generate(PROMPT, max_new_tokens=400, overlap=overlap)
    begin_round, rounds = Stats.begin_round, itertools.count()

    def begin(stats: Stats, now: float, overlapped: bool) -> None:
        if next(rounds) == 3:
            threading.Timer(0.02, signal.raise_signal, [signal.SIGINT]).start()
        begin_round(stats, now, overlapped)

    with monkeypatch.context() as patch:
        patch.setattr(Stats, "begin_round", begin)
        with pytest.raises(KeyboardInterrupt) as caught:  # one that is not caught ends the whole run
            bundled_pair.generate(PROMPT, max_new_tokens=400, overlap=overlap)
    assert isinstance(caught.value, GenerationInterrupted)
    partial = caught.value.generation
    assert partial.finish_reason == "interrupted"
    assert partial.tokens == whole.tokens[: len(partial.tokens)]
    assert whole.text.startswith(partial.text.rstrip("\ufffd"))
    assert bundled_pair.target.config._attn_implementation != "specbranch"
    assert bundled_pair.generate(PROMPT, max_new_tokens=8).tokens == whole.tokens[:8]


def test_an_interrupt_between_two_rounds_keeps_the_text(bundled_pair: SpecBranch) -> None:
    stream = bundled_pair.stream(PROMPT, max_new_tokens=64)
    first = next(stream)
    with pytest.raises(GenerationInterrupted) as caught:
        stream.hand_in(KeyboardInterrupt())
    assert caught.value.generation.text.startswith(first)
    assert 0 < len(caught.value.generation.tokens) < 64


def test_a_failure_in_the_middle_keeps_what_was_committed(
    bundled_pair: SpecBranch, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = bundled_pair.generate(PROMPT, max_new_tokens=32)
    verify, calls = bundled_pair.pair.target.verify, iter(range(100))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:
            raise RuntimeError("out of memory")
        return verify(*args, **kwargs)

    monkeypatch.setattr(bundled_pair.pair.target, "verify", failing)
    with pytest.raises(GenerationFailed, match="out of memory") as caught:
        bundled_pair.generate(PROMPT, max_new_tokens=32)
    partial = caught.value.generation
    assert 0 < len(partial.tokens) < 32
    assert partial.tokens == whole.tokens[: len(partial.tokens)]
