"""Models from GGUF files: the file's weights stay in its blocks, and what is computed are the values they stand for.

What converting a checkpoint to such a file changed is changed back: names, and the order of the rows of Llama's queries
and keys. A file of which anything else would have to be changed back, or that says something of its model that is not
known here, is refused.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from tokenizers.normalizers import NFC
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from specbranch.core.checks import number, shown, whole
from specbranch.core.errors import SpecBranchError, SpecBranchWarning
from specbranch.runtime.checkpoint import MOST_LAYERS, faults_of
from specbranch.runtime.gguf_file import GgufFile, GgufTensor
from specbranch.runtime.modes import no_grad
from specbranch.runtime.packed import Place, holders_of, put
from specbranch_ext import PackedWeight, pack_blocks

BLOCKS = (
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q4_K",
    "Q5_0",
    "Q5_1",
    "Q5_K",
    "Q6_K",
)  # that pack_blocks takes, under their names in lower case
VALUES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Architecture:
    """A kind of model in such files, which is also transformers' name for it. permuted: the rows of its queries and
    keys lie as another rotary embedding wants them. own_heads: its config has a width of heads of its own."""

    permuted: bool = False
    own_heads: bool = False


ARCHITECTURES = {
    "llama": Architecture(permuted=True, own_heads=True),
    "qwen2": Architecture(),
    "qwen3": Architecture(own_heads=True),
}

# What a file says of its model, without the architecture's name before it.
SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
HEADS, EPSILON, THETA = "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base"
WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")  # of a head
KNOWN = {*SIZES, HEADS, EPSILON, THETA, *WIDTHS, "vocab_size", "tensor_data_layout", "rope.scaling.finetuned"}
# Values of other settings with which they change nothing; 0, "" and False never do.
IDLE = {"rope.scaling.type": "none", "rope.scaling.factor": 1, "rope.scale_linear": 1, "attention.causal": True}

EMBEDDING, OUTPUT, FREQUENCIES = "token_embd.weight", "output.weight", "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

TOKENS = "tokenizer.ggml.tokens"
ENDS = ("eos", "eot", "eom")  # of a text, a turn and a message
SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}  # in files, and in tokenizers
# How byte-level vocabularies split text, as far as transformers knows them.
SPLITS = {
    *("gpt-2", "llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx", "tekken", "gpt-4o", "llama4"),
    *("qwen2", "qwen35", "deepseek-r1-qwen", "megrez"),
}


# ---- Configuration


def config_of(file: GgufFile) -> Any:
    """The configuration that the model had before it was converted. Raises SpecBranchError for what is not known."""
    name = file.architecture
    architecture = _architecture(file)
    said = {key.removeprefix(f"{name}."): value for key, value in file.settings.items() if key.startswith(f"{name}.")}
    for key, value in said.items():
        if key not in KNOWN and value not in (0, "", IDLE.get(key, 0)):
            raise SpecBranchError(f"{name}.{key} is {shown(value)}, which specbranch does not know to follow")
    if missing := [key for key in (*SIZES, EPSILON) if key not in said]:
        raise SpecBranchError(f"lacks {name}.{missing[0]}")
    values: dict[str, Any] = {
        ours: whole(f"{name}.{key}", said[key], least=1, most=MOST_LAYERS if key == "block_count" else None)
        for key, ours in SIZES.items()
    }
    heads = values["num_attention_heads"]
    values["num_key_value_heads"] = whole(f"{name}.{HEADS}", said.get(HEADS, heads), least=1)
    values["rms_norm_eps"] = number(f"{name}.{EPSILON}", said[EPSILON], least=0)
    width = _width(said, name, values["hidden_size"] // heads)
    if architecture.own_heads or width * heads != values["hidden_size"]:
        values["head_dim"] = width
    values["rope_parameters"] = _rope(file, number(f"{name}.{THETA}", said.get(THETA, 10000.0), least=1), width)
    if name == "llama":
        values["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        values["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    tied = OUTPUT not in file.tensors
    values |= {"vocab_size": _vocabulary(file, said), "tie_word_embeddings": tied, **_special_tokens(file)}
    config = AutoConfig.for_model(name, dtype=torch.bfloat16, **values)
    config.name_or_path = str(file.path)
    return config


def _architecture(file: GgufFile) -> Architecture:
    if (kind := file.settings.get("general.type", "model")) != "model":
        raise SpecBranchError(f"general.type is {shown(kind)}; expected a model")
    if file.architecture not in ARCHITECTURES:
        found = shown(file.architecture) if file.architecture else "none"
        raise SpecBranchError(f"its architecture is {found}; of GGUF files expected {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[file.architecture]


def _width(said: dict[str, Any], name: str, usual: int) -> int:
    widths = {key: whole(f"{name}.{key}", said[key], least=1) for key in WIDTHS if key in said}
    width = widths.get(WIDTHS[0], usual)
    for key, value in widths.items():
        if value != width:
            raise SpecBranchError(f"{name}.{key} is {value}, and heads are {width} wide; specbranch expects them equal")
    return width


def _rope(file: GgufFile, theta: float, width: int) -> dict[str, Any]:
    """Of Llama 3's rotary embeddings a file has the factors that their parameters led to."""
    plain = {"rope_type": "default", "rope_theta": theta}
    tensor = file.tensors.get(FREQUENCIES)
    if tensor is None:
        return plain
    if tensor.kind != "F32" or tensor.shape != (width // 2,):
        raise SpecBranchError(f"{FREQUENCIES} is {tensor.kind} {list(tensor.shape)}; expected F32 [{width // 2}]")
    with file.path.open("rb") as opened:
        factors = _read(opened, tensor, torch.empty(tensor.nbytes, dtype=torch.uint8)).double()
    factor = float(factors.max())
    if torch.equal(factors, torch.ones_like(factors)):
        return plain
    if not torch.allclose(factors, _llama3_factors(theta, width, factor), rtol=1e-4, atol=0):
        raise SpecBranchError(f"{FREQUENCIES} are not the factors of Llama 3's rotary embeddings")
    return {**plain, "rope_type": "llama3", "factor": factor, **LLAMA3}


def _llama3_factors(theta: float, width: int, factor: float) -> Tensor:
    """How many times slower each frequency is than in a plain rotary embedding."""
    waves = 2 * math.pi * theta ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    low, high, length = LLAMA3.values()
    share = ((length / waves - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - share) / factor + share)


def _vocabulary(file: GgufFile, said: dict[str, Any]) -> int:
    """Its size: that of the embedding, which may be padded."""
    embedding = file.tensors.get(EMBEDDING)
    tokens = file.settings.get(TOKENS)
    if embedding is None or len(embedding.shape) != 2:
        return whole("the size of its vocabulary", said.get("vocab_size", tokens), least=1)
    if isinstance(tokens, int) and tokens > embedding.shape[0]:
        raise SpecBranchError(f"has {tokens} tokens, and {EMBEDDING} has rows for {embedding.shape[0]}")
    return embedding.shape[0]


def _special_tokens(file: GgufFile) -> dict[str, Any]:
    """As a config has them; whatever ends a turn ends a text."""
    bos, pad = _token(file, "bos"), _token(file, "padding")
    ends = list(dict.fromkeys(end for name in ENDS if (end := _token(file, name)) is not None))
    return {"bos_token_id": bos, "pad_token_id": pad, "eos_token_id": ends if len(ends) > 1 else next(iter(ends), None)}


def _token(file: GgufFile, name: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    found, tokens = file.settings.get(key), file.settings.get(TOKENS)
    return None if found is None else whole(key, found, least=0, most=tokens - 1 if isinstance(tokens, int) else None)


# ---- Model


def without_values(file: GgufFile) -> PreTrainedModel:
    """The model on the meta device.

    Raises SpecBranchError where the file's tensors are not those that its settings ask for, or are of a kind that
    cannot be used.
    """
    config = config_of(file)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.eval()
    _matched(file, model)
    return model


@no_grad
def load(file: GgufFile, arithmetic: str) -> PreTrainedModel:
    """The model, weights that are in blocks packed. arithmetic: of these; see specbranch_ext.pack_blocks.

    Holds no more than what is made, and one tensor. Raises SpecBranchError as `without_values` does, for weights that
    are no numbers, and for a file that became shorter.
    """
    model = without_values(file)
    _fill_buffers(model)
    matched = sorted(_matched(file, model), key=lambda match: match.packed)  # biases before the layers that take them
    buffer = torch.empty(max(match.tensor.nbytes for match in matched), dtype=torch.uint8)  # one, or the heap has gaps
    with file.path.open("rb") as opened:
        for match in matched:
            data = _in_order(match.tensor, _read(opened, match.tensor, buffer), model)
            if match.packed:
                put(match.places, _pack(match.tensor, data, arithmetic))
            else:
                _fill(match, nn.Parameter(data.to(torch.bfloat16, copy=True)))
    return model


@dataclass(frozen=True, slots=True)
class Match:
    """A tensor of a file, the model's weight that it is, and the modules that hold it."""

    tensor: GgufTensor
    weight: Tensor
    places: Sequence[Place]

    @property
    def packed(self) -> bool:
        return self.tensor.kind in BLOCKS


def _matched(file: GgufFile, model: PreTrainedModel) -> list[Match]:
    """Every weight of the model, in the order of the model. Raises SpecBranchError as `without_values` does."""
    config, kind = model.config, type(model).__name__
    architecture = next(number for number, name in MODEL_ARCH_NAMES.items() if name == file.architecture)
    translate = get_tensor_name_map(architecture, config.num_hidden_layers).get_name
    names = {}
    for name, weight in model.named_parameters():
        layer, _, what = name.rpartition(".")
        names[id(weight)] = f"{translate(layer) or layer}.{what}"
    wanted = {names[id(weight)]: (weight, places) for weight, places in holders_of(model)}
    faults = faults_of(
        kind,
        missing=wanted.keys() - file.tensors.keys(),
        mismatched={
            name: (tensor.shape, tuple(wanted[name][0].shape))
            for name, tensor in file.tensors.items()
            if name in wanted and tensor.shape != tuple(wanted[name][0].shape)
        },
        unexpected=file.tensors.keys() - wanted.keys() - {FREQUENCIES},
        source="its header",
    )
    if faults:
        raise SpecBranchError(faults)
    found = [Match(file.tensors[name], weight, places) for name, (weight, places) in wanted.items()]
    for match in found:
        kinds = {type(place.module) for place in match.places}
        usable = (*BLOCKS, *VALUES) if match.weight.dim() == 2 and kinds <= {nn.Linear, nn.Embedding} else VALUES
        if match.tensor.kind not in usable:
            raise SpecBranchError(f"{match.tensor.name} is {match.tensor.kind}; expected one of {', '.join(usable)}")
    return found


def _read(opened: BinaryIO, tensor: GgufTensor, buffer: Tensor) -> Tensor:
    """Its values in the file's type, or the bytes of its blocks, [out, bytes of a row], at the buffer's beginning."""
    data = buffer[: tensor.nbytes]
    opened.seek(tensor.offset)
    if opened.readinto(data.numpy()) != tensor.nbytes:  # type: ignore[attr-defined]
        raise SpecBranchError(f"not a whole file: it ends within {tensor.name}")
    if tensor.kind in VALUES:
        return data.view(VALUES[tensor.kind]).view(tensor.shape)
    return data.view(tensor.shape[0], -1)


def _in_order(tensor: GgufTensor, data: Tensor, model: PreTrainedModel) -> Tensor:
    """Rows as transformers has them: a head's first half before its second, where they lie in turn."""
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    layer = tensor.name.split(".")[-2]
    if not ARCHITECTURES[config.model_type].permuted or layer not in heads:
        return data
    return data.view(heads[layer], -1, 2, *data.shape[1:]).transpose(1, 2).reshape(data.shape)


def _pack(tensor: GgufTensor, blocks: Tensor, arithmetic: str) -> PackedWeight:
    try:
        packed: PackedWeight = pack_blocks(blocks, tensor.kind.lower(), arithmetic)
    except ValueError as error:
        raise SpecBranchError(f"{tensor.name}: {error}") from error
    return packed


def _fill(match: Match, values: nn.Parameter) -> None:
    for place in match.places:
        for name, weight in list(place.module.named_parameters(recurse=False)):
            if weight is match.weight:
                setattr(place.module, name, values)


def _fill_buffers(model: PreTrainedModel) -> None:
    """Make modules anew whose buffers have no values: rotary embeddings, of which a config says everything."""
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                setattr(parent, name, type(module)(model.config))


# ---- Tokenizer


def tokenizer_of(file: GgufFile) -> PreTrainedTokenizerBase:
    """The tokenizer that the file describes, and no other that lies beside it.

    Raises SpecBranchError where it describes none. Warns where it splits text in a way that is not known.
    """
    _architecture(file)
    kind, split = (file.settings.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if kind in (None, "none", "no_vocab") or TOKENS not in file.settings:
        raise SpecBranchError(f"has no tokenizer: expected tokenizer.ggml.model and {TOKENS}")
    if kind == "gpt2" and split not in SPLITS:
        message = f"{file.path}: how its tokenizer splits text ({shown(split)}) is not known: tokens may be others"
        warnings.warn(message, SpecBranchWarning, stacklevel=2)
    special = {name: _token(file, key) for key, name in SPECIAL.items()}
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "model.gguf"
        link.symlink_to(file.path.absolute())
        # AutoTokenizer would read the file twice, and slowly, to find its class: the same but for its defaults.
        tokenizer: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=link.name)
    tokenizer.name_or_path = str(file.path)
    # Not all versions of transformers take these from the file.
    for name, index in special.items():
        setattr(tokenizer, f"{name}_token", None if index is None else tokenizer.convert_ids_to_tokens(index))
    if isinstance(adds := file.settings.get("tokenizer.ggml.add_bos_token"), bool):
        tokenizer.add_bos_token = adds
    if split == "qwen2":  # with which its vocabularies were made
        tokenizer.backend_tokenizer.normalizer = NFC()
    return tokenizer
