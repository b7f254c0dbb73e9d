"""GGUF files: what their blocks stand for, and the model and tokenizer that they describe."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import load, model_of, plain, weights_of, write_gguf
from tiny import PROMPT, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

import specbranch_ext
from specbranch import SpecBranch, SpecBranchError, SpecBranchWarning, bundled
from specbranch.runtime import gguf as loader
from specbranch.runtime import packing, quicker
from specbranch.runtime.gguf_file import read_header
from specbranch.runtime.identity import identify
from specbranch.runtime.loading import load_model, load_tokenizer
from specbranch.runtime.packed import PackedEmbedding, PackedLinear, weight_format
from specbranch.runtime.packing import pack_loaded
from specbranch.runtime.weights import parameters_of_forward
from specbranch.text.prompts import read_prompts

KINDS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
QUERIES, DOWN = "blk.0.attn_q.weight", "blk.1.ffn_down.weight"
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "initializer_range": 0.05}  # blocks of 256


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


TEXT = "def f(n):\n    return"


def test_a_pair(gguf_pair: Path) -> None:
    engines = [
        SpecBranch.from_pretrained(
            str(gguf_pair / f"target{end}"), str(gguf_pair / f"draft{end}"), draft_arithmetic=arithmetic
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


def test_the_tokenizer_is_the_files_own(gguf_pair: Path, tmp_path: Path) -> None:
    ours, theirs = load_tokenizer(gguf_pair / "target.gguf", "target"), load_tokenizer(gguf_pair / "target", "target")
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
    (tmp_path / "target.gguf").symlink_to(gguf_pair / "target.gguf")
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


def test_transformers_generates_with_it(gguf_pair: Path) -> None:
    model: Any = load(gguf_pair / "target.gguf")
    tokenizer: Any = load_tokenizer(gguf_pair / "target.gguf", "target")
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    theirs = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    assert len(theirs) == 12
    engine = SpecBranch(model, tokenizer=tokenizer, method="autoregressive")
    assert engine.generate(TEXT, max_new_tokens=3, temperature=0).tokens == theirs[:3]


def test_packed_weights_count_as_parameters(gguf_pair: Path) -> None:
    sizes = [
        parameters_of_forward(load_model(gguf_pair / name, "target", "auto", "cpu"))
        for name in ("target.gguf", "target")
    ]
    assert sizes[0] == sizes[1]


# ---- Arithmetic


def test_arithmetic_is_for_blocks(gguf_pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pack(blocks: Any, format: str, arithmetic: str) -> Any:
        asked.append(arithmetic)
        return real(blocks, format, arithmetic)

    real = specbranch_ext.pack_blocks
    monkeypatch.setattr(loader, "pack_blocks", pack)
    for role, arithmetic, expected in (("target", None, "exact"), ("draft", None, "fast"), ("target", "fast", "fast")):
        load_model(gguf_pair / "target.gguf", role, "auto", "cpu", arithmetic=arithmetic)
        assert set(asked) == {expected}
        asked.clear()
    write_gguf(tmp_path / "tiny.gguf", tiny_model(), "F16")
    model = load(tmp_path / "tiny.gguf", arithmetic="exact")
    line = r"^target_arithmetic is 'fast', but the weights of .* are not in blocks"
    for path in (tmp_path / "tiny.gguf", gguf_pair / "target"):
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
        assert not any(weight.is_inference() for weight in module.parameters())  # which others could not use
    for options in (("keep", "exact"), ("auto", "fast"), ("auto", "exact", True)):
        assert all(isinstance(module, PackedLinear) for module in packed_as(*options).values())


def test_a_drafts_blocks_may_be_rounded_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.gguf"
    kinds = {"attn_q": "Q4_0", "attn_k": "Q4_1", "attn_v": "Q5_0", "attn_output": "Q5_1"}
    write_gguf(path, model_of(tie_word_embeddings=True), lambda name: kinds.get(name.split(".")[-2], "Q8_0"))

    def formats(role: str, weights: str, arithmetic: str = "fast") -> dict[str, str]:
        model = load_model(path, role, "auto", "cpu", arithmetic=arithmetic)
        embedding = model.get_input_embeddings()
        before = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
        pack_loaded(path, model, role, weights, arithmetic)
        assert model.get_input_embeddings() is embedding
        found = {}
        for name, module in before.items():
            after: Any = model.get_submodule(name)
            found[name.split(".")[-1]] = after.format
            expected = module.packed_weight
            if after.format != module.format:
                rounded = specbranch_ext.quantize_weight(module.values(), after.format)
                expected = specbranch_ext.pack_blocks(rounded, after.format, arithmetic)
            assert after.arithmetic == arithmetic
            assert torch.equal(after.packed, expected.data)
        assert texts(model)
        return found

    whole = formats("draft", "keep")
    assert whole["q_proj"] == "q4_0"
    assert whole["up_proj"] == "q8_0"
    assert formats("draft", "auto") == whole  # a small one stays in the caches
    monkeypatch.setattr(packing, "LEAST", 0)
    monkeypatch.setattr(packing, "ROWS_AT_ONCE", 16)
    assert set(formats("draft", "auto").values()) == {"q4_0"}
    assert formats("draft", "auto", "exact") == formats("target", "auto") == whole
    assert set(formats("draft", "int4", "exact").values()) == {"q4_0"}
