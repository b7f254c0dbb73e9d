"""What a model puts into its attention mask, and whatever else it wants of its attention: honoured or refused by name.

Every causal language model of transformers that is small at general sizes either gives the tokens of transformers' own
generate, over a prompt longer than its window, or is refused, on the meta device just as with weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from families import WINDOW, families, family_config, family_model, greedy, nearby
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    create_causal_mask,
    or_masks,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

from specbranch import METHODS, SpecBranch, SpecBranchError
from specbranch.runtime.cache_argument import cache_argument
from specbranch.runtime.masks import probe_ids
from specbranch.runtime.model import CachedModel
from specbranch.runtime.support import Support, check_supported
from specbranch.runtime.windows import FARTHEST, MaskFunction, OtherMask, window_of

PROMPT = [3 + 7 * place * place % 53 for place in range(30)]
BOTH = ["sliding_attention", "full_attention"] * 2

# Families that must run; by night all others are tried too.
# fmt: off
PLAIN = [
    "llama", "qwen2", "qwen3", "qwen3_moe", "qwen2_moe", "phimoe", "mistral", "mixtral", "gemma", "gemma2",
    "gemma3_text", "gemma3n_text", "gemma4_text", "phi", "phi3", "gpt2", "gpt_bigcode", "gpt_neox", "opt",
    "starcoder2", "cohere", "cohere2", "olmo", "olmo2", "olmo3", "olmoe", "granite", "granitemoe", "smollm3",
    "stablelm", "ministral", "ministral3", "exaone4", "glm", "glm4", "glm4_moe", "nemotron", "deepseek_v2",
    "deepseek_v3", "minicpm3", "modernbert-decoder", "biogpt", "seed_oss", "helium", "afmoe", "jetmoe",
]
# fmt: on
RUN: dict[str, dict[str, Any]] = {
    **{family: {} for family in PLAIN},
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": BOTH},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": BOTH},
    "olmo3": {"layer_types": BOTH},
    "bert": {"is_decoder": True},
    "roberta": {"is_decoder": True},
}

NO_INTERFACE = "does not honour transformers' AttentionInterface"
NOT_CAUSAL = (
    "layer 0 .*expected an attention mask of causality and at most a sliding window; position 0 sees position 1"
)
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys(("bloom", "mpt", "falcon", "gptj", "codegen", "gpt_neo", "xglm"), (NO_INTERFACE, {})),
    **dict.fromkeys(("bert", "roberta", "electra"), (NOT_CAUSAL, {})),
    "gemma3_text": (NOT_CAUSAL, {"use_bidirectional_attention": True}),
    "gpt_oss": ("layer 0 .GptOssAttention. uses attention sinks", {}),
    "doge": ("layer 0 .DogeAttention.: .*the model makes or changes it itself", {}),
    "diffllama": ("called the registered attention in 8 of 4 layers", {}),
    "moshi": (f"layer 0 .MoshiAttention.: transformers keeps {WINDOW} tokens for it", {}),
    "llama4_text": ("chunked_attention layers, which cannot roll back", {}),
    "mamba": ("linear_attention layers, which cannot roll back", {}),
}


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def asked(model: PreTrainedModel) -> Support | str:
    """What `check_supported` says."""
    try:
        return check_supported(model, "target")[0]
    except SpecBranchError as error:
        return str(error)


def same_text(model: PreTrainedModel, methods: tuple[str, ...] = ("ssd",), tokens: int = 8) -> None:
    """Every method gives the tokens of transformers' generate, with a draft that is often wrong."""
    expected = greedy(model, PROMPT, tokens)
    engine = SpecBranch(model, nearby(model, 0.02), threads=1, overlap=False)
    for method in methods:
        assert engine.generate(PROMPT, max_new_tokens=tokens, method=method).tokens == expected, method


@pytest.mark.parametrize("family", sorted(set(RUN) & set(families())))
def test_a_family_gives_the_tokens_of_transformers(family: str) -> None:
    config = family_config(family, **RUN[family])
    model = family_model(config)
    assert isinstance(support := asked(model), Support), support
    assert asked(on_meta(config)) == support
    same_text(model)


@pytest.mark.parametrize("family", sorted(set(REFUSED) & set(families())))
def test_a_family_is_refused_by_name(family: str) -> None:
    reason, more = REFUSED[family]
    config = family_config(family, **more)
    model = family_model(config)
    message = asked(model)
    if reason == NO_INTERFACE and isinstance(message, Support):  # newer transformers, where it honours it
        same_text(model)
        return
    assert isinstance(message, str)
    assert re.search(f"target model {type(model).__name__}.*{reason}", message), message
    assert asked(on_meta(config)) == message
    with pytest.raises(SpecBranchError, match=re.escape(message)):
        SpecBranch(model)


