"""On a GPU: captured steps, both streams, memory, two devices. Skipped where there is none.

What these tests ask is asked without a GPU too, of a recording device (test_captured.py).
"""

import os
from itertools import cycle
from typing import Any

import pytest
import torch
from made_up import MadeUp

from specbranch import METHODS, SpecBranch, bundled
from specbranch.runtime.workers import Streams
from specbranch.text.encoding import encode

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
QUICK = os.environ.get("SPECBRANCH_TESTS") == "quick"  # for a GPU that is at hand for minutes
NEW_TOKENS = 48 if QUICK else 96
PROMPTS = bundled.prompts()[: 4 if QUICK else None]
TRIED = ("autoregressive", "pearl", "specbranch") if QUICK else METHODS
MEMORY_TOKENS = 1_000 if QUICK else 20_000
SAMPLINGS: list[dict[str, Any]] = [{}, {"temperature": 0.8, "top_p": 0.95, "seed": 7}]


def load(**options: Any) -> SpecBranch:
    return SpecBranch.from_pretrained("bundled", draft="bundled", **({"dtype": "float32", "device": DEVICE} | options))


@pytest.fixture(scope="module")
def captured() -> SpecBranch:
    return load()


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    """Autoregressive, eager: what every other way of running must give. More than 2,000 tokens, but for a quick run."""
    eager = load(cuda_graphs=False)
    found = [
        eager.generate(record["prompt"], max_new_tokens=NEW_TOKENS, method="autoregressive", **sampling).tokens
        for record in PROMPTS
        for sampling in SAMPLINGS
    ]
    assert sum(map(len, found)) >= (200 if QUICK else 2000)
    return found


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("method", TRIED)
def test_captured_equals_eager_and_overlapped_equals_serial(
    captured: SpecBranch, texts: list[list[int]], method: str, overlap: bool
) -> None:
    expected = iter(texts)
    for record in PROMPTS:
        for sampling in SAMPLINGS:
            generation = captured.generate(
                record["prompt"], max_new_tokens=NEW_TOKENS, method=method, overlap=overlap, **sampling
            )
            assert generation.tokens == next(expected), (record["id"], sampling)
            assert generation.stats.target_runner == "captured"


def test_eager_equals_captured_when_overlapped(texts: list[list[int]]) -> None:
    eager = load(cuda_graphs=False)
    assert isinstance(eager.pair.workers, Streams)
    for record, expected in zip(PROMPTS, texts[:: len(SAMPLINGS)], strict=True):
        generation = eager.generate(record["prompt"], max_new_tokens=NEW_TOKENS, overlap=True)
        assert generation.tokens == expected
        assert generation.stats.target_runner == "eager: CUDA graphs are switched off"


@pytest.mark.parametrize("overlap", [False, True])
def test_constrained_texts_are_those_of_eager_plain_decoding(captured: SpecBranch, overlap: bool) -> None:
    """Masks come to the device while a replayed forward is under way."""
    eager = load(cuda_graphs=False)
    for seed, sampling in enumerate(SAMPLINGS):
        ids = captured.encode(PROMPTS[seed]["prompt"])
        constraint = MadeUp(seed, ids)
        expected = eager.generate(
            ids, max_new_tokens=NEW_TOKENS, method="autoregressive", constraint=constraint, **sampling
        )
        result = captured.generate(ids, max_new_tokens=NEW_TOKENS, overlap=overlap, constraint=constraint, **sampling)
        assert result.tokens == expected.tokens
        assert result.stats.forced_accepted > 0
        assert result.stats.target_runner == "captured"


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_in_bfloat16_too_every_method_gives_the_same_text(sampling: dict[str, Any]) -> None:
    """Every verification has the same number of rows, and so the same kernels."""
    pair = load(dtype="bfloat16")
    for record in PROMPTS:
        expected = pair.generate(record["prompt"], max_new_tokens=NEW_TOKENS, method="autoregressive", **sampling)
        for method in TRIED:
            for overlap in (False, True):
                generation = pair.generate(
                    record["prompt"], max_new_tokens=NEW_TOKENS, method=method, overlap=overlap, **sampling
                )
                assert generation.tokens == expected.tokens, (record["id"], method, overlap)


def test_the_cpu_gives_the_same_tokens(texts: list[list[int]]) -> None:
    """Up to near-ties between two ways of adding up, which float32 leaves few of."""
    pair = SpecBranch.from_pretrained("bundled", draft="bundled", dtype="float32")
    same = [
        pair.generate(record["prompt"], max_new_tokens=NEW_TOKENS).tokens == expected
        for record, expected in zip(PROMPTS, texts[:: len(SAMPLINGS)], strict=True)
    ]
    assert sum(same) >= 0.8 * len(same)


def test_memory_does_not_grow(captured: SpecBranch) -> None:
    """Over many tokens, after everything was captured."""
    prompts = cycle(PROMPTS)

    def some(count: int) -> int:
        made = 0
        while made < count:
            record = next(prompts)
            made += len(captured.generate(record["prompt"], max_new_tokens=NEW_TOKENS, overlap=True).tokens)
        return made

    some(500)
    before = torch.cuda.memory_allocated()
    assert some(MEMORY_TOKENS) >= MEMORY_TOKENS
    assert torch.cuda.memory_allocated() <= before


def test_a_text_beyond_the_cache_is_captured_anew(captured: SpecBranch) -> None:
    limit = captured.target.config.max_position_embeddings
    prompt = encode(captured.tokenizer, PROMPTS[0]["prompt"])
    longer = (prompt * (limit // len(prompt) + 1))[: limit - 40]
    expected = captured.generate(longer, max_new_tokens=32, method="autoregressive", overlap=False).tokens
    assert captured.generate(longer, max_new_tokens=32, overlap=True).tokens == expected


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_draft_and_target_on_two_gpus(texts: list[list[int]]) -> None:
    pair = load(draft_device="cuda:1")
    assert pair.draft is not None
    assert (str(pair.target.device), str(pair.draft.device)) == ("cuda:0", "cuda:1")
    for record, expected in zip(PROMPTS, texts[:: len(SAMPLINGS)], strict=True):
        assert pair.generate(record["prompt"], max_new_tokens=NEW_TOKENS, overlap=True).tokens == expected


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_target_spread_over_two_gpus(texts: list[list[int]]) -> None:
    pair = load(device_map="balanced")
    for record, expected in zip(PROMPTS[:3], texts[:: len(SAMPLINGS)], strict=False):
        generation = pair.generate(record["prompt"], max_new_tokens=NEW_TOKENS, overlap=True)
        assert generation.tokens == expected
        assert generation.stats.target_runner.startswith("eager: its layers lie on several devices")
