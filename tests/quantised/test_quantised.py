"""Targets quantised, adapted and offloaded by the usual libraries, on the CPU: `make quantised` installs them.

Each is the bundled target. Its text is that of its own plain decoding, whatever the method, or the engine says what
keeps it from being so.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from one_by_one import rows_that_differ
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from specbranch import SpecBranch, bundled
from specbranch.core.errors import SpecBranchWarning
from specbranch.runtime.rows import judge
from specbranch.runtime.weights import unwrapped

pytestmark = [
    pytest.mark.quantised,
    pytest.mark.filterwarnings("default"),
]
TARGET = str(bundled.path("target"))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(dtype: torch.dtype, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(TARGET, dtype=dtype, **options).eval()


def bitsandbytes_nf4(dtype: torch.dtype, tmp_path: Path) -> Any:
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return load(dtype, device_map="cpu", quantization_config=config)


def bitsandbytes_int8(dtype: torch.dtype, tmp_path: Path) -> Any:
    pytest.importorskip("bitsandbytes")
    return load(dtype, device_map="cpu", quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def torchao_int8(dtype: torch.dtype, tmp_path: Path) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return load(dtype, device_map="cpu", quantization_config=config)


def torchao_int4(dtype: torch.dtype, tmp_path: Path) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    model = load(dtype)
    quantization.quantize_(model, quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4))  # type: ignore[attr-defined]
    return model


def torchao_dynamic_int8(dtype: torch.dtype, tmp_path: Path) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    model = load(dtype)
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    return model


def quanto_int8(dtype: torch.dtype, tmp_path: Path) -> Any:
    pytest.importorskip("optimum.quanto")
    return load(dtype, device_map="cpu", quantization_config=QuantoConfig(weights="int8"))


def quanto_int4(dtype: torch.dtype, tmp_path: Path) -> Any:
    quanto = pytest.importorskip("optimum.quanto")
    model = load(dtype)
    quanto.quantize(model, weights=quanto.qint4)
    quanto.freeze(model)
    return model


def torch_dynamic_int8(dtype: torch.dtype, tmp_path: Path) -> Any:
    if dtype is not torch.float32:
        pytest.skip("torch quantises float32 models")
    return torch.ao.quantization.quantize_dynamic(load(dtype), {nn.Linear}, dtype=torch.qint8)


def lora(dtype: torch.dtype, tmp_path: Path) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    return peft.get_peft_model(load(dtype), config).eval()


def lora_merged(dtype: torch.dtype, tmp_path: Path) -> Any:
    return lora(dtype, tmp_path).merge_and_unload()


def offloaded_to_memory(dtype: torch.dtype, tmp_path: Path) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(load(dtype), execution_device=torch.device("cpu"))


def offloaded_to_disk(dtype: torch.dtype, tmp_path: Path) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.disk_offload(load(dtype), str(tmp_path), execution_device=torch.device("cpu"))


Kind = Callable[[torch.dtype, Path], Any]
WEIGHTS_ONLY: list[Kind] = [
    bitsandbytes_nf4,
    torchao_int8,
    torchao_int4,
    quanto_int8,
    quanto_int4,
    lora,
    lora_merged,
    offloaded_to_memory,
    offloaded_to_disk,
]
ACTIVATIONS: list[Kind] = [bitsandbytes_int8, torchao_dynamic_int8, torch_dynamic_int8]
BY_RANGE: list[Kind] = [bitsandbytes_int8, torch_dynamic_int8]  # of the whole call

every_kind = pytest.mark.parametrize("kind", [*WEIGHTS_ONLY, *ACTIVATIONS], ids=lambda kind: kind.__name__)


@pytest.fixture(scope="module")
def draft() -> Any:
    return AutoModelForCausalLM.from_pretrained(str(bundled.path("draft"))).eval()


@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_texts_are_those_of_plain_decoding(kind: Kind, dtype: str, draft: Any, tmp_path: Path) -> None:
    model = kind(DTYPES[dtype], tmp_path)
    engine = SpecBranch.from_pretrained(model, draft, threads=1)
    samplings: list[dict[str, Any]] = [{}, {"temperature": 0.8, "seed": 3}]
    for sampling in samplings:
        plain = engine.generate("def area(width", max_new_tokens=16, method="autoregressive", **sampling)
        for method in ("specbranch", "ssd"):
            drafted = engine.generate("def area(width", max_new_tokens=16, method=method, overlap=False, **sampling)
            assert drafted.tokens == plain.tokens, method
    assert plain.stats.row_dependent == ""
    assert rows_that_differ(unwrapped(model, "target"), vocabulary=2048) == 0


@pytest.mark.parametrize("kind", WEIGHTS_ONLY, ids=lambda kind: kind.__name__)
def test_texts_are_those_of_transformers(kind: Kind, draft: Any, tmp_path: Path) -> None:
    """In float32, where a near-tie is rare. (What rounds activations rounds those of a prompt together.)"""
    model = kind(torch.float32, tmp_path)
    engine = SpecBranch.from_pretrained(model, draft, threads=1)
    for prompt in ("def area(width", "for line in open("):
        ids = torch.tensor([engine.encode(prompt)])
        theirs = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        assert engine.generate(ids, max_new_tokens=16).tokens == theirs[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kind", BY_RANGE, ids=lambda kind: kind.__name__)
def test_large_layers_that_round_by_the_range_of_the_call_are_named(
    kind: Kind, draft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "SMALL", 0)
    with pytest.warns(SpecBranchWarning, match=r"up to the rounding of .*Linear.* \(1 of 11[23]\)"):
        SpecBranch(kind(torch.float32, tmp_path), draft)


def test_adapters_may_change_between_texts(draft: Any, tmp_path: Path) -> None:
    model = lora(torch.float32, tmp_path)
    engine = SpecBranch(model, draft, threads=1)
    adapted = engine.generate([5, 9, 300], max_new_tokens=16).tokens
    with model.disable_adapter():
        base = engine.generate([5, 9, 300], max_new_tokens=16).tokens
    assert base == SpecBranch(load(torch.float32), draft).generate([5, 9, 300], max_new_tokens=16).tokens
    assert engine.generate([5, 9, 300], max_new_tokens=16).tokens == adapted
    model.merge_adapter()
    assert engine.generate([5, 9, 300], max_new_tokens=16).tokens == adapted


def test_learned_prompts_are_refused(draft: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match=r"target adapter 'default' is PROMPT_TUNING: expected layers"):
        SpecBranch(peft.get_peft_model(load(torch.float32), config), draft)
