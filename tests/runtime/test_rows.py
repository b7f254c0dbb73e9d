"""Rows that depend on the rows beside them: found at load, run so that they do not, refused or said."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import odd_layers
import pytest
import torch
from implementations import emulated_runtime
from odd_layers import HIDDEN, with_layer
from one_by_one import rows_that_differ
from tiny import tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from specbranch import SpecBranch, SpecBranchError
from specbranch.core.errors import SpecBranchWarning
from specbranch.runtime.model import CachedModel
from specbranch.runtime.rows import judge, probe
from specbranch.runtime.rows.probe import Probe, row_dependence
from specbranch.runtime.rows.routes import ROUTES, RowByRow

# Families beside tiny.FAMILIES whose layers are of other kinds.
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},
    "gemma": {},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**MOE, "num_experts": 4},
    "jetmoe": {},
    "gemma2": {"final_logit_softcapping": 3.0},
}


def model_with(layer: Callable[[], nn.Module], dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    model = tiny_model(dtype=dtype, seed=seed)
    return with_layer(model, layer())


def unrouted(model: PreTrainedModel) -> int:
    """rows_that_differ without what was found out about the model."""
    for module in model.modules():
        ROUTES.pop(module, None)
    return rows_that_differ(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_other_layers_decode_to_the_bit(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype, **FAMILIES[family])
    assert row_dependence(CachedModel(model, "target")) == ""
    assert rows_that_differ(model) == 0


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_texts_of_such_families_are_those_of_plain_decoding(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16, **FAMILIES[family])
    engine = SpecBranch(model, tiny_model(seed=1), threads=1)
    texts = [
        engine.generate([3, 17, 9], max_new_tokens=30, temperature=1.0, seed=2, method=method).tokens
        for method in ("autoregressive", "speculative", "ssd", "specbranch")
    ]
    assert all(text == texts[0] for text in texts)
    assert engine.generate([3], max_new_tokens=2).stats.as_dict()["row_dependent"] == ""


@pytest.mark.parametrize(
    "layer",
    [
        odd_layers.Product,
        odd_layers.Einsum,
        odd_layers.Gate,
        odd_layers.LinearSubclass,
        odd_layers.PickedExperts,
        odd_layers.CallInt8,
        odd_layers.Outliers,
    ],
)
def test_what_depends_on_the_rows_beside_it_is_run_otherwise(layer: Callable[[], nn.Module]) -> None:
    otherwise = 0
    for seed in range(8):  # the last bit of an exponential does not reach every model's logits
        model = model_with(layer, seed=seed)
        assert row_dependence(CachedModel(model, "target")) == ""
        assert rows_that_differ(model) == 0
        otherwise += unrouted(model)
    if layer is not odd_layers.Outliers:  # its values here are no outliers
        assert otherwise > 0


def test_a_product_is_found_where_no_bit_differs() -> None:
    """In bfloat16 a layer so small hardly ever rounds otherwise: it is found by what it calls."""
    model = model_with(odd_layers.Product, torch.bfloat16)
    assert row_dependence(CachedModel(model, "target")) == ""
    assert model.model.layers[0].mlp in ROUTES


@pytest.mark.parametrize("layer", [odd_layers.TokenConvolution, odd_layers.Shift, odd_layers.CallStatistics])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_mixes_tokens_is_refused_by_name(layer: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    with pytest.raises(SpecBranchError, match=r"target model LlamaForCausalLM: .* model\.layers\.0\.mlp.* mixes"):
        SpecBranch(model_with(layer, dtype), tiny_model(seed=1))


def test_what_cannot_run_over_one_row_is_refused() -> None:
    message = r"target model LlamaForCausalLM: a forward .* raised ValueError: Expected more than 1 value"
    with pytest.raises(SpecBranchError, match=message):
        SpecBranch(model_with(odd_layers.BatchNorm), tiny_model(seed=1))
    assert row_dependence(CachedModel(model_with(lambda: odd_layers.BatchNorm(learned=True)), "target")) == ""


def test_a_draft_may_mix_tokens() -> None:
    target, draft = tiny_model(), model_with(odd_layers.TokenConvolution)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine = SpecBranch(target, draft)
    plain = engine.generate([3, 17], max_new_tokens=20, method="autoregressive").tokens
    assert engine.generate([3, 17], max_new_tokens=20, method="ssd").tokens == plain


@pytest.mark.parametrize("layer", [odd_layers.CallInt8, odd_layers.Outliers])
def test_what_is_left_is_said_once_and_in_the_stats(
    layer: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "SMALL", 0)
    model = model_with(layer)
    name = f"{layer.__name__} model.layers.0.mlp (1 of 1)"
    with pytest.warns(SpecBranchWarning, match=r"target LlamaForCausalLM: texts equal .* up to the rounding") as said:
        engine = SpecBranch(model, tiny_model(seed=1))
    assert len(said) == 1
    assert name in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = engine.generate([3, 17], max_new_tokens=4).stats
    assert name in stats.row_dependent
    assert stats.as_dict()["row_dependent"] == stats.row_dependent


def test_one_large_layer_leaves_the_small_ones_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not kept anyway is not paid for."""
    monkeypatch.setattr(judge, "SMALL", 8 * HIDDEN * HIDDEN)
    model = model_with(odd_layers.CallInt8)
    layers = [layer.mlp for layer in model.model.layers]
    layers[1] = model.model.layers[1].mlp = odd_layers.CallInt8()
    assert row_dependence(CachedModel(model, "target")) == ""
    assert all(isinstance(ROUTES[layer], RowByRow) for layer in layers)
    layers[1].register_buffer("more", torch.zeros(2, HIDDEN, HIDDEN))
    for layer in layers:
        layer.forward = odd_layers.CallInt8.forward.__get__(layer)  # another state of the model: it is tried again
    assert "CallInt8 model.layers.0.mlp (1 of 2)" in row_dependence(CachedModel(model, "target"))
    assert not any(isinstance(ROUTES.get(layer), RowByRow) for layer in layers)


