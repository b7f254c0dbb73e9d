"""Tiny random models of any family."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

PROMPT = [3, 17, 9, 4, 21, 30, 11, 2, 8, 19, 25, 6]

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen2-sliding": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 5, "sliding_window_pattern": 2},
    "phi3": {"sliding_window": 6},
    "gpt_neox": {},
}


def tiny_model(
    family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A random model of `family` with two layers, GQA and small sizes."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 32,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        **overrides,
    }
    if family in ("gpt_neox", "falcon"):  # their configs have no such fields
        del sizes["num_key_value_heads"], sizes["head_dim"]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **sizes)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().to(dtype).eval()
    assert isinstance(model, PreTrainedModel)
    return model
