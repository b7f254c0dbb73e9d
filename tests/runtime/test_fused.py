"""Fused layers: the same values in fewer kernels, found by the modules' code, and left where they differ."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import family_config, family_model, greedy
from tiny import FAMILIES, PROMPT, tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from specbranch import SpecBranch
from specbranch.runtime.attach import Attachment
from specbranch.runtime.attention import TreeContext
from specbranch.runtime.batch import Inputs
from specbranch.runtime.cache import Buffers
from specbranch.runtime.exact import exact_forward
from specbranch.runtime.forwards import forwards_of
from specbranch.runtime.fused import layer, norms
from specbranch.runtime.fused.code import same_class, same_code
from specbranch.runtime.fused.forward import DIFFERENT, fused_of
from specbranch.runtime.fused.join import join_model
from specbranch.runtime.fused.layer import Layer
from specbranch.runtime.fused.report import fused_report, kernels_of_step
from specbranch.runtime.model import CachedModel
from specbranch.runtime.rows.probe import row_dependence
from specbranch.runtime.support import meta_twin

WHOLE = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3")
"""Families whose layers are fused whole."""
PARTS = ("gpt_neox", "phi", "granite", "cohere", "olmo2", "qwen3_moe", "mixtral")
"""Families whose layers are fused in parts, or with an MLP of another kind."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tree_logits(model: PreTrainedModel, attachment: Attachment | None = None, rows: int = 5) -> Tensor:
    """Logits over a prompt's end and a few nodes of a tree behind it."""
    cached = CachedModel(model, "target")
    attachment = attachment or Attachment([model])

    def forward() -> Tensor:
        cached.reset(64)
        cached.prefill(PROMPT)
        parents = [-1, 0, 0, 1, 2][:rows]
        positions = [len(PROMPT) + depth for depth in (0, 1, 1, 2, 2)][:rows]
        batch = cached.place(range(rows), parents, [5, 9, 2, 7, 7][:rows], positions)
        return cached.forward(Inputs.of([batch], cached.device))

    return attachment.turn(forward)


def tiny_family(family: str, dtype: torch.dtype) -> PreTrainedModel:
    model: Any = family_model(family_config(family)).to(dtype)  # type: ignore[arg-type]
    return model


def own_layers(model: PreTrainedModel) -> Attachment:
    return Attachment([model], forward_of=exact_forward)