def test_it_is_tried_once_per_model_and_again_for_other_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Probe] = []
    run = Probe.run

    def counted(self: Probe) -> str:
        runs.append(self)
        return run(self)

    monkeypatch.setattr(Probe, "run", counted)
    model, draft = tiny_model(), tiny_model(seed=1)
    engines = [SpecBranch(model, draft) for _ in range(3)]
    engines[0].generate([3, 17], max_new_tokens=2)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)  # other values are the same layer
    engines[0].generate([3, 17], max_new_tokens=2)
    assert len(runs) == 1
    with_layer(model, odd_layers.Product())
    texts = [
        engines[1].generate([3, 17], max_new_tokens=20, method=method).tokens for method in ("ssd", "autoregressive")
    ]
    assert texts[0] == texts[1]
    assert len(runs) == 2
    with_layer(model, odd_layers.Shift())
    with pytest.raises(SpecBranchError, match=r"Shift model\.layers\.0\.mlp mixes"):
        engines[2].generate([3, 17], max_new_tokens=2)


def test_a_model_is_let_go() -> None:
    model = model_with(odd_layers.CallInt8)
    SpecBranch(model, tiny_model(seed=1))
    layer = model.model.layers[0].mlp
    before = len(ROUTES), len(probe._tried)
    assert layer in ROUTES
    del model, layer
    gc.collect()
    assert len(ROUTES) < before[0]
    assert len(probe._tried) < before[1]


def test_the_model_is_left_as_it_was() -> None:
    model = model_with(odd_layers.CallInt8)
    layer = model.model.layers[0].mlp
    own = layer.forward = odd_layers.CallInt8.forward.__get__(layer)  # as accelerate's hooks do it
    before = model(torch.tensor([[3, 17, 9]])).logits
    engine = SpecBranch(model, tiny_model(seed=1))
    assert rows_that_differ(model) == 0
    engine.generate([3, 17], max_new_tokens=4)
    assert layer.forward is own
    assert not any("forward" in vars(module) for module in model.modules() if module is not layer)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(torch.tensor([[3, 17, 9]])).logits, before)


