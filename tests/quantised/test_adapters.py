"""Directories of peft's adapters: loaded with the checkpoint they are for, and refused for the faults of either."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import WEIGHTS, Change, copy_of_target, several, tensors, without
from transformers import AutoModelForCausalLM

from specbranch import SpecBranch, SpecBranchError
from specbranch.cli import doctor
from specbranch.runtime.loading import load_tokenizer

pytestmark = pytest.mark.quantised
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Of a copy of the bundled target in `target` beside it."""
    peft = pytest.importorskip("peft")
    base, folder = copy_of_target(tmp_path), tmp_path / "adapter"
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_what_transformers_loads(adapter: Path, dtype: str) -> None:
    engine = SpecBranch.from_pretrained(str(adapter), draft="bundled", dtype=dtype, threads=1)
    theirs: Any = AutoModelForCausalLM.from_pretrained(adapter, dtype=getattr(torch, dtype))
    ours, expected = dict(engine.target.named_parameters()), dict(theirs.named_parameters())
    assert ours.keys() == expected.keys()
    assert all(
        ours[name].dtype == weight.dtype and torch.equal(ours[name], weight) for name, weight in expected.items()
    )
    plain = engine.generate("def read(", max_new_tokens=12, method="autoregressive").tokens
    assert engine.generate("def read(", max_new_tokens=12).tokens == plain
    if dtype == "float32":  # with less, rounding may decide
        ids = torch.tensor([engine.encode("def read(")])
        assert theirs.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist() == plain
    assert doctor.examine(str(adapter), "bundled", load="cpu")["problems"] == []


def test_an_adapter_may_have_a_tokenizer(adapter: Path) -> None:
    """Else it has its base's."""
    tokenizer = load_tokenizer(str(adapter), "target")
    assert tokenizer is not None
    tokenizer.add_tokens(["\u2603 word"])
    tokenizer.save_pretrained(adapter)
    assert len(SpecBranch.from_pretrained(str(adapter)).encode("\u2603 word")) == 1


def of_adapter(edit: Any) -> Change:
    file = "adapter_model.safetensors"

    def change(root: Path) -> None:
        shutil.move(root / "adapter" / file, root / "adapter" / WEIGHTS)
        tensors(edit)(root / "adapter")
        shutil.move(root / "adapter" / WEIGHTS, root / "adapter" / file)

    return change


def of_base(change: Change) -> Change:
    return lambda root: change(root / "target")


FAULTS: dict[str, tuple[Change, str]] = {
    "the adapter lacks a tensor": (
        of_adapter(lambda weights: weights.pop(A)),
        r"^target \S+/adapter: \S+adapter_model\.safetensors: lacks model\.layers\.0\.self_attn\.q_proj\.lora_A",
    ),
    "a tensor of the adapter has another shape": (
        of_adapter(lambda weights: weights.update({A: torch.ones(3, 3)})),
        r"\[3, 3\] instead of \[8, 128\] as adapter_config\.json says",
    ),
    "the adapter has a tensor too many": (
        of_adapter(lambda weights: weights.update({A.replace("q_proj", "other"): torch.ones(3, 3)})),
        r"has model\.layers\.0\.self_attn\.other\S+, for which LlamaForCausalLM has no place",
    ),
    "no weights of the adapter": (
        without("adapter/adapter_model.safetensors"),
        r"^target \S+/adapter: cannot be loaded",
    ),
    "the base lacks a tensor": (
        of_base(tensors(lambda weights: weights.pop("model.norm.weight"))),
        r"^target \S+/target: \S+model\.safetensors: lacks model\.norm\.weight",
    ),
    "the base is not there": (
        lambda root: shutil.rmtree(root / "target"),
        r"^target \S+/target: there is no such directory",
    ),
    "the base has no tokenizer": (of_base(several(without("tokenizer.json"))), r"its tokenizer cannot be loaded"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_either_are_named(adapter: Path, name: str) -> None:
    change, message = FAULTS[name]
    change(adapter.parent)
    with pytest.raises(SpecBranchError, match=message) as caught:
        SpecBranch.from_pretrained(str(adapter))
    assert "\n" not in str(caught.value)
    (problem,) = doctor.examine(str(adapter), load="cpu")["problems"]
    assert re.search(message, problem)


def test_learned_prompts_are_refused(adapter: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    prompts = adapter.parent / "prompts"
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(adapter.parent / "target"), config).save_pretrained(
        prompts
    )
    with pytest.raises(SpecBranchError, match=r"^target \S+/prompts: "):
        SpecBranch.from_pretrained(str(prompts))