@pytest.mark.nightly
@pytest.mark.parametrize("family", families())
def test_any_family_gives_the_tokens_of_transformers_or_is_refused(family: str) -> None:
    config = family_config(family)
    model = family_model(config)
    support = asked(model)
    assert asked(on_meta(config)) == support
    if isinstance(support, Support):
        same_text(model, METHODS, 12)


# ---- Windows


@pytest.mark.parametrize(
    ("family", "more", "windows"),
    [
        ("phimoe", {}, (WINDOW, WINDOW, WINDOW, WINDOW)),
        ("qwen2_moe", {"layer_types": BOTH}, (WINDOW, None, WINDOW, None)),
    ],
)
def test_a_window_that_is_only_in_the_mask_is_applied(
    family: str, more: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    """It makes a difference: a wider one gives another text."""
    model = family_model(family_config(family, **more))
    wide = family_model(family_config(family, **more, sliding_window=100))
    assert check_supported(model, "target")[0].windows == windows
    assert greedy(model, PROMPT, 16) != greedy(wide, PROMPT, 16)
    same_text(model, METHODS, 16)


def test_a_window_that_is_handed_over_and_not_in_the_mask_is_not_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model(family_config("mistral"))
    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", create_causal_mask)
    monkeypatch.setattr("specbranch.runtime.support.DynamicCache", lambda config: EmptyCache())
    assert check_supported(model, "target")[0].windows == (None,) * 4


class EmptyCache:
    layers: tuple[()] = ()


def test_a_model_on_several_devices_is_asked_on_the_meta_device() -> None:
    model = family_model(family_config("phimoe"))
    vars(model)["hf_device_map"] = {"model.layers.0": 0, "model.layers.1": 1}
    support, logits = check_supported(model, "target")
    assert support.windows == (WINDOW,) * 4
    assert logits is not None  # they are the model's own
    with torch.no_grad():
        torch.testing.assert_close(logits, model(probe_ids(model)[None]).logits[0])


def prefix(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (query < 6) & (key < 6)


def strided(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (query - key) % 3 != 2


def needs_values(batch: Any, head: Any, query: Any, key: Any) -> Any:
    raise RuntimeError("no such position")


def ask(function: MaskFunction, use_vmap: bool = False, **config: Any) -> int | None:
    return window_of(function, PretrainedConfig(**config), use_vmap, torch.device("cpu"))


@pytest.mark.parametrize("limit", [None, 2, 64, 131072])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 33, 4096, 100_000])
@pytest.mark.parametrize("use_vmap", [False, True])
def test_the_window_of_a_mask_is_found(window: int | None, limit: int | None, use_vmap: bool) -> None:
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    seen = window is not None and window < (limit or FARTHEST)  # within the context
    assert ask(function, use_vmap, max_position_embeddings=limit) == (window if seen else None)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (bidirectional_mask_function, "position 0 sees position 1"),
        (or_masks(causal_mask_function, prefix), "position 0 sees position 1"),
        (and_masks(causal_mask_function, strided), "does not see"),
        (chunked_causal_mask_function(512, torch.zeros(1, dtype=torch.int64)), "sees position|does not see position"),
        (sliding_window_overlay(8), "position 0 sees position 1"),
        (needs_values, "cannot be asked about positions: RuntimeError: no such position"),
    ],
)
def test_another_mask_is_told_apart(function: MaskFunction, reason: str) -> None:
    with pytest.raises(OtherMask, match=reason):
        ask(function, max_position_embeddings=4096)