@pytest.mark.parametrize("change", ["hooks", "transposed", "parametrized", "weight norm"])
def test_hooks_and_other_kinds_of_weights_of_linear_layers(change: str) -> None:
    model: Any = tiny_model()
    linear = model.model.layers[0].mlp.up_proj
    seen: list[str] = []
    if change == "hooks":
        linear.register_forward_pre_hook(lambda module, args: seen.append("before"))
        linear.register_forward_hook(lambda module, args, output: (seen.append("after"), output * 2)[1])
    elif change == "transposed":
        linear.weight = nn.Parameter(linear.weight.detach().T.contiguous().T)
    elif change == "parametrized":
        torch.nn.utils.parametrize.register_parametrization(linear, "weight", torch.nn.Flatten(1))
        torch.nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.nn.utils.weight_norm(linear)
    assert row_dependence(CachedModel(model, "target")) == ""
    seen.clear()
    assert rows_that_differ(model) == 0
    assert (len(seen) > 0) == (change == "hooks")
    ids = torch.tensor([[3, 17, 9]])
    theirs: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    ours = SpecBranch(model, tiny_model(seed=1)).generate(ids, max_new_tokens=8)
    assert theirs[0, 3:].tolist() == ours.tokens


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_written_in_place_count_from_the_next_text_on(family: str) -> None:
    """GPT-2's lie transposed: they are read from a copy, and `.data` leaves no trace of a change."""
    model, other = tiny_model(family), tiny_model(family, seed=3)
    engine = SpecBranch(model, tiny_model(seed=1))
    engine.generate([3, 17], max_new_tokens=20)
    for weight, new in zip(model.parameters(), other.parameters(), strict=True):
        weight.data.copy_(new.data)
    expected = SpecBranch(other, tiny_model(seed=1)).generate([3, 17], max_new_tokens=20).tokens
    assert engine.generate([3, 17], max_new_tokens=20).tokens == expected


def test_with_a_fixed_number_of_rows_only_their_content_counts() -> None:
    """As in captured steps: a product may use another kernel for another number of rows, a scale may not be shared."""
    cached = CachedModel(tiny_model(), "target")
    assert row_dependence(cached, fixed_rows=32) == ""
    assert row_dependence(CachedModel(model_with(odd_layers.Product), "target"), fixed_rows=32) == ""
    with pytest.raises(SpecBranchError, match="Shift"):
        row_dependence(CachedModel(model_with(odd_layers.Shift), "target"), fixed_rows=32)


class Packed(Tensor):
    """int8 values with a scale per row, which knows linear() only, as such classes do."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Packed:
        made: Packed = torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32, device=values.device)
        return made

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.packed_values, self.scale = values, scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            packed = args[1]
            return func(args[0], packed.packed_values.float() * packed.scale, *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return cls(args[0].packed_values, args[0].scale)
        raise NotImplementedError(f"{func} is not implemented for Packed")


def test_weights_that_are_tensor_subclasses_are_run_by_their_own_forward() -> None:
    model: Any = tiny_model()
    for layer in model.model.layers:
        weight = layer.mlp.up_proj.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        packed = Packed((weight / scale).round().to(torch.int8), scale)
        layer.mlp.up_proj.weight = nn.Parameter(packed, requires_grad=False)
    assert row_dependence(CachedModel(model, "target")) == ""
    assert rows_that_differ(model) == 0
    ids = torch.tensor([[3, 17, 9]])
    theirs: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    engine = SpecBranch(model, tiny_model(seed=1))
    assert engine.generate(ids, max_new_tokens=12).tokens == theirs[0, 3:].tolist()


def test_on_emulated_cuda_kernels() -> None:
    with emulated_runtime():
        assert row_dependence(CachedModel(tiny_model("qwen2"), "target")) == ""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_torchs_dynamic_int8(bundled_pair: SpecBranch) -> None:
    int8 = torch.ao.quantization.quantize_dynamic(bundled_pair.target, {nn.Linear}, dtype=torch.qint8)
    engine = SpecBranch(int8, bundled_pair.draft, tokenizer=bundled_pair.tokenizer)
    plain = engine.generate("def f(", max_new_tokens=40, method="autoregressive").tokens
    assert engine.generate("def f(", max_new_tokens=40, method="ssd", overlap=False).tokens == plain