class Watching(TorchDispatchMode):
    """Looks at operators and does nothing about them: so layers are run op by op."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def layers_of(model: PreTrainedModel) -> Iterator[nn.Module]:
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return iter(lists[0])


# ---- How many kernels


@pytest.mark.parametrize("family", WHOLE)
def test_a_layer_is_ten_kernels_or_twelve_and_the_rest_of_a_step_sixteen_at_most(family: str) -> None:
    counts = {}
    for layers in (2, 4):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(family_config(family, num_hidden_layers=layers))
        counts[layers] = kernels_of_step(CachedModel(meta_twin(model, torch.bfloat16), "draft"))
    each, own = ((counts[4][name] - counts[2][name]) / 2 for name in ("fused", "as_they_are"))
    assert each == (12 if family in ("gemma2", "gemma3_text") else 10)  # two more norms
    assert own >= 36
    assert counts[2]["fused"] - 2 * each <= 16


# ---- What is computed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("family", [*WHOLE, *PARTS])
def test_a_fused_layer_gives_what_the_modules_give(family: str, joined: bool, dtype: torch.dtype) -> None:
    model = tiny_family(family, dtype)
    if joined:
        join_model(model)
    fused, own = tree_logits(model), tree_logits(model, own_layers(model))
    assert not [DIFFERENT[module] for module in model.modules() if module in DIFFERENT]
    whole = fused_report(model)["layers"] == "4 of 4"
    assert whole == (family in WHOLE or family in ("qwen3_moe", "mixtral"))
    apart = ((fused.float() - own.float()).norm() / own.float().norm()).item()
    assert apart <= {torch.float32: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.01}[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("family", WHOLE)
def test_one_call_for_a_layer_has_the_bits_of_its_ops(family: str, joined: bool, dtype: torch.dtype) -> None:
    model = tiny_family(family, dtype)
    if joined:
        join_model(model)
    fused = [fused_of(module) for module in layers_of(model)]
    assert all(isinstance(each, Layer) and each.bound is not None for each in fused)
    in_one_call = tree_logits(model)
    with Watching():
        op_by_op = tree_logits(model)
    assert torch.equal(in_one_call, op_by_op)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("family", WHOLE)
def test_a_layer_over_rows_of_two_texts_has_the_bits_of_each_alone(family: str, watched: bool) -> None:
    model = tiny_family(family, torch.float32)
    fused = fused_of(next(layers_of(model)))
    assert isinstance(fused, Layer)
    attention, generator = fused.parts.attention, torch.Generator().manual_seed(5)
    buffers = torch.randn(2, attention.heads[1], 64, attention.width, generator=generator)
    hidden = torch.randn(1, 5, model.config.hidden_size, generator=generator)
    cos, sin = torch.randn(2, 1, 5, attention.width, generator=generator)
    starts, prefixes, ancestors = torch.tensor([3, 20]), torch.tensor([6, 9]), torch.tensor([[1], [3], [1], [2], [5]])
    rows = torch.tensor([9, 10, 29, 30, 31])

    def run(own: slice, first: int, context: TreeContext) -> Tensor:
        cache = Buffers(4, 64)
        cache.rows = rows[own] - first
        for buffer, values in zip(attention.buffers(cache, hidden), buffers, strict=True):
            buffer[:, : 64 - first] = values[:, first:]
        with Watching() if watched else contextlib.nullcontext():
            return fused(hidden[:, own], (cos[:, own], sin[:, own]), cache, context)

    sequence = torch.tensor([0, 0, 1, 1, 1])
    both = run(slice(0, 5), 0, TreeContext(prefixes, ancestors, starts=starts, sequence=sequence))
    for q, own in enumerate((slice(0, 2), slice(2, 5))):
        assert torch.equal(both[:, own], run(own, int(starts[q]), TreeContext(prefixes[q], ancestors[own])))


@pytest.mark.parametrize("family", [*WHOLE, *PARTS])
def test_rows_stay_independent(family: str) -> None:
    model = family_model(family_config(family))
    assert row_dependence(CachedModel(model, "target")) == ""
    several, one = tree_logits(model, rows=5), tree_logits(model, rows=1)
    assert torch.equal(several[0], one[0])


@pytest.mark.parametrize("family", [*WHOLE, *PARTS])
def test_tokens_are_those_of_transformers(family: str) -> None:
    model = family_model(family_config(family))
    engine = SpecBranch(model, copy.deepcopy(model))
    for method in ("autoregressive", "specbranch"):
        found = engine.generate(PROMPT, max_new_tokens=20, temperature=0, method=method)
        assert found.tokens == greedy(model, PROMPT, 20)


@pytest.mark.parametrize("family", ["qwen2-sliding", "gemma3_text", "mistral"])
def test_layers_with_a_window_see_no_further(family: str) -> None:
    model = tiny_model(family.split("-")[0], **FAMILIES[family])
    assert torch.allclose(tree_logits(model), tree_logits(model, own_layers(model)), rtol=1e-4, atol=1e-4)


# ---- What is known, and what is not


def test_known_is_who_has_the_code_whatever_names_it_gives_to_variables() -> None:
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

    assert same_class(Qwen2RMSNorm, "llama.LlamaRMSNorm")
    assert same_class(Qwen2MLP, "llama.LlamaMLP")  # it calls its argument otherwise
    assert same_class(Gemma2RMSNorm, "gemma.GemmaRMSNorm")
    assert not same_class(Gemma2RMSNorm, "llama.LlamaRMSNorm")
    assert not same_class(CohereLayerNorm, "llama.LlamaRMSNorm")
    assert not same_class(Qwen2MLP, "llama.LlamaThatThereIsNot")
    assert not same_class(Qwen2MLP, "nobody.NobodysMLP")


def test_code_that_means_something_else_is_not_the_same() -> None:
    def scaled(x: Any) -> Any:
        return x * 2.0

    def scaled_more(x: Any) -> Any:
        return x * 3.0

    from transformers.models.llama.modeling_llama import rotate_half
    from transformers.models.qwen2.modeling_qwen2 import rotate_half as other

    assert same_code(other, rotate_half)
    assert not same_code(scaled, rotate_half)
    assert not same_code(scaled, scaled_more)  # nor are these of transformers
    assert not same_code(None, rotate_half)


def test_a_decorated_forward_is_known_by_what_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers decorates those of attention layers since 5.24; their rotary function stands in what was written."""
    model = family_model(family_config("llama"))
    kind = type(next(layers_of(model)).self_attn)
    written = kind.forward

    @functools.wraps(written)
    def decorated(*args: Any, **kwargs: Any) -> Any:
        return written(*args, **kwargs)

    monkeypatch.setattr(kind, "forward", decorated)
    assert all(isinstance(fused_of(layer), Layer) for layer in layers_of(model))


