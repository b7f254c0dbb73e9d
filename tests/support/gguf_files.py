"""GGUF files of small models, written as those who convert models write them, and what their weights stand for."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from tiny import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from specbranch import bundled
from specbranch.runtime.loading import load_model
from specbranch.runtime.packed import PackedEmbedding, PackedLinear

Array = np.ndarray[Any, Any]
# A writer's calls before it writes, and a change of the tensors: by their names in the file, type and data.
Edit = Callable[[GGUFWriter, dict[str, tuple[str, Array]]], object]


def model_of(family: str = "llama", **overrides: Any) -> PreTrainedModel:
    model = tiny_model(family, 0, torch.float32, **{"intermediate_size": 64, **overrides})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:  # biases of nothing and norms of ones would hide a mistake
                weight.add_(torch.randn_like(weight) * (0.1 if "norm" in name else 0.02))
    return model


def load(path: Path, **options: Any) -> PreTrainedModel:
    return load_model(path, "target", "auto", "cpu", **options)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kinds: str | Callable[[str], str] = "Q8_0",
    tokenizer: PreTrainedTokenizerBase | None = None,
    edit: Edit | None = None,
    settings: Mapping[str, Any] | None = None,
    architecture: str | None = None,
) -> dict[str, Tensor]:
    """Write a model of the Llama or Qwen family; returns the values of the file's tensors under transformers' names.

    kinds: the type of every matrix, or of the one of that name in the file. edit: what else the file has, or lacks.
    settings: that are otherwise, None for those that are left out.
    """
    config = model.config
    name = architecture or config.model_type
    translate = gguf.get_tensor_name_map(_number(config.model_type), config.num_hidden_layers).get_name
    tensors: dict[str, tuple[str, Array]] = {}
    values = {}
    for ours, weight in model.named_parameters():
        layer, _, what = ours.rpartition(".")
        theirs = f"{translate(layer)}.{what}"
        kind = "F32" if weight.dim() == 1 else kinds if isinstance(kinds, str) else kinds(theirs)
        data = encoded(weight.detach().float().numpy(), kind, seed=len(tensors))
        values[ours] = decoded(data, kind)
        tensors[theirs] = kind, _permuted(theirs, data, config) if config.model_type == "llama" else data
    writer = GGUFWriter(path, name)
    described = _described(config) | dict(settings or {})
    for key, value in described.items():
        if value is not None:
            _add(writer, key.replace("$", name), value)
    if tokenizer is not None:
        _add_tokenizer(writer, tokenizer)
    if edit is not None:
        edit(writer, tensors)
    for theirs, (kind, data) in tensors.items():
        writer.add_tensor(theirs, data, raw_dtype=None if data.dtype == np.float32 else GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def encoded(values: Array, kind: str, seed: int = 0) -> Array:
    """In blocks of this type; where only readers know how, some blocks of about their size."""
    number = GGMLQuantizationType[kind]
    if kind == "F32":
        return np.ascontiguousarray(values, dtype=np.float32)
    if kind == "F16":
        return values.astype(np.float16)
    try:
        return gguf.quants.quantize(values, number)
    except NotImplementedError:
        return _some_blocks(values.shape, kind, seed)


def decoded(data: Array, kind: str) -> Tensor:
    """What it stands for, rounded to bfloat16 once."""
    return torch.from_numpy(gguf.quants.dequantize(data, GGMLQuantizationType[kind]).copy()).to(torch.bfloat16)


def write_pair(folder: Path) -> None:
    """The bundled pair as files, and as checkpoints with the weights of these and a chat template."""
    for role in ("target", "draft"):
        model = AutoModelForCausalLM.from_pretrained(bundled.path(role))
        tokenizer = AutoTokenizer.from_pretrained(bundled.path(role))
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
        values = write_gguf(folder / f"{role}.gguf", model, "Q8_0", tokenizer)
        plain(model, values).save_pretrained(folder / role)
        tokenizer.save_pretrained(folder / role)


SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82)}  # where a block has its float16


def _some_blocks(shape: tuple[int, ...], kind: str, seed: int) -> Array:
    of_block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (shape[0], shape[1] // of_block, size), dtype=np.uint8)
    for place in SCALES[kind]:
        scales = random.uniform(1e-4, 4e-4, blocks.shape[:2]).astype(np.float16)
        blocks[:, :, place : place + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """All weights of a model as bfloat16, those that are packed too. (A product with the identity gives them.)"""
    found = {name: weight.detach() for name, weight in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, PackedEmbedding):
            found[f"{name}.weight"] = module(torch.arange(module.shape[0]))
        elif isinstance(module, PackedLinear):
            columns = torch.eye(module.shape[1], dtype=torch.bfloat16)
            bias, module.bias = module.bias, None
            found[f"{name}.weight"] = module(columns).T
            module.bias = bias
    return found


def plain(model: PreTrainedModel, values: Mapping[str, Tensor]) -> PreTrainedModel:
    """The same model with these weights, as transformers has it."""
    other: PreTrainedModel = type(model)._from_config(model.config, dtype=torch.bfloat16)
    other.load_state_dict(dict(values), strict=False)
    other.tie_weights()
    other.eval()
    return other


def _number(name: str) -> Any:
    return next(number for number, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def _permuted(name: str, data: Array, config: Any) -> Array:
    """The rows of Llama's queries and keys as its rotary embedding takes them elsewhere: a head's halves in turn."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return data
    halves = data.reshape(heads, 2, -1, *data.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(data.shape))


def _described(config: Any) -> dict[str, Any]:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "general.name": "tiny",
        "general.type": "model",
        "$.context_length": config.max_position_embeddings,
        "$.embedding_length": config.hidden_size,
        "$.block_count": config.num_hidden_layers,
        "$.feed_forward_length": config.intermediate_size,
        "$.attention.head_count": config.num_attention_heads,
        "$.attention.head_count_kv": config.num_key_value_heads,
        "$.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "$.attention.key_length": width,
        "$.attention.value_length": width,
        "$.rope.dimension_count": width,
        "$.rope.freq_base": config.rope_parameters["rope_theta"],
        "$.vocab_size": config.vocab_size,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.padding_token_id": config.pad_token_id,
    }


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, value)


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    """A byte-level one that splits text as GPT-2's does."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    words = sorted(tokenizer.get_vocab().items(), key=lambda each: each[1])
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([word for word, _ in words])
    writer.add_token_types([TokenType.CONTROL if word in special else TokenType.NORMAL for word, _ in words])
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
