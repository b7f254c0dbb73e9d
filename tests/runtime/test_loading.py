"""Checkpoints: what is wrong with one is said in a line that names file and tensors, and nothing loads half."""

import builtins
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import WEIGHTS, Change, copy_of_target, settings, several, tensors, truncated, without, written
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from specbranch import SpecBranch, SpecBranchError, bundled
from specbranch.cli import doctor
from specbranch.runtime import adapters
from specbranch.runtime.loading import load_model, load_tokenizer, without_weights

NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
INDEX, SHARD = "model.safetensors.index.json", "model-00001-of-00002.safetensors"


def load(folder: Path) -> PreTrainedModel:
    return load_model(str(folder), "target", "auto", "cpu")


def first_layer(weights: dict[str, Tensor]) -> None:
    for name in [name for name in weights if ".layers.0." in name]:
        del weights[name]


def sharded(index: object) -> Change:
    """One shard of two, and an index."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / SHARD)
        (folder / INDEX).write_text(index if isinstance(index, str) else json.dumps(index))

    return change


BROKEN: dict[str, tuple[Change, str]] = {
    "no layer": (
        tensors(first_layer),
        rf"{WEIGHTS}: lacks model\.layers\.0\..*, .* and 4 more of LlamaForCausalLM$",
    ),
    "a missing tensor": (tensors(lambda w: w.pop(NORM)), rf"{WEIGHTS}: lacks {NORM} of LlamaForCausalLM$"),
    "an untied head": (settings("config.json", tie_word_embeddings=False), r"lacks lm_head\.weight of Llama"),
    "a tensor too many": (
        tensors(lambda w: w.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(32)})),
        rf"{WEIGHTS}: has model\.layers\.0\.self_attn\.q_norm\.weight, for which LlamaForCausalLM has no place",
    ),
    "a layer too many": (settings("config.json", num_hidden_layers=1), r"has model\.layers\.1\..* has no place"),
    "another shape": (
        settings("config.json", intermediate_size=256),
        r"has .*mlp\.down_proj\.weight \[128, 192\] instead of \[128, 256\].* as config\.json says",
    ),
    "missing and too many": (
        tensors(lambda w: w.update(other=w.pop(NORM))),
        rf"lacks {NORM} of LlamaForCausalLM; has other, for which",
    ),
    "half a file": (truncated(WEIGHTS, 100_000), rf"{WEIGHTS}: not a whole safetensors file"),
    "an empty file": (truncated(WEIGHTS, 0), rf"{WEIGHTS}: empty"),
    "a pointer": (written(WEIGHTS, "version https://git-lfs.github.com/spec/v1"), rf"{WEIGHTS}: not a whole"),
    "no weights": (without(WEIGHTS), r"cannot be loaded: .*model\.safetensors"),
    "a broken index": (sharded("{"), rf"{INDEX}: not JSON"),
    "an index of nothing": (sharded({}), rf"{INDEX}: has no weight_map"),
    "an index that is a list": (sharded([]), rf"{INDEX}: expected a JSON object"),
    "a shard that is not there": (
        sharded({"weight_map": {NORM: SHARD, UP: "model-00002-of-00002.safetensors"}}),
        rf"{INDEX}: names model-00002-of-00002\.safetensors, which is not there",
    ),
    "half a shard": (
        several(sharded({"weight_map": {NORM: SHARD}}), truncated(SHARD, 100_000)),
        rf"{SHARD}: not a whole safetensors file",
    ),
    "no pickle": (several(without(WEIGHTS), written("pytorch_model.bin", "weights")), r"pytorch_model\.bin: not a"),
    "an empty pickle": (several(without(WEIGHTS), written("pytorch_model.bin", "")), r"pytorch_model\.bin: empty"),
    "config: not JSON": (written("config.json", "{"), r"config\.json: not JSON"),
    "config: a list": (written("config.json", "[]"), r"config\.json: expected a JSON object"),
    "config: no text": (written("config.json", b"\xff\xfe\x00"), r"config\.json: not JSON"),
    "config: no type": (written("config.json", "{}"), r"`model_type`"),
    "config: an unknown type": (settings("config.json", model_type="nope"), r"model type `nope`"),
    "config: not decoder-only": (settings("config.json", model_type="t5"), r"expected a decoder-only .* T5Config"),
    "config: a size of text": (settings("config.json", hidden_size="128"), r"'hidden_size' expected int"),
    "config: heads": (settings("config.json", num_attention_heads=3), r"number of attention heads \(3\)"),
    "config: no layers": (settings("config.json", num_hidden_layers=0), r"num_hidden_layers is 0; expected 1 to"),
    "config: too many layers": (settings("config.json", num_hidden_layers=10**9), r"num_hidden_layers is 1000000000"),
    "config: an absurd size": (settings("config.json", intermediate_size=10**18), r"cannot be loaded: RuntimeError"),
    "config: unknown quantisation": (
        settings("config.json", quantization_config={"quant_method": "zzz"}),
        r"quant_method 'zzz'",
    ),
    "generation config: not JSON": (written("generation_config.json", "{"), r"generation_config\.json: not JSON"),
    "generation config: a list": (written("generation_config.json", "[]"), r"generation_config\.json: expected a JSON"),
    "generation config: a bad value": (settings("generation_config.json", max_new_tokens=0), r"max_new_tokens"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_checkpoint_is_refused_by_file_and_tensors(tmp_path: Path, name: str) -> None:
    change, message = BROKEN[name]
    folder = copy_of_target(tmp_path)
    change(folder)
    with pytest.raises(SpecBranchError, match=message) as caught:
        load(folder)
    assert str(caught.value).startswith(f"target {folder}: ")
    assert "\n" not in str(caught.value)
    (problem,) = doctor.examine(str(folder), load="cpu")["problems"]
    assert problem.startswith(f"target {folder}: ")
    assert re.search(message, problem)


def further_layer(weights: dict[str, Tensor]) -> None:
    layers = {name: values for name, values in weights.items() if ".layers.0." in name}
    weights.update({name.replace(".0.", ".16."): values.clone() for name, values in layers.items()})


SOUND: dict[str, Change] = {
    "old rotary buffers": tensors(
        lambda w: w.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(16) for i in range(2)})
    ),
    "multi-token prediction": tensors(lambda w: w.update({"mtp.layers.0.mlp.up_proj.weight": torch.ones(2, 2)})),
    "the same, behind the layers": several(settings("config.json", num_nextn_predict_layers=1), tensors(further_layer)),
    "a value head": tensors(lambda w: w.update({"v_head.summary.weight": torch.ones(1, 128)})),
    "a head that is tied": tensors(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()})),
    "no generation config": without("generation_config.json"),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_changes_nothing_is_no_fault(tmp_path: Path, bundled_pair: SpecBranch, name: str) -> None:
    folder = copy_of_target(tmp_path)
    SOUND[name](folder)
    model = load(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), bundled_pair.target.parameters(), strict=True))


def test_masks_that_a_model_makes_itself_may_be_in_its_file(tmp_path: Path) -> None:
    """As in the first checkpoints of GPT-2."""
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    mask = torch.ones(1, 1, 16, 16).tril()
    tensors(lambda w: w.update({"transformer.h.0.attn.bias": mask, "transformer.h.0.attn.masked_bias": torch.ones(1)}))(
        tmp_path
    )
    assert isinstance(load(tmp_path), GPT2LMHeadModel)


def test_shards_and_pickles_load(tmp_path: Path, bundled_pair: SpecBranch) -> None:
    model = AutoModelForCausalLM.from_pretrained(bundled.path("target"))
    model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for name, legacy in (("zip", True), ("pickle", False)):
        model.config.save_pretrained(tmp_path / name)
        weights = load_file(bundled.path("target") / WEIGHTS)
        torch.save(weights, tmp_path / name / "pytorch_model.bin", _use_new_zipfile_serialization=legacy)
    for name in ("shards", "zip", "pickle"):
        loaded = load(tmp_path / name)
        assert torch.equal(loaded.lm_head.weight, bundled_pair.target.lm_head.weight)


def test_a_tensor_that_a_shard_lacks_is_said_of_that_shard(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(bundled.path("target")).save_pretrained(tmp_path, max_shard_size="1MB")
    shard = json.loads((tmp_path / INDEX).read_text())["weight_map"][NORM]
    weights = load_file(tmp_path / shard)
    del weights[NORM]
    save_file(weights, tmp_path / shard, metadata={"format": "pt"})
    with pytest.raises(SpecBranchError, match=re.escape(f"{tmp_path / shard}: lacks {NORM} of")):
        load(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    folder = copy_of_target(tmp_path)
    (folder / WEIGHTS).chmod(0)
    with pytest.raises(SpecBranchError, match=rf"{WEIGHTS}: Permission denied"):
        load(folder)


def test_a_loaded_model_is_left_as_it_is() -> None:
    model = tiny_model().train()
    assert load_model(model, "target", "auto", "cpu") is model
    assert model.training


# ---- tokenizers


NO_TOKENIZER = r"has none of tokenizer\.json, tokenizer\.model, vocab\.json with merges\.txt"
BROKEN_TOKENIZERS: dict[str, tuple[Change, str]] = {
    "none": (without("tokenizer.json", "tokenizer_config.json"), NO_TOKENIZER),
    "no vocabulary": (without("tokenizer.json"), NO_TOKENIZER),
    **{  # these classes are content without their files
        name: (
            several(without("tokenizer.json"), written("tokenizer_config.json", json.dumps({"tokenizer_class": name}))),
            NO_TOKENIZER,
        )
        for name in ("LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer", "GemmaTokenizer")
    },
    "half": (truncated("tokenizer.json", 1000), r"tokenizer\.json: not JSON"),
    "empty": (written("tokenizer.json", ""), r"tokenizer\.json: not JSON"),
    "an empty object": (written("tokenizer.json", "{}"), r"tokenizer\.json: no tokenizer \("),
    "the model's config": (
        several(without("tokenizer_config.json"), written("config.json", "{")),
        r"/config\.json: not JSON",
    ),
    "config: not JSON": (written("tokenizer_config.json", "{"), r"tokenizer_config\.json: not JSON"),
    "config: a list": (written("tokenizer_config.json", "[]"), r"tokenizer_config\.json: expected a JSON object"),
}


@pytest.mark.parametrize("name", BROKEN_TOKENIZERS)
def test_a_broken_tokenizer_is_refused_by_file(tmp_path: Path, name: str) -> None:
    change, message = BROKEN_TOKENIZERS[name]
    folder = copy_of_target(tmp_path)
    change(folder)
    with pytest.raises(SpecBranchError, match=message) as caught:
        load_tokenizer(str(folder), "draft")
    assert str(caught.value).startswith(f"draft {folder}: its tokenizer cannot be loaded: {folder}")
    assert "\n" not in str(caught.value)
    (problem,) = doctor.examine("bundled", str(folder), load="cpu")["problems"]
    assert re.search(message, problem)


def test_a_loaded_model_needs_no_tokenizer(tmp_path: Path) -> None:
    folder = copy_of_target(tmp_path)
    without("tokenizer.json", "tokenizer_config.json")(folder)
    model = load(folder)
    assert load_tokenizer(model, "target") is None
    assert SpecBranch.from_pretrained(model).tokenizer is None


# ---- adapters: tests/quantised has those that need peft

ADAPTER = "adapter_config.json"
BROKEN_ADAPTERS: dict[str, tuple[Change, str]] = {
    "without peft": (settings(ADAPTER), "an adapter needs the package peft, which is not installed"),
    "beside a model": (written("config.json", "{}"), "has both config.json and adapter_config.json"),
    "no base": (settings(ADAPTER, base_model_name_or_path=None), rf"{ADAPTER}: has no base_model_name_or_path"),
    "not JSON": (written(ADAPTER, "{"), rf"{ADAPTER}: not JSON"),
    "a list": (written(ADAPTER, "[]"), rf"{ADAPTER}: expected a JSON object"),
}


@pytest.mark.parametrize("name", BROKEN_ADAPTERS)
def test_a_broken_adapter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(adapters, "is_peft_available", lambda: False)
    (tmp_path / ADAPTER).write_text(json.dumps({"base_model_name_or_path": str(bundled.path("target"))}))
    change, message = BROKEN_ADAPTERS[name]
    change(tmp_path)
    with pytest.raises(SpecBranchError, match=message) as caught:
        load(tmp_path)
    assert str(caught.value).startswith(f"target {tmp_path}: ")
    (problem,) = doctor.examine(str(tmp_path), load="cpu")["problems"]
    assert problem == str(caught.value)


# ---- code of a checkpoint's own


def with_code(folder: Path, part: str) -> Path:
    """A checkpoint whose configuration, or tokenizer, is defined by code beside it that leaves a file `ran-…`."""
    code = f"open({str(folder / f'ran-{part}')!r}, 'w').close()\n"
    if part == "tokenizer":
        auto_map: dict[str, Any] = {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}
        settings("tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=auto_map)(folder)
        code += "from transformers import PreTrainedTokenizerFast\n\n\n"
        code += "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    else:
        auto_map = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
        settings("config.json", model_type="own", architectures=["OwnModel"], auto_map=auto_map)(folder)
        code += "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        code += "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n\n"
        code += "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    (folder / f"own_{part}.py").write_text(code)
    return folder


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_of_a_checkpoint_is_refused_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question"))
    folder = with_code(copy_of_target(tmp_path), part)
    attempts: list[Any] = [
        lambda: SpecBranch.from_pretrained(folder, draft="bundled"),
        lambda: SpecBranch.from_pretrained("bundled", draft=folder),
    ]
    if part == "model":
        attempts += [lambda: without_weights(folder, "target"), lambda: load(folder)]
    for attempt in attempts:
        with pytest.raises(SpecBranchError, match=rf"^(target|draft) {folder}: .*--trust-remote-code"):
            attempt()
    if part == "model":
        problems = doctor.examine(str(folder))["problems"]
        assert len(problems) == 1
        assert "--trust-remote-code" in problems[0]
    assert capsys.readouterr().out == ""
    assert not (folder / f"ran-{part}").exists()


def test_code_of_a_checkpoint_runs_when_it_is_trusted(tmp_path: Path) -> None:
    folder = with_code(with_code(copy_of_target(tmp_path), "model"), "tokenizer")
    command = [sys.executable, "-m", "specbranch.cli", "generate", "--target", str(folder), "--method"]
    options = ["autoregressive", "--trust-remote-code", "--prompt", "def f(", "--max-new-tokens", "2", "--threads", "1"]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([*command, *options], capture_output=True, text=True, input="n\n", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "ran-model").exists()
    assert (folder / "ran-tokenizer").exists()


# ---- other arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 5}, "target is 5; expected a directory, a GGUF file, a hub name"),
        ({"target": ""}, "target is ''; expected a directory"),
        ({"target": b"bundled"}, "target is b'bundled'; expected a directory"),
        ({"draft": ["bundled"]}, "draft is .*; expected a directory"),
        ({"target": str(bundled.path("target") / "config.json")}, "expected the directory of a checkpoint or a file"),
        ({"target": "x" * 5000}, "target x+: "),
        ({"dtype": 5}, "dtype 5; expected one of auto"),
        ({"dtype": torch.int8}, "dtype torch.int8; expected one of auto"),
        ({"dtype": ["auto"]}, "dtype .*; expected one of auto"),
        ({"device": "gpu"}, "device is 'gpu'; expected cpu, cuda or"),
        ({"device": 0}, "device is 0; expected cpu"),
        ({"device": "meta"}, "device is 'meta'; expected cpu"),
        ({"draft": "bundled", "draft_device": 1.5}, "device is 1.5; expected cpu"),
        ({"trust_remote_code": "no"}, "trust_remote_code is 'no'; expected True or False"),
        ({"method": ["specbranch"]}, "unknown method"),
        ({"overlap": 1}, "overlap is 1; expected True, False or 'auto'"),
        ({"threads": 0}, "threads is 0; expected 1 <= threads"),
        ({"threads": 1.5}, "threads is 1.5; expected an integer"),
        ({"target_threads": "2"}, "target_threads is '2'; expected an integer"),
        ({"cuda_graphs": 1}, "cuda_graphs is 1; expected True or False"),
        ({"priority": []}, "priority is .*; expected one of target"),
        ({"hrad": 5, "draft": "bundled"}, "hrad is 5; expected a predictor"),
        ({"length": 2.5}, "unknown option 'length'|length is 2.5; expected an integer"),
    ],
)
def test_other_arguments_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecBranchError, match=message):
        SpecBranch.from_pretrained(**{"target": "bundled", "method": "speculative", **arguments})


def test_a_name_is_no_model() -> None:
    with pytest.raises(SpecBranchError, match="target is 'bundled'; expected a model: SpecBranch"):
        SpecBranch("bundled")  # type: ignore[arg-type]


def test_whole_floats_are_counts() -> None:
    options: dict[str, Any] = {"threads": 2.0, "target_threads": 1.0, "length": 3.0}
    engine = SpecBranch.from_pretrained("bundled", "bundled", method="speculative", **options)
    assert engine.pair.threads == 2
    assert len(engine.generate([1, 2], max_new_tokens=4).tokens) == 4
