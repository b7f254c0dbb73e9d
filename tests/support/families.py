"""Tiny random models of every causal language model family of transformers, as far as general sizes make one."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

WINDOW = 12
MANY = 3_000_000  # parameters: a family that the sizes below do not make small

# What configurations call their sizes; each takes those that it knows.
SIZES: dict[str, Any] = {
    **{"vocab_size": 64, "vocab_size_per_layer_input": 64, "max_position_embeddings": 128, "n_positions": 128},
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "decoder_ffn_dim", "ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **{"encoder_layers": 1, "encoder_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    **{"n_group": 1, "topk_group": 1, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 24},
    **{"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    **{"initializer_range": 0.2, "tie_word_embeddings": False},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "decoder_start_token_id": 1},
}

MORE: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_heads": 4, "window_size": WINDOW},
    "gemma3n_text": {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [48] * 4},
    "llama4_text": {"attention_chunk_size": WINDOW},
}


# What these sizes do not make: models with more inputs than a text, encoders and decoders, state spaces, and a few
# whose configurations want more numbers than these.
# fmt: off
NOT_MADE = {
    "bailing_hybrid", "bamba", "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "blt",
    "cohere_compass_text", "cpmant", "dbrx", "dots1", "dots3_note", "dots3_note_text", "emu3", "fuyu", "gemma3",
    "gemma3n", "gemma4", "gemma4_assistant", "gemma4_unified", "gemma4_unified_assistant", "git", "got_ocr2",
    "granitemoehybrid", "jamba", "kimi_linear", "lfm2_moe", "llama4", "longcat_flash", "mamba2", "marian", "mbart",
    "mllama", "moss_transcribe_diarize", "musicgen", "musicgen_melody", "mvp", "pegasus", "phi4_multimodal",
    "plbart", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "qwen4_exp_text", "reformer", "roc_bert", "whisper", "xlstm",
    "xmod", "zamba2", "zaya",
}
# fmt: on


def families() -> list[str]:
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - NOT_MADE)


def family_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """A small configuration; overrides are taken as they are."""
    kind = CONFIG_MAPPING[family]
    known = set(getattr(kind, "attribute_map", {}))
    for each in kind.__mro__:
        known |= set(vars(each).get("__annotations__", ()))
        if "__init__" in vars(each):
            known |= set(inspect.signature(vars(each)["__init__"]).parameters)
    given = {name: size for name, size in SIZES.items() if name in known} | MORE.get(family, {}) | overrides
    if "kv_lora_rank" in known:  # of latent attention: every head has its own keys
        given.setdefault("num_key_value_heads", 4)
        given["num_key_value_heads"] = given.get("num_attention_heads", 4)
    names = getattr(kind, "attribute_map", {})
    given = {name: value for name, value in given.items() if names.get(name) not in given}
    return AutoConfig.for_model(family, **given)


def family_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model in float32. Raises ValueError when it would be large."""
    with torch.device("meta"):
        large: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    if (count := sum(weight.numel() for weight in large.parameters())) > MANY:
        raise ValueError(f"{config.model_type} would have {count} parameters")
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.float().eval()
    return model


def greedy(model: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    """The tokens of transformers' own generate."""
    ids = torch.tensor([prompt])
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None
    )
    text: list[int] = out[0, len(prompt) :].tolist()
    return text


def nearby(model: PreTrainedModel, noise: float) -> PreTrainedModel:
    """A draft that is often wrong: the same model with noise on every weight."""
    draft = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(torch.randn_like(weight) * noise)
    return draft
