"""Every supported family against transformers' own eager forward: tree nodes, after commit, after rollback."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import FAMILIES, PROMPT, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from trees import place, tree_of

from specbranch import SpecBranchError
from specbranch.core.tree import Tree
from specbranch.runtime.batch import Inputs
from specbranch.runtime.cache import TREE_ROWS
from specbranch.runtime.model import CachedModel


def tree() -> Tree:
    """Root with two branches of three and two nodes, one of them forked."""
    nodes = zip([7, 12, 20, 1, 28, 14], [0, 0, 1, 2, 3, 3], strict=True)
    return tree_of(*((token, parent, 1.0) for token, parent in nodes), token=5, position=len(PROMPT))


def score(cached: CachedModel, tree: Tree, nodes: Sequence[int], backlog: Sequence[int] = ()) -> Tensor:
    """Logits after each of `nodes`."""
    batch = place(cached, tree, nodes, backlog)
    return cached.forward(Inputs.of([batch], cached.device), slice(batch.leaves))


def eager(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """transformers' own logits after the last token."""
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([tokens])).logits[0, -1]
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_tree_forward_commit_and_rollback_equal_eager(family: str) -> None:
    model = tiny_model(family.split("-")[0], **FAMILIES[family])
    cached, speculation = CachedModel(model, "target"), tree()
    cached.reset(64)

    def check(logits: Tensor, texts: list[list[int]]) -> None:
        for row, text in zip(logits, texts, strict=True):
            torch.testing.assert_close(row, eager(model, text), rtol=1e-4, atol=1e-4)

    with cached.attached():
        cached.prefill(PROMPT[:7])
        cached.prefill(PROMPT[7:])
        first = score(cached, speculation, [0, 1, 2])
        second = score(cached, speculation, [3, 4, 5, 6])
    texts = [PROMPT + speculation.tokens(speculation.path(i)) for i in range(7)]
    check(first, texts[:3])
    check(second, texts[3:])

    # Re-root at node 3: root and node 1 are committed, 3 and its children live on in other rows.
    rerooted, survivors = speculation.reroot(3)
    rerooted.add(2, 9, 1.0)
    with cached.attached():
        cached.cache.commit(speculation.path(1), survivors)
        third = score(cached, rerooted, [3])
    committed = [*PROMPT, 5, 7]
    check(third, [committed + rerooted.tokens(rerooted.path(3))])

    # Roll the tree and one committed token back, and go on another way.
    with cached.attached():
        cached.cache.rollback(len(PROMPT) + 1)
        fourth = score(cached, Tree(29, len(PROMPT) + 1), [0])
    check(fourth, [[*PROMPT, 5, 29]])


def test_rotary_angles_take_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    kind = type(model.model.rotary_emb)
    seen: list[int] = []
    forward = kind.forward

    def counted(*args: object, **kwargs: object) -> object:
        seen.append(torch.get_num_threads())
        return forward(*args, **kwargs)

    cached, before = CachedModel(model, "target"), torch.get_num_threads()
    monkeypatch.setattr(kind, "forward", counted)
    cached.reset(64)
    torch.set_num_threads(2)
    try:
        with cached.attached():
            cached.prefill(PROMPT)
        assert seen == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_prefill_computes_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    class Foreign(nn.Linear):
        """A head that may not take an empty input."""

    rows: list[int] = []
    forward = CachedModel.forward

    def counted(*given: Any, **options: Any) -> Tensor:
        logits = forward(*given, **options)
        rows.append(len(logits))
        return logits

    for head, expected in ((nn.Linear, 0), (Foreign, 1)):
        model = tiny_model()
        model.lm_head.__class__ = head
        cached = CachedModel(model, "target")
        cached.reset(64)
        monkeypatch.setattr(CachedModel, "forward", counted)
        with cached.attached():
            cached.prefill(PROMPT)
        monkeypatch.setattr(CachedModel, "forward", forward)
        assert rows.pop() == expected


def test_backlog_is_committed_with_the_root() -> None:
    model = tiny_model()
    cached = CachedModel(model, "draft")
    cached.reset(32)
    with cached.attached():
        cached.prefill(PROMPT[:9])
        logits = score(cached, Tree(PROMPT[-1], len(PROMPT) - 1), [0], backlog=PROMPT[9:-1])
    torch.testing.assert_close(logits[0], eager(model, PROMPT), rtol=1e-4, atol=1e-4)
    assert (cached.cache.length, cached.cache.nodes) == (len(PROMPT) - 1, [0])


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tree_gives_the_bits_of_decoding_one_by_one(family: str, dtype: torch.dtype) -> None:
    """A row depends neither on the other rows, nor on its cache row, nor on how much of its path is committed."""
    model = tiny_model(family, dtype=dtype, **FAMILIES[family])
    speculation = tree()
    cached = CachedModel(model, "target")
    cached.reset(64)
    with cached.attached():
        cached.prefill(PROMPT)
        together = score(cached, speculation, range(7))
        for node in range(7):
            cached.cache.rollback(len(PROMPT))
            for step, token in enumerate(speculation.tokens(speculation.path(node))):
                alone = score(cached, Tree(token, len(PROMPT) + step), [0])
                cached.cache.commit([0])
            assert torch.equal(together[node], alone[0]), node


def test_the_model_is_given_back_as_it_was() -> None:
    model = tiny_model()
    before = eager(model, PROMPT)
    cached = CachedModel(model, "target")
    with cached.attached():
        assert model.config._attn_implementation == "specbranch"
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(eager(model, PROMPT), before)


def test_a_model_that_ignores_the_registered_attention_is_refused() -> None:
    model = tiny_model("falcon")
    with pytest.raises(SpecBranchError, match=r"FalconForCausalLM.*AttentionInterface"):
        CachedModel(model, "target")


def test_a_model_that_skips_the_attention_in_a_layer_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    cached = CachedModel(model, "target")
    cached.reset(16)
    skipped = model.model.layers[1].self_attn
    monkeypatch.setattr(skipped, "forward", lambda hidden_states, **_: (hidden_states, None))
    with cached.attached(), pytest.raises(SpecBranchError, match="1 of 2 layers"):
        cached.prefill(PROMPT)


def test_context_and_capacity_are_checked() -> None:
    cached = CachedModel(tiny_model(max_position_embeddings=20), "draft")
    with pytest.raises(SpecBranchError, match=r"21 tokens; the draft model's context holds 20"):
        cached.reset(21)
    cached.reset(20)
    with cached.attached(), pytest.raises(SpecBranchError, match="no room"):
        cached.prefill([1] * (20 + TREE_ROWS + 1))
