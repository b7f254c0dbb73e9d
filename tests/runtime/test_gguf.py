"""GGUF files: what their blocks stand for, the model and tokenizer that they describe, and a line for what is none."""

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import encoded, plain, weights_of, write_gguf, write_pair
from tiny import PROMPT, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import specbranch_ext
from specbranch import SpecBranch, SpecBranchError, SpecBranchWarning, bundled
from specbranch.runtime import gguf as loader
from specbranch.runtime import quicker
from specbranch.runtime.gguf_file import read_header
from specbranch.runtime.identity import identify
from specbranch.runtime.loading import load_config, load_model, load_tokenizer, without_weights
from specbranch.runtime.packed import PackedEmbedding, PackedLinear, weight_format
from specbranch.runtime.packing import pack_loaded
from specbranch.runtime.weights import parameters_of_forward
from specbranch.text.prompts import read_prompts

KINDS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "initializer_range": 0.05}  # blocks of 256
QUERIES, NORM, DOWN = "blk.0.attn_q.weight", "blk.0.attn_norm.weight", "blk.1.ffn_down.weight"


def model_of(family: str = "llama", **overrides: Any) -> PreTrainedModel:
    model = tiny_model(family, 0, torch.float32, **{"intermediate_size": 64, **overrides})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:  # biases of nothing and norms of ones would hide a mistake
                weight.add_(torch.randn_like(weight) * (0.1 if "norm" in name else 0.02))
    return model


def load(path: Path, **options: Any) -> PreTrainedModel:
    return load_model(path, "target", "auto", "cpu", **options)


def texts(model: PreTrainedModel) -> list[list[int]]:
    engine = SpecBranch(model, method="autoregressive")
    return [
        engine.generate(PROMPT, max_new_tokens=24, temperature=temperature, top_k=0, seed=3).tokens
        for temperature in (0.0, 1.0)
    ]


# ---- Values


@pytest.mark.parametrize("kind", [*KINDS, "F32", "F16", "BF16"])
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True), ("qwen2", True), ("qwen3", False)])
def test_texts_are_those_of_the_decoded_weights(tmp_path: Path, family: str, tied: bool, kind: str) -> None:
    model = model_of(family, tie_word_embeddings=tied, **WIDE)
    values = write_gguf(tmp_path / "tiny.gguf", model, kind)
    found = load(tmp_path / "tiny.gguf")
    assert found.dtype == torch.bfloat16
    weights = weights_of(found)
    assert [name for name in values if not torch.equal(values[name], weights[name])] == []
    assert texts(found) == texts(plain(found, values))
    kinds = {type(module) for module in found.modules()}
    assert (PackedLinear in kinds, nn.Linear in kinds) == ((True, False) if kind in KINDS else (False, True))
    assert (PackedEmbedding in kinds) == (kind in KINDS)


def test_files_of_several_kinds(tmp_path: Path) -> None:
    kinds = {"token_embd.weight": "Q4_K", "output.weight": "Q6_K", QUERIES: "F16", DOWN: "BF16"}
    values = write_gguf(tmp_path / "tiny.gguf", model_of("qwen2", **WIDE), lambda name: kinds.get(name, "Q5_K"))
    found: Any = load(tmp_path / "tiny.gguf")
    weights = weights_of(found)
    assert [name for name in values if not torch.equal(values[name], weights[name])] == []
    assert type(found.model.layers[0].self_attn.q_proj) is type(found.model.layers[1].mlp.down_proj) is nn.Linear
    assert found.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert weight_format(found) == "q4_k+q5_k+q6_k"


