"""Rotary embeddings of every kind: every row of a forward has the angles of transformers' one-by-one decoding, and a
text that crosses the switch of dynamic NTK or longrope is transformers' own."""

from __future__ import annotations

import copy
from importlib.metadata import version
from typing import Any

import pytest
import torch
from families import greedy, nearby
from rotary_models import KINDS, SHORT, SWITCH, model_with, phi, rope
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from specbranch import METHODS, SpecBranch
from specbranch.runtime.attention import TreeContext, run_in
from specbranch.runtime.exact import exact_forward
from specbranch.runtime.graphs.probe import why_not_captured
from specbranch.runtime.model import CachedModel
from specbranch.runtime.rotary import chooses_by_length, context_length, kinds_by_length, rereads

BY_LENGTH = ("dynamic", "longrope")
PROMPTS = (SWITCH - 5, SWITCH, SWITCH + 4)  # tokens: the text crosses, begins just before, begins behind
NEW = 14


def prompt_of(tokens: int) -> list[int]:
    return [3 + 7 * place * place % 53 for place in range(tokens)]


def text_of(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """transformers' greedy tokens, on a model that has not decoded before.

    At a switch where the text is read anew: as a prompt. (generate() of transformers 5.17 forgets all but the last
    token there, and has no angles behind the switch of a longrope that is one layer type's; ours does as later ones.)
    """
    until = SWITCH + 1 - len(prompt) if rereads(model) else 0
    try:
        first = greedy(copy.deepcopy(model), prompt, min(until, NEW)) if until > 0 else []
        more = NEW - len(first)
        text = first + (greedy(copy.deepcopy(model), prompt + first, more) if more else [])
    except UnboundLocalError:
        return SpecBranch(model, threads=1).generate(prompt, max_new_tokens=NEW, method="autoregressive").tokens
    if version("transformers") >= "5.23":
        assert text == greedy(copy.deepcopy(model), prompt, NEW)
    return text


def check_texts(
    model: PreTrainedModel, prompts: tuple[int, ...] = PROMPTS, overlaps: tuple[bool, ...] = (False, True)
) -> None:
    """Every method gives the tokens of transformers' generate, and leaves the rotary embeddings as they are."""
    before = [states(module) for module in model.modules()]
    engine = SpecBranch(model, nearby(model, 0.01), threads=1)
    for prompt in map(prompt_of, prompts):
        expected = text_of(model, prompt)
        for method in METHODS:
            for overlap in overlaps:
                found = engine.generate(prompt, max_new_tokens=NEW, method=method, overlap=overlap)
                assert found.tokens == expected, (len(prompt), method, overlap)
                assert found.stats.accepted <= found.stats.verified
    for module, state in zip(model.modules(), before, strict=True):
        assert states(module).keys() == state.keys()
        assert all(torch.equal(*map(torch.as_tensor, (states(module)[name], value))) for name, value in state.items())


def states(module: nn.Module) -> dict[str, Any]:
    """Everything that a rotary embedding keeps, but what cannot change."""
    if not hasattr(module, "rope_type"):
        return {}
    values = {**vars(module), **module._buffers}
    return {name: copy.deepcopy(value) for name, value in values.items() if isinstance(value, Tensor | int | float)}


def test_there_is_a_decision_for_every_kind() -> None:
    """A kind that is new in transformers: static, or does it choose by the length of the text?"""
    assert {"default", *ROPE_INIT_FUNCTIONS} <= set(KINDS)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in {"default", *ROPE_INIT_FUNCTIONS}])
def test_a_text_across_the_switch_is_that_of_transformers(kind: str) -> None:
    model = model_with("llama", rope(kind))
    static = kind not in BY_LENGTH
    assert kinds_by_length(model) == ([] if static else [kind])
    assert rereads(model) == ()
    check_texts(model, *((PROMPTS[:1], (False,)) if static else ()))


@pytest.mark.parametrize("family", ["phi3", "phimoe"])
def test_a_text_is_read_anew_where_transformers_does(family: str) -> None:
    model = phi(family)
    assert rereads(model) == (SWITCH + 1,)
    check_texts(model)


@pytest.mark.parametrize(("near", "far"), [("default", "longrope"), ("longrope", "dynamic"), ("linear", "yarn")])
def test_layers_with_embeddings_of_their_own(near: str, far: str) -> None:
    parameters = {"sliding_attention": rope(near), "full_attention": rope(far)}
    layers = ["sliding_attention", "full_attention"]
    model = model_with("gemma3_text", parameters, layer_types=layers, sliding_window=17)
    assert kinds_by_length(model) == sorted({near, far} & set(BY_LENGTH))
    check_texts(model, PROMPTS[:1], (False,))


