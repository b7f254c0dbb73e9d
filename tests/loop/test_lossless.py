"""Every method gives the tokens of autoregressive decoding, at any temperature, overlapped or serial."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import tiny_model

from specbranch import METHODS, SpecBranch, SpecBranchError, bundled
from specbranch.policies.methods import make_policy
from specbranch.text.encoding import encode

SAMPLINGS: list[dict[str, Any]] = [{"temperature": 0.0}] + [
    {"temperature": 1.0, "top_p": 0.95, "seed": seed} for seed in (1, 2, 3)
]
RUNS = [
    (method, overlap)
    for method in METHODS[1:]
    for overlap in ((False, True) if make_policy(method, {}).overlaps else (False,))
]
NEW_TOKENS = 16


def prompts() -> list[str]:
    """Fifty beginnings: the bundled prompts, whole and cut at two thirds and one third."""
    whole = [entry["prompt"] for entry in bundled.prompts()]
    cut = [text[: max(8, len(text) * part // 3)] for part in (2, 1) for text in whole]
    return (whole + cut)[:50]


TEN = range(0, 50, 5)
FORTY = [i for i in range(50) if i not in TEN]


@pytest.mark.parametrize(
    "chosen", [pytest.param(TEN, id="ten"), pytest.param(FORTY, id="forty", marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seed1", "seed2", "seed3"])
def test_same_tokens_as_autoregressive(
    bundled_pair: SpecBranch, sampling: dict[str, Any], chosen: Sequence[int]
) -> None:
    """200 texts in all; for each, every method, serial and overlapped."""
    assert len(prompts()) == 50
    texts = [prompts()[i] for i in chosen]
    accepted = 0
    for text in texts:
        plain = bundled_pair.generate(text, max_new_tokens=NEW_TOKENS, method="autoregressive", **sampling)
        for method, overlap in RUNS:
            drafted = bundled_pair.generate(text, max_new_tokens=NEW_TOKENS, method=method, overlap=overlap, **sampling)
            assert drafted.tokens == plain.tokens, (text, method, overlap)
            assert drafted.text == plain.text
            accepted += drafted.stats.accepted
    assert accepted > len(texts) * NEW_TOKENS  # the drafts were really used


RETRIEVING = [(method, overlap) for method, overlap in RUNS if make_policy(method, {}).may_retrieve]


@pytest.mark.parametrize("sampling", SAMPLINGS[:2], ids=["greedy", "seed1"])
def test_retrieved_tokens_do_not_change_the_text(bundled_pair: SpecBranch, sampling: dict[str, Any]) -> None:
    """Beside a draft, with every method that may have them, and without one."""
    alone = SpecBranch(bundled_pair.target, tokenizer=bundled_pair.tokenizer, retrieval=True)
    retrieved = accepted = 0
    for text in prompts()[::10]:
        text += text[: len(text) // 2]  # which the model may go on to repeat
        plain = bundled_pair.generate(text, max_new_tokens=32, method="autoregressive", **sampling)
        runs = [
            bundled_pair.generate(text, max_new_tokens=32, method=method, overlap=overlap, retrieval=True, **sampling)
            for method, overlap in RETRIEVING
        ]
        for found in [*runs, alone.generate(text, max_new_tokens=32, **sampling)]:
            assert (found.tokens, found.text) == (plain.tokens, plain.text), (text, found.stats.method)
            assert 0 <= found.stats.retrieved_accepted <= found.stats.retrieved <= found.stats.verified
            retrieved, accepted = retrieved + found.stats.retrieved, accepted + found.stats.retrieved_accepted
        together = bundled_pair.generate([text, text], max_new_tokens=32, retrieval=True, **sampling)
        assert [each.tokens for each in together] == [plain.tokens] * 2
    assert 0 < accepted < retrieved


@pytest.mark.parametrize("method", ["autoregressive", "specbranch-paper"])
def test_methods_that_never_retrieve(bundled_pair: SpecBranch, method: str) -> None:
    """The paper's settings are the paper's."""
    text = "one two three one two three one two"
    assert bundled_pair.generate(text, max_new_tokens=8, method=method).stats.retrieved == 0
    with pytest.raises(SpecBranchError, match=f"retrieval is True, but method '{method}' never retrieves"):
        bundled_pair.generate(text, max_new_tokens=8, method=method, retrieval=True)
    with pytest.raises(SpecBranchError, match="retrieval is 'often'; expected True, False or 'auto'"):
        bundled_pair.generate(text, max_new_tokens=8, method=method, retrieval="often")


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_beside_each_other_do_not_change_the_text(bundled_pair: SpecBranch, threads: int) -> None:
    """The other tests run on one thread; here the target has a thread of its own, or two, and the draft another."""
    pair = SpecBranch(bundled_pair.target, bundled_pair.draft, tokenizer=bundled_pair.tokenizer, threads=threads)
    for text in prompts()[3::24]:
        for sampling in SAMPLINGS[:2]:
            plain = bundled_pair.generate(text, max_new_tokens=NEW_TOKENS, method="autoregressive", **sampling)
            for method, overlap in RUNS:
                drafted = pair.generate(text, max_new_tokens=NEW_TOKENS, method=method, overlap=overlap, **sampling)
                assert drafted.tokens == plain.tokens, (text, method, overlap)


@pytest.mark.parametrize("options", [{"epsilon": 1.0, "k_max": 4}, {"verify_tail": False}, {"max_trunk": 1}])
@pytest.mark.parametrize("overlap", [False, True])
def test_policy_options_never_change_the_text(bundled_pair: SpecBranch, options: dict[str, Any], overlap: bool) -> None:
    for text in prompts()[:4]:
        plain = bundled_pair.generate(text, max_new_tokens=32, temperature=0.8, seed=9, method="autoregressive")
        branched = bundled_pair.generate(text, max_new_tokens=32, temperature=0.8, seed=9, overlap=overlap, **options)
        assert branched.tokens == plain.tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_neox"])
def test_random_models_and_useless_drafts(family: str, dtype: torch.dtype) -> None:
    """A draft that knows nothing costs time, not tokens; rows are exact, so bfloat16 agrees as well."""
    target, draft = tiny_model(family, seed=3, dtype=dtype), tiny_model("llama", seed=4, dtype=dtype)
    pair = SpecBranch(target, draft)
    for sampling in SAMPLINGS:
        plain = pair.generate([5, 9, 2], max_new_tokens=30, method="autoregressive", **sampling)
        assert len(plain.tokens) == 30
        for method, overlap in RUNS:
            drafted = pair.generate([5, 9, 2], max_new_tokens=30, method=method, overlap=overlap, **sampling)
            assert drafted.tokens == plain.tokens, (method, overlap)


def test_a_draft_with_a_padded_vocabulary_does_not_change_the_text() -> None:
    target = tiny_model(seed=5)
    for size in (24, 48):
        pair = SpecBranch(target, tiny_model(seed=5, vocab_size=size))
        plain = pair.generate([3, 1], max_new_tokens=20, temperature=1.0, method="autoregressive")
        assert pair.generate([3, 1], max_new_tokens=20, temperature=1.0).tokens == plain.tokens


def test_greedy_equals_transformers_generate(bundled_pair: SpecBranch) -> None:
    """In float32 our autoregressive decoding is transformers' own."""
    for text in prompts()[:8]:
        ids = torch.tensor([encode(bundled_pair.tokenizer, text)])
        theirs = bundled_pair.target.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False
        )
        ours = bundled_pair.generate(ids, max_new_tokens=32)
        assert ours.tokens == theirs[0, ids.shape[1] :].tolist()