def test_a_turn_at_a_number_of_the_configuration_is_found() -> None:
    def late(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return causal_mask_function(batch, head, query, key) | ((query == 3001) & (key == 3002))

    assert ask(late, max_position_embeddings=4096) is None
    with pytest.raises(OtherMask, match="position 3001 sees position 3002"):
        ask(late, max_position_embeddings=4096, prefix_length=3001)


# ---- What else a model may do


def patched_mask(monkeypatch: pytest.MonkeyPatch, **more: Any) -> PreTrainedModel:
    monkeypatch.setattr(modeling_llama, "create_causal_mask", partial(create_causal_mask, **more))
    return family_model(family_config("llama"))


def test_a_prefix_that_is_not_causal_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched_mask(monkeypatch, or_mask_function=prefix)
    with pytest.raises(SpecBranchError, match=r"layer 0 \(LlamaAttention\).*position 0 sees position 1"):
        SpecBranch(model)


def test_packed_sequences_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched_mask(monkeypatch, and_mask_function=lambda batch, head, query, key: query // 9 == key // 9)
    with pytest.raises(SpecBranchError, match=r"position 9 (does not see position 0|sees position 9)|position \d+ "):
        SpecBranch(model)


def attention_with(monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> PreTrainedModel:
    """A Llama whose attention layers change their arguments."""
    model = family_model(family_config("llama"))
    for layer in model.model.layers:
        forward = layer.self_attn.forward

        def changed(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            change(kwargs)
            return forward(*args, **kwargs)

        monkeypatch.setattr(layer.self_attn, "forward", changed)
    return model


def test_arguments_of_the_attention_that_are_not_known_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attention_with(monkeypatch, lambda kwargs: kwargs.update(position_bias=torch.zeros(1)))
    with pytest.raises(SpecBranchError, match=r"layer 0 \(LlamaAttention\) hands position_bias to the attention"):
        SpecBranch(model)


def test_a_mask_of_the_models_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def double(kwargs: dict[str, Any]) -> None:
        kwargs["attention_mask"] = kwargs["attention_mask"].clone()

    model = attention_with(monkeypatch, double)
    with pytest.raises(SpecBranchError, match="the model makes or changes it itself"):
        SpecBranch(model)
    model = attention_with(monkeypatch, lambda kwargs: kwargs.update(attention_mask=None))
    with pytest.raises(SpecBranchError, match="there is none"):
        SpecBranch(model)


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_does_not_go_by_its_positions_is_refused(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, spread: bool
) -> None:
    """It counts from the length of its cache."""
    model = family_model(family_config("llama"))
    model.to(dtype)  # type: ignore[arg-type]
    if spread:
        vars(model)["hf_device_map"] = {"model.layers.0": 0, "model.layers.1": 1}
    forward = model.model.forward

    def counted(input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> Any:
        places = torch.arange(input_ids.shape[1])[None] + kwargs[cache_argument(type(model))].get_seq_length()
        return forward(input_ids, position_ids=places, **kwargs)

    monkeypatch.setattr(model.model, "forward", counted)
    check_supported(model, "target")
    with pytest.raises(
        SpecBranchError, match=r"draft model LlamaForCausalLM: over a tree of tokens its logits are \d+%"
    ):
        CachedModel(model, "draft")


def test_attention_that_is_scaled_by_the_length_of_the_cache_is_refused() -> None:
    config = family_config(
        "llama4_text", layer_types=["full_attention"] * 4, no_rope_layers=[1, 0, 1, 0], floor_scale=16
    )
    with pytest.raises(SpecBranchError, match="Llama4ForCausalLM: over a tree of tokens its logits are"):
        CachedModel(family_model(config), "target")


def test_attention_that_is_scaled_by_the_position_runs() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    more = {"llama_4_scaling_beta": 0.5, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    same_text(family_model(family_config("ministral3", rope_parameters=rope | more)))


def test_a_model_without_position_ids_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family_model(family_config("llama"))
    monkeypatch.setattr(type(model), "forward", lambda self, input_ids, **kwargs: None)
    with pytest.raises(SpecBranchError, match="takes no position_ids"):
        SpecBranch(model)


def test_rounding_that_a_model_blows_up_is_no_reason_to_refuse_it() -> None:
    """32 layers of large random weights, in 16 bits."""
    model = family_model(family_config("hrm_text", initializer_range=0.3))
    model.to(torch.bfloat16)  # type: ignore[arg-type]
    CachedModel(model, "target")


def test_a_model_that_asks_for_values_is_not_refused_for_want_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    config = family_config("llama")
    model = family_model(config)
    kind = type(model.model.norm)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, states: forward(self, states + float(states.mean() > 1e9)))
    assert asked(on_meta(config)) == asked(model) == Support()


def test_asking_leaves_the_model_as_it_was() -> None:
    model = family_model(family_config("phimoe"))
    model.train()
    model.model.layers[1].eval()
    training = [module.training for module in model.modules()]
    implementation = model.config._attn_implementation
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    CachedModel(model, "target")
    assert [module.training for module in model.modules()] == training
    assert model.config._attn_implementation == implementation
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