@pytest.mark.parametrize("model", [model_with("llama", rope("dynamic", factor=1.0)), phi(long_factor=SHORT)])
def test_the_switch_changes_these_texts(model: PreTrainedModel) -> None:
    """Else the tests above would show nothing: the same weights without a switch give other tokens."""
    switching = (
        phi() if "original_max_position_embeddings" in vars(model.config) else model_with("llama", rope("dynamic"))
    )
    for length in PROMPTS:
        texts = [text_of(each, prompt_of(length)) for each in (model, switching)]
        assert texts[0] != texts[1], length


def test_no_round_passes_a_switch_and_both_models_read_anew() -> None:
    model = phi()
    engine = SpecBranch(model, copy.deepcopy(model), threads=1)
    stats = engine.generate(prompt_of(SWITCH - 5), max_new_tokens=NEW, method="speculative", overlap=False).stats
    ends = [SWITCH - 5 + sum(round.tokens for round in stats.log[: place + 1]) for place in range(len(stats.log))]
    assert SWITCH + 1 in ends, ends
    assert stats.accepted == stats.verified  # the draft is the target, and goes on being it
    draft = engine.pair.draft
    assert draft is not None
    assert engine.pair.target.model.prompt_end == draft.model.prompt_end == SWITCH


@pytest.mark.parametrize("length", PROMPTS)
def test_a_draft_that_is_the_target_is_always_right(length: int) -> None:
    for model in (model_with("llama", rope("dynamic")), model_with("llama", rope("longrope")), phi()):
        engine = SpecBranch(model, copy.deepcopy(model), threads=1)
        stats = engine.generate(prompt_of(length), max_new_tokens=NEW, method="speculative", overlap=False).stats
        assert 0 < stats.accepted == stats.verified


def test_a_second_text_starts_before_the_switch_again() -> None:
    """Also on a model that transformers left behind it."""
    for model in (model_with("llama", rope("dynamic")), phi()):
        prompt = prompt_of(6)
        expected = greedy(copy.deepcopy(model), prompt, 4)
        greedy(model, prompt_of(SWITCH + 9), 2)
        engine = SpecBranch(model, threads=1)
        for length in (6, SWITCH + 9, 6):
            tokens = engine.generate(prompt_of(length), max_new_tokens=4, method="autoregressive").tokens
            assert length != 6 or tokens == expected


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_rows_of_several_lengths_have_the_angles_of_one_by_one(kind: str) -> None:
    model = model_with("llama", rope(kind))
    module = model.model.rotary_emb
    forward = exact_forward(module, torch.device("cpu"))
    assert forward is not None
    x = torch.zeros(1, 1, 1)

    def alone(position: int, end: int) -> Tensor:
        """Of a row whose text ends at `end`, as a new module gives it."""
        cos, sin = copy.deepcopy(module)(x, torch.tensor([[position, end]]))
        return torch.cat([cos[0, 0], sin[0, 0]])

    positions = [SWITCH - 3, SWITCH - 1, SWITCH, SWITCH - 2, SWITCH + 7, SWITCH + 1, SWITCH]
    for prompt_end in (SWITCH - 4, SWITCH - 1, SWITCH, SWITCH + 3):
        context = TreeContext(torch.tensor(0), prompt_end=prompt_end)
        parts = run_in(context, forward, x=x, position_ids=torch.tensor([positions]))
        angles = torch.cat([part[0] for part in parts], -1)
        for row, position in zip(angles, positions, strict=True):
            assert torch.equal(row, alone(position, max(position, prompt_end))), (prompt_end, position)
    together = torch.cat([part[0] for part in forward(x, torch.tensor([positions]))], -1)  # outside of our forwards
    assert torch.equal(together[0], alone(positions[0], max(positions)))


def test_static_embeddings_run_their_own_forward() -> None:
    model = model_with("llama", rope("yarn"))
    assert not any(chooses_by_length(module) for module in model.modules())
    assert exact_forward(model.model.rotary_emb, torch.device("cuda")) is None


def test_a_model_that_chooses_by_length_is_not_captured() -> None:
    reason = "its rotary embedding (longrope) chooses its frequencies by the length of the text"
    assert why_not_captured(phi()) == reason


def test_dynamic_scaling_begins_where_the_context_of_others_ends() -> None:
    assert context_length(model_with("llama", rope("dynamic")).config) == 4 * SWITCH
    assert context_length(model_with("llama", rope("linear")).config) == 4 * SWITCH
    cached = CachedModel(model_with("llama", rope("dynamic", factor=2.0)), "target")
    assert context_length(cached.model.config) == 2 * SWITCH
    cached.reset(2 * SWITCH)