def test_a_shared_weight_is_held_once(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", model_of(tie_word_embeddings=True))
    found = load(tmp_path / "tiny.gguf")
    embedding, head = found.get_input_embeddings(), found.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert isinstance(head, PackedLinear)
    assert embedding.packed.data_ptr() == head.packed.data_ptr()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_weights_and_settings_are_those_that_transformers_reads(tmp_path: Path, family: str) -> None:
    model = model_of(family, eos_token_id=7)
    write_gguf(tmp_path / "tiny.gguf", model)
    ours = load(tmp_path / "tiny.gguf")
    theirs = load_gguf_checkpoint(str(tmp_path / "tiny.gguf"), return_tensors=True, model_to_load=model)["tensors"]
    weights = weights_of(ours)
    assert weights.keys() == theirs.keys()
    assert [name for name in weights if not torch.equal(weights[name], theirs[name].to(torch.bfloat16))] == []
    config, found = AutoConfig.from_pretrained(tmp_path, gguf_file="tiny.gguf").to_diff_dict(), ours.config.to_dict()
    ignored = {"_model_name_or_path", *(["head_dim"] if family == "qwen3" else [])}  # whose width of heads it overlooks
    different = {name for name, value in config.items() if name not in ignored and found[name] != value}
    assert different == set()
    assert found["eos_token_id"] == 7


def test_nothing_is_left_without_values(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", model_of())
    found = load(tmp_path / "tiny.gguf")
    tensors = [*found.named_parameters(), *found.named_buffers()]
    assert [name for name, tensor in tensors if tensor.device.type != "cpu"] == []
    assert not found.training
    rotary: Any = found.model.rotary_emb
    assert torch.equal(rotary.inv_freq, tiny_model().model.rotary_emb.inv_freq)


def test_settings_that_lead_to_others(tmp_path: Path) -> None:
    model = model_of(attention_bias=True, num_key_value_heads=4)
    biases = {"blk.0.attn_output.bias", "blk.0.attn_q.bias"}
    settings = {"$.attention.head_count_kv": None, "$.rope.freq_base": None, "tokenizer.ggml.eot_token_id": 9}
    values = write_gguf(tmp_path / "tiny.gguf", model, settings=settings | {"tokenizer.ggml.eos_token_id": 5})
    file = read_header(tmp_path / "tiny.gguf")
    assert biases <= file.tensors.keys()
    found = load(tmp_path / "tiny.gguf")
    assert found.config.attention_bias
    assert found.config.num_key_value_heads == 4
    assert found.config.rope_parameters["rope_theta"] == 10000.0
    assert found.config.eos_token_id == found.generation_config.eos_token_id == [5, 9]
    weights = weights_of(found)
    assert [name for name in values if not torch.equal(values[name], weights[name])] == []


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def factors(model: PreTrainedModel, scale: float = 1.0) -> Callable[..., object]:
    """The tensor that a file has of such embeddings: how many times slower each is."""
    rotary: Any = model.model.rotary_emb
    width = model.config.head_dim
    plain = 1 / 500000.0 ** (torch.arange(0, width, 2).float() / width)
    slower = (plain / rotary.inv_freq * scale).numpy().astype(np.float32)
    return lambda writer, tensors: tensors.update({"rope_freqs.weight": ("F32", slower)})


def test_the_rotary_embeddings_of_llama_3(tmp_path: Path) -> None:
    model = model_of(head_dim=64, rope_parameters=LLAMA3, max_position_embeddings=131072)
    write_gguf(tmp_path / "tiny.gguf", model, edit=factors(model))
    found: Any = load(tmp_path / "tiny.gguf")
    assert found.config.rope_parameters == LLAMA3
    assert torch.equal(found.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    write_gguf(tmp_path / "tiny.gguf", model, edit=factors(model, scale=1.01))
    with pytest.raises(SpecBranchError, match=r"rope_freqs\.weight are not the factors of Llama 3's"):
        load(tmp_path / "tiny.gguf")


# ---- Pairs, tokenizers, and models that are used elsewhere


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See write_pair."""
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder)
    return folder


TEXT = "def f(n):\n    return"


def test_a_pair(folder: Path) -> None:
    engines = [
        SpecBranch.from_pretrained(
            str(folder / f"target{end}"), str(folder / f"draft{end}"), draft_arithmetic=arithmetic
        )
        for end, arithmetic in ((".gguf", "exact"), ("", None), (".gguf", None))
    ]
    for temperature in (0.0, 0.8):
        found = [each.generate(TEXT, max_new_tokens=40, temperature=temperature, seed=1) for each in engines]
        assert found[0].tokens == found[1].tokens == found[2].tokens
        assert found[0].finish_reason == found[1].finish_reason
    stats = found[0].stats.as_dict()
    assert stats["row_dependent"] == ""
    assert stats["target_weights"]
    messages = [{"role": "user", "content": TEXT}]
    assert engines[0].encode(messages) == engines[1].encode(messages)
    assert engines[0].pair.relative_size == pytest.approx(engines[1].pair.relative_size)
    fingerprints = {identify(each.target).fingerprint for each in engines}
    assert len(fingerprints) == 1
    assert identify(engines[0].target).name == "target.gguf"


def test_a_text_ends_where_the_file_says(tmp_path: Path) -> None:
    model = model_of("qwen2", tie_word_embeddings=True)
    write_gguf(tmp_path / "tiny.gguf", model)
    whole = texts(load(tmp_path / "tiny.gguf"))[0]
    end = whole[5]
    write_gguf(tmp_path / "tiny.gguf", model, settings={"tokenizer.ggml.eos_token_id": end})
    assert texts(load(tmp_path / "tiny.gguf"))[0] == whole[: whole.index(end) + 1]


def test_the_tokenizer_is_the_files_own(folder: Path, tmp_path: Path) -> None:
    ours, theirs = load_tokenizer(folder / "target.gguf", "target"), load_tokenizer(folder / "target", "target")
    assert ours is not None
    assert theirs is not None
    prompts = read_prompts(bundled.path("target").with_name("prompts.jsonl"))
    for text in (*(prompt.text for prompt in prompts), "é e\u0301 中文<|endoftext|>\t x"):
        assert isinstance(text, str)
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template
    # Whatever lies beside the file belongs to something else.
    (tmp_path / "target.gguf").symlink_to(folder / "target.gguf")
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text("{")
    (tmp_path / "config.json").write_text("{")
    again = load_tokenizer(tmp_path / "target.gguf", "target")
    assert again is not None
    assert again.get_vocab() == ours.get_vocab()
    model = load(tmp_path / "target.gguf")
    by_name = load_tokenizer(model, "target")
    assert by_name is not None
    assert by_name.get_vocab() == ours.get_vocab()


def test_tokens_that_a_file_adds(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled.path("target"))
    model = AutoModelForCausalLM.from_pretrained(bundled.path("draft"))
    adds = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 0}
    write_gguf(tmp_path / "tiny.gguf", model, "Q8_0", tokenizer, settings=adds)
    found = load_tokenizer(tmp_path / "tiny.gguf", "target")
    assert found is not None
    assert found("x")["input_ids"] == [0, *tokenizer("x")["input_ids"]]


def test_a_split_that_is_not_known_is_said(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled.path("target"))
    model = AutoModelForCausalLM.from_pretrained(bundled.path("draft"))

    def another_split(writer: gguf.GGUFWriter, tensors: object) -> None:
        writer.kv_data[0]["tokenizer.ggml.pre"].value = "smollm"

    write_gguf(tmp_path / "tiny.gguf", model, "Q8_0", tokenizer, edit=another_split)
    with pytest.warns(SpecBranchWarning, match=r"tiny\.gguf: how its tokenizer splits text \('smollm'\) is not known"):
        load_tokenizer(tmp_path / "tiny.gguf", "target")


def test_transformers_generates_with_it(folder: Path) -> None:
    model: Any = load(folder / "target.gguf")
    tokenizer: Any = load_tokenizer(folder / "target.gguf", "target")
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    theirs = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    assert len(theirs) == 12
    engine = SpecBranch(model, tokenizer=tokenizer, method="autoregressive")
    assert engine.generate(TEXT, max_new_tokens=3, temperature=0).tokens == theirs[:3]


def test_packed_weights_count_as_parameters(folder: Path) -> None:
    sizes = [
        parameters_of_forward(load_model(folder / name, "target", "auto", "cpu")) for name in ("target.gguf", "target")
    ]
    assert sizes[0] == sizes[1]


# ---- What is refused


def refused(path: Path, line: str, load: Callable[[Path], object] = load) -> None:
    with pytest.raises(SpecBranchError) as caught:
        load(path)
    said = str(caught.value)
    assert re.search(line, said), said
    assert "\n" not in said
    assert str(path.name) in said


def without(*names: str) -> Callable[..., object]:
    return lambda writer, tensors: [tensors.pop(name) for name in names]


def changed(name: str, kind: str, shape: tuple[int, ...] = (32, 32)) -> Callable[..., object]:
    """Another tensor of this name."""
    data = encoded(np.ones(shape, np.float32), kind)
    return lambda writer, tensors: tensors.update({name: (kind, data)})


def integers(writer: gguf.GGUFWriter, tensors: dict[str, tuple[str, Any]]) -> None:
    tensors[DOWN] = "I32", np.zeros((32, 64), np.int32)


def infinite(writer: gguf.GGUFWriter, tensors: dict[str, tuple[str, Any]]) -> None:
    _, data = tensors[DOWN]
    data[3, :2] = np.array([np.inf], np.float16).view(np.uint8)


ENDS = r"not a whole file: it ends within its header, at byte"
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": (
        {"general.architecture": "gemma3"},
        r"its architecture is 'gemma3'; of GGUF files expected",
    ),
    "an adapter": ({"general.type": "adapter"}, r"general\.type is 'adapter'; expected a model"),
    "a part": ({"split.count": 3}, r"one of 3 parts of a split file; expected the whole model in one file"),
    "no size": ({"$.embedding_length": None}, r"lacks llama\.embedding_length"),
    "no precision": ({"$.attention.layer_norm_rms_epsilon": None}, r"lacks llama\.attention\.layer_norm_rms_epsilon"),
    "sizes of layers": (
        {"$.feed_forward_length": [64, 32]},
        r"llama\.feed_forward_length is \[64, 32\]; expected an int",
    ),
    "no layers": ({"$.block_count": 0}, r"llama\.block_count is 0; expected 1 <="),
    "too many layers": ({"$.block_count": 10**9}, r"llama\.block_count is 1000000000; expected"),
    "a layer more": ({"$.block_count": 3}, r"lacks blk\.2\..* and 4 more of LlamaForCausalLM"),
    "a layer less": ({"$.block_count": 1}, r"has blk\.1\..* and 4 more, for which LlamaForCausalLM has no place"),
    "another width": (
        {"$.feed_forward_length": 96},
        r"has blk\.0\.ffn_down\.weight \[32, 64\] instead of \[32, 96\], .* as its header says",
    ),
    "odd heads": ({"$.attention.head_count": 3}, r"cannot be loaded: .*heads"),
    "widths of heads": ({"$.attention.value_length": 16}, r"value_length is 16, and heads are 8 wide"),
    "partial rotation": ({"$.rope.dimension_count": 4}, r"rope\.dimension_count is 4, and heads are 8 wide"),
    "yarn": ({"$.rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.type is 'yarn', which specbranch does not know"),
    "experts": ({"$.expert_count": 8}, r"llama\.expert_count is 8, which specbranch does not know to follow"),
    "a window": ({"$.attention.sliding_window": 64}, r"llama\.attention\.sliding_window is 64, which"),
    "an end that is none": (
        {"tokenizer.ggml.tokens": ["a"] * 32, "tokenizer.ggml.eos_token_id": 32},
        r"tokenizer\.ggml\.eos_token_id is 32; expected 0 <= .* <= 31",
    ),
    "more tokens than rows": (
        {"tokenizer.ggml.tokens": ["a"] * 33},
        r"has 33 tokens, and token_embd\.weight has rows for 32",
    ),
}
TENSORS: dict[str, tuple[Callable[..., object], str]] = {
    "a missing tensor": (without(NORM), rf"lacks {re.escape(NORM)} of LlamaForCausalLM$"),
    "no embedding": (without("token_embd.weight"), r"lacks token_embd\.weight of LlamaForCausalLM"),
    "a tensor too many": (
        changed("blk.0.attn_q_norm.weight", "F32", (8,)),
        r"has blk\.0\.attn_q_norm\.weight, for which",
    ),
    "another shape": (
        changed(QUERIES, "Q8_0", (32, 64)),
        r"has blk\.0\.attn_q\.weight \[32, 64\] instead of \[32, 32\] as its",
    ),
    "other blocks": (
        changed(QUERIES, "MXFP4"),
        r"blk\.0\.attn_q\.weight is MXFP4; expected one of Q8_0, .*, F32, F16, BF16$",
    ),
    "integers": (integers, r"blk\.1\.ffn_down\.weight is I32; expected one of"),
    "infinite scales": (infinite, r"blk\.1\.ffn_down\.weight: "),
    "other factors": (
        changed("rope_freqs.weight", "F32", (3,)),
        r"rope_freqs\.weight is F32 \[3\]; expected F32 \[4\]",
    ),
}


@pytest.mark.parametrize("name", [*SETTINGS, *TENSORS])
def test_what_cannot_be_loaded_is_refused_in_a_line(tmp_path: Path, name: str) -> None:
    path, model = tmp_path / "tiny.gguf", model_of()
    if name in SETTINGS:
        settings, line = SETTINGS[name]
        settings = dict(settings)
        write_gguf(path, model, architecture=settings.pop("general.architecture", None), settings=settings)
    else:
        edit, line = TENSORS[name]
        write_gguf(path, model, edit=edit)
    refused(path, line)
    if name != "infinite scales":  # these are values, which are not read
        refused(path, line, lambda path: without_weights(path, "draft"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "tiny.gguf"
    write_gguf(path, model_of(num_hidden_layers=1), settings={"tokenizer.ggml.tokens": ["a"] * 32})
    return path.read_bytes()


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda data: b"", r"not a GGUF file: it is empty"),
    "text": (lambda data: b"version https://git-lfs.github.com/spec/v1", r"not a GGUF file: it begins with b'vers'"),
    "two bytes": (lambda data: data[:2], r"not a GGUF file: it begins with b'GG'"),
    "no header": (lambda data: data[:20], ENDS),
    "half a header": (lambda data: data[:700], ENDS),
    "half the weights": (
        lambda data: data[: len(data) - 999],
        r"not a whole file: output\.weight ends at byte \d+, the file at",
    ),
    "big-endian": (
        lambda data: data[:4] + data[4:8][::-1] + data[8:],
        r"a big-endian GGUF file; expected little-endian",
    ),
    "version 1": (lambda data: data[:4] + b"\1\0\0\0" + data[8:], r"version 1 of GGUF; expected 2 or 3"),
    "endless": (lambda data: data[:8] + b"\xff" * 16 + data[24:], r"not a whole file|has .*twice|in its header"),
}


@pytest.mark.parametrize("name", BYTES)
def test_what_is_no_whole_file(tmp_path: Path, sound: bytes, name: str) -> None:
    change, line = BYTES[name]
    path = tmp_path / "tiny.gguf"
    path.write_bytes(change(sound))
    for load_some in (load, lambda path: load_config(path, "target"), lambda path: load_tokenizer(path, "target")):
        refused(path, line, load_some)


def test_any_damage_to_a_header_is_a_line_or_nothing(tmp_path: Path, sound: bytes) -> None:
    path, dice = tmp_path / "tiny.gguf", random.Random(0)
    path.write_bytes(sound)
    header = min(tensor.offset for tensor in read_header(path).tensors.values())
    for _ in range(300):
        data = bytearray(sound[: dice.choice((len(sound), dice.randrange(header)))])
        for _ in range(dice.randrange(4) if data else 0):
            data[dice.randrange(min(header, len(data)))] = dice.randrange(256)
        path.write_bytes(bytes(data))
        try:
            found = read_header(path)
            if found.tensors:
                loader.config_of(found)
        except (SpecBranchError, ValueError):
            pass


def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path("tiny.gguf"), tmp_path / "tiny.gguf", Path("some/tiny.gguf")):
        refused(path, r"there is no such file$")
    (tmp_path / "tiny.gguf").mkdir()
    refused(tmp_path / "tiny.gguf", r"the directory has no config\.json")
    (tmp_path / "weights.bin").write_bytes(b"GGUF")
    refused(tmp_path / "weights.bin", r"expected the directory of a checkpoint or a file named \*\.gguf")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path: Path, sound: bytes) -> None:
    (tmp_path / "tiny.gguf").write_bytes(sound)
    (tmp_path / "tiny.gguf").chmod(0)
    refused(tmp_path / "tiny.gguf", r"Permission denied")


def test_a_directory_may_be_named_so(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "tiny.gguf")
    assert weight_format(load(tmp_path / "tiny.gguf")) == ""


def test_an_adapter_of_a_file(folder: Path, tmp_path: Path) -> None:
    settings = {"base_model_name_or_path": str(folder / "target.gguf")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    refused(tmp_path, r"its base .*target\.gguf is a GGUF file; expected a checkpoint, which can take layers$")


def test_no_tokenizer(tmp_path: Path, sound: bytes) -> None:
    (tmp_path / "tiny.gguf").write_bytes(sound)
    line = r"^target \S+tiny\.gguf: has no tokenizer: expected tokenizer\.ggml\.model and tokenizer\.ggml\.tokens$"
    refused(tmp_path / "tiny.gguf", line, lambda path: load_tokenizer(path, "target"))
    with pytest.raises(SpecBranchError, match=line):
        SpecBranch.from_pretrained(str(tmp_path / "tiny.gguf"))


def test_a_file_that_becomes_shorter(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(sound)
    file = read_header(path)
    os.truncate(path, len(sound) - 999)
    with pytest.raises(SpecBranchError, match=r"^not a whole file: it ends within output\.weight$"):
        loader.load(file, "exact")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"dtype": "float32"}, r"dtype float32; expected auto or bfloat16 for a GGUF file$"),
        ({"dtype": torch.float16}, r"dtype float16; expected auto or bfloat16"),
        ({"device": "cuda"}, r"packed weights run on the CPU, not with device cuda$"),
        ({"device_map": "auto"}, r"packed weights run on the CPU, not with device_map 'auto'$"),
        ({"target_weights": "lossless"}, r"target_weights is 'lossless', but weights of .* stay in its blocks \("),
        ({"target_weights": "int3"}, r"target_weights is 'int3'; expected one of"),
        ({"target_arithmetic": "slow"}, r"target_arithmetic is 'slow'; expected one of exact, fast$"),
        ({"draft_arithmetic": 8}, r"draft_arithmetic is 8; expected one of exact, fast$"),
    ],
)
def test_options_that_do_not_fit(folder: Path, options: dict[str, Any], line: str) -> None:
    pair = [str(folder / f"{role}.gguf") for role in ("target", "draft")]
    with pytest.raises(SpecBranchError, match=line):
        SpecBranch.from_pretrained(*pair, **options)


def test_arithmetic_is_for_blocks(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pack(blocks: Any, format: str, arithmetic: str) -> Any:
        asked.append(arithmetic)
        return real(blocks, format, arithmetic)

    real = specbranch_ext.pack_blocks
    monkeypatch.setattr(loader, "pack_blocks", pack)
    for role, arithmetic, expected in (("target", None, "exact"), ("draft", None, "fast"), ("target", "fast", "fast")):
        load_model(folder / "target.gguf", role, "auto", "cpu", arithmetic=arithmetic)
        assert set(asked) == {expected}
        asked.clear()
    write_gguf(tmp_path / "tiny.gguf", tiny_model(), "F16")
    model = load(tmp_path / "tiny.gguf", arithmetic="exact")
    line = r"^target_arithmetic is 'fast', but the weights of .* are not in blocks"
    for path in (tmp_path / "tiny.gguf", folder / "target"):
        with pytest.raises(SpecBranchError, match=line):
            pack_loaded(path, load(path, arithmetic="fast"), "target", "auto", "fast")
    assert load_model(model, "target", "auto", "cpu", arithmetic="exact") is model


@pytest.mark.parametrize("times", [{"q4_0": 0.9, "q8_0": 1.2}, {"q4_0": 1.1, "q8_0": 1.0}])
def test_blocks_that_are_slower_than_their_values_are_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: dict[str, float]
) -> None:
    """Where the processor has no instructions for exact products, and of each format by itself."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model_of(tie_word_embeddings=True), lambda name: "Q4_0" if "ffn" in name else "Q8_0")
    kept = load(path, arithmetic="exact")

    def text(model: PreTrainedModel) -> list[int]:
        return SpecBranch(model).generate([3, 1, 4], max_new_tokens=12, method="autoregressive").tokens

    expected = text(kept)
    linears = {name: module for name, module in kept.named_modules() if isinstance(module, PackedLinear)}
    monkeypatch.setattr(quicker, "_time_over_dense", lambda dense, packed, threads: times[packed[0].format])
    monkeypatch.setattr(quicker, "LEAST", 0)

    def packed_as(weights: str, arithmetic: str, exact_blocks: bool = False) -> dict[str, nn.Module]:
        info = {**specbranch_ext.build_info(), "exact_blocks": exact_blocks}
        monkeypatch.setattr(quicker, "build_info", lambda: info)
        model = load(path, arithmetic=arithmetic)
        pack_loaded(path, model, "target", weights, arithmetic)
        if arithmetic == "exact":
            assert text(model) == expected
        assert isinstance(model.get_input_embeddings(), PackedEmbedding)
        return {name: model.get_submodule(name) for name in linears}

    for name, module in packed_as("auto", "exact").items():
        assert isinstance(module, nn.Linear) == (times[linears[name].format] > 1)
    for options in (("keep", "exact"), ("auto", "fast"), ("auto", "exact", True)):
        assert all(isinstance(module, PackedLinear) for module in packed_as(*options).values())
