"""Joined weights: one product for layers over the same input, and nothing held twice."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import PROMPT, tiny_model
from transformers import AutoModelForCausalLM

from specbranch import SpecBranch, bundled
from specbranch.runtime.fused.attention import attention_of
from specbranch.runtime.fused.join import groups, join_model
from specbranch.runtime.fused.joined import join, joined
from specbranch.runtime.fused.mlp import mlp_of
from specbranch.runtime.packed import PackedLinear
from specbranch.runtime.packing import pack_model

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}


def memory(model: Any) -> int:
    """Bytes of all storages."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def products(model: Any) -> tuple[int, int]:
    """How many products give queries, keys and values, and gate and up."""
    attention, mlp = attention_of(model.model.layers[0].self_attn), mlp_of(model.model.layers[0].mlp)
    assert attention is not None
    assert mlp is not None
    return len(attention.inputs), 1 + (mlp.up is not None)


def test_a_joined_model_is_what_it_was(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    parameters, bytes_before = dict(model.named_parameters()), memory(model)
    values = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert products(model) == (3, 2)
    join_model(model)
    assert products(model) == (1, 1)
    assert memory(model) == bytes_before
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(weight is parameters[name] for name, weight in model.named_parameters())
    assert all(torch.equal(weight, values[name]) for name, weight in model.state_dict().items())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(weight, values[name]) for name, weight in again.state_dict().items())
    twin = copy.deepcopy(model)  # whose parameters have memory of their own each
    assert products(twin) == (3, 2)
    assert memory(twin) == bytes_before


def test_what_is_changed_in_place_is_read_and_what_is_replaced_is_not_joined() -> None:
    model = tiny_model("qwen2")
    join_model(model)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.k_proj.weight.mul_(2)
    fused = attention_of(attention)
    assert fused is not None
    hidden = torch.randn(1, 3, 32)
    _, key, _ = fused.projected(hidden)
    assert torch.allclose(key.flatten(1), attention.k_proj(hidden)[0], rtol=1e-5, atol=1e-5)
    attention.k_proj.weight = torch.nn.Parameter(attention.k_proj.weight.clone())
    assert products(model)[0] == 3
    join_model(model)
    assert products(model)[0] == 1


def test_layers_of_several_kinds_stay_apart() -> None:
    a, b = torch.nn.Linear(4, 3), torch.nn.Linear(4, 5)
    join([a, b.double()])
    assert joined([a, b]) is None
    b = torch.nn.Linear(5, 5)
    join([a, b])
    assert joined([a, b]) is None


@pytest.mark.parametrize("word", ["lossless", "int8", "int4"])
def test_packed_weights_are_packed_behind_each_other(word: str) -> None:
    model = tiny_model("qwen2", dtype=torch.bfloat16, **SIZES)
    apart = copy.deepcopy(model)
    pack_model(model, "draft", word)
    assert products(model) == (1, 1)
    for layers in groups(apart):
        for layer in layers:  # by itself
            layer.weight.data = layer.weight.data.clone()
    hidden = torch.randn(1, 3, 64).bfloat16()
    for one, other in zip(groups(model), groups(apart), strict=True):
        together = joined(one)
        assert together is not None
        for packed, dense in zip(one, other, strict=True):
            assert type(packed) is PackedLinear
            if word == "lossless":
                assert torch.equal(packed.values(), dense.weight)
            assert torch.equal(packed(hidden), PackedLinear(packed.packed_weight, packed.bias)(hidden))
        assert together.numel() <= sum(packed.packed.numel() for packed in one)
    twin = copy.deepcopy(model)
    assert products(twin) == (1, 1)
    assert memory(twin) == memory(model)


def test_what_is_loaded_is_joined_and_what_is_handed_over_is_not() -> None:
    paths = bundled.path("target"), bundled.path("draft")
    loaded = SpecBranch.from_pretrained(*paths)
    assert [products(model) for model in loaded.pair.models] == [(1, 1), (1, 1)]
    handed = [AutoModelForCausalLM.from_pretrained(path) for path in paths]
    own = SpecBranch(*handed)
    assert [products(model) for model in handed] == [(3, 2), (3, 2)]
    texts = [engine.generate(PROMPT, max_new_tokens=12, temperature=0).tokens for engine in (loaded, own)]
    assert texts[0] == texts[1]