def test_a_forward_that_somebody_put_into_a_class_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    before = tree_logits(model)
    kind = type(model.model.norm)
    own = kind.forward
    assert fused_of(model.model.norm) is not None
    monkeypatch.setattr(kind, "forward", lambda self, states: 2 * own(self, states))
    assert fused_of(model.model.norm) is None
    assert not torch.allclose(tree_logits(tiny_model()), before)


@pytest.mark.parametrize("inner", ["mlp", "self_attn", "input_layernorm", "mlp.down_proj", "self_attn.q_proj"])
def test_a_hook_within_a_layer_is_called(inner: str) -> None:
    model = tiny_model()
    calls: list[nn.Module] = []
    module = model.model.layers[1].get_submodule(inner)
    handle = module.register_forward_hook(lambda module, args, output: calls.append(module))
    hooked = tree_logits(model)
    assert module in calls
    handle.remove()
    calls.clear()
    assert torch.allclose(tree_logits(model), hooked, rtol=1e-5, atol=1e-5)
    assert not calls


def test_what_differs_is_left_as_it_is_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(initializer_range=0.2)
    own = tree_logits(model, own_layers(model))
    other = tiny_model(initializer_range=0.2)
    kinds = {**norms.KINDS, "llama.LlamaRMSNorm": ("variance_epsilon", True, False)}  # as if it meant another norm
    with monkeypatch.context() as patch:
        patch.setattr(norms, "KINDS", kinds)
        assert torch.allclose(tree_logits(other), own, rtol=1e-4, atol=1e-4)
        report = fused_report(other)
    assert report["layers"] == "0 of 2"
    assert any("its fused forward is" in text and "off" in text for text in report["as_they_are"])
    assert fused_report(model)["layers"] == "2 of 2"


def test_a_fused_forward_that_raises_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise ValueError("a shape that nobody thought of")

    model = tiny_model()
    monkeypatch.setattr(layer.Layer, "__call__", fails)
    CachedModel(model, "target")
    assert all("nobody thought of" in DIFFERENT[each] for each in model.model.layers)
    assert fused_of(model.model.layers[0].self_attn) is not None  # what is within still may be


def test_other_forwards_of_an_attached_model_are_its_own() -> None:
    model = tiny_model()
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        expected = model(ids).logits
        CachedModel(model, "target")
        with Attachment([model]).attached():
            attached = model(ids).logits
    assert torch.allclose(attached, expected, rtol=1e-4, atol=1e-4)


def test_every_layer_of_an_attached_model_is_put_back() -> None:
    model = tiny_model()
    with Attachment([model]).attached():
        assert all("forward" in vars(each) for each in model.model.layers)
    assert not any("forward" in vars(module) for module in model.modules())
    replaced = dict(forwards_of(model.modules(), torch.device("cpu")))
    assert {model, model.model.norm, *model.model.layers} <= replaced.keys()
