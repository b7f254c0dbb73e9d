"""Packed weights in models: the same texts, less memory, and a line for what cannot be packed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, PROMPT, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from specbranch import SpecBranch, SpecBranchError
from specbranch.runtime import packing, quicker, support
from specbranch.runtime.identity import identify
from specbranch.runtime.packed import PackedEmbedding, PackedLinear, weight_format
from specbranch.runtime.packing import pack_model
from specbranch_ext import pack_blocks, quantize_weight, unpack_rows


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """A target and a draft, saved in bfloat16."""
    for name, seed in (("target", 0), ("draft", 1)):
        tiny_model("qwen2", seed, torch.bfloat16, tie_word_embeddings=True).save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in ("target", "draft")}


def engine(folders: dict[str, str], **options: Any) -> SpecBranch:
    # The tokenizer is not needed, and a saved model has none.
    from specbranch.runtime.loading import load_model

    models = {}
    for role, folder in folders.items():
        models[role] = load_model(folder, role, "auto", "cpu")
        packing.pack_loaded(folder, models[role], role, options.get(f"{role}_weights", "keep"))
    return SpecBranch(models["target"], models["draft"])


def texts(engine: SpecBranch) -> list[list[int]]:
    return [
        engine.generate(PROMPT, max_new_tokens=24, temperature=temperature, top_k=0, seed=3, method=method).tokens
        for temperature in (0.0, 1.0)
        for method in ("autoregressive", "specbranch")
    ]


def test_texts_are_those_of_the_weights_as_they_were(folders: dict[str, str]) -> None:
    kept = engine(folders)
    for roles in (("target",), ("draft",), ("target", "draft")):
        other = engine(folders, **{f"{role}_weights": "lossless" for role in roles})
        assert texts(other) == texts(kept)
        stats = other.generate(PROMPT, max_new_tokens=4, temperature=0).stats.as_dict()
        assert stats["target_weights"] == ("lossless" if "target" in roles else "")
        assert stats["draft_weights"] == ("lossless" if "draft" in roles else "")
        assert stats["row_dependent"] == ""
    assert identify(other.target) == identify(kept.target)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_of_every_family(family: str, tied: bool) -> None:
    overrides = {**FAMILIES[family], "tie_word_embeddings": tied}
    model, other = (tiny_model(family.split("-")[0], 0, torch.bfloat16, **overrides) for _ in range(2))
    before = sum(weight.nbytes for weight in other.parameters())
    assert pack_model(other, "target", "lossless") == weight_format(other) == "lossless"
    kinds = [type(module) for module in other.modules()]
    assert PackedLinear in kinds
    # An embedding that scales its rows, and what shares its weight, stays as it is.
    plain = type(model.get_input_embeddings()) is nn.Embedding
    assert (nn.Linear in kinds) == (tied and not plain)
    assert (PackedEmbedding in kinds) == (tied and plain)
    after = sum(weight.nbytes for weight in other.parameters())
    assert after < before / (4 if tied and plain else 1)
    engines = [SpecBranch(each, method="autoregressive") for each in (model, other)]
    ours = [each.generate(PROMPT, max_new_tokens=20, temperature=0).tokens for each in engines]
    assert ours[0] == ours[1]


def test_memory_of_a_weight_that_is_shared_is_taken_once() -> None:
    model = tiny_model("qwen2", 0, torch.bfloat16, tie_word_embeddings=True)
    pack_model(model, "target", "lossless")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, PackedEmbedding)
    assert isinstance(head, PackedLinear)
    assert embedding.packed.data_ptr() == head.packed.data_ptr()
    rows = tiny_model("qwen2", 0, torch.bfloat16, tie_word_embeddings=True).get_input_embeddings()
    ids = torch.tensor([[3, 0, 31], [7, 7, 1]])
    assert torch.equal(embedding(ids), rows(ids))


# ---- What is not packed


class Nosy(nn.Module):
    """Looks at its layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, input: Tensor) -> Tensor:
        return input.to(self.layer.weight.dtype) + self.layer(input)


def nosy_model() -> PreTrainedModel:
    model = tiny_model("llama", 0, torch.bfloat16)
    layers: Any = model.model.layers
    layers[0].mlp = Nosy().to(torch.bfloat16)
    return model


def test_a_weight_that_somebody_else_holds_stays() -> None:
    model: Any = tiny_model("llama", 0, torch.bfloat16, tie_word_embeddings=False)
    model.model.layers[0].mlp.other = nn.ParameterList([model.model.layers[0].mlp.up_proj.weight])
    pack_model(model, "target", "lossless")
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert type(model.model.layers[1].mlp.up_proj) is PackedLinear


def quantised() -> PreTrainedModel:
    model: Any = tiny_model("llama", 0, torch.bfloat16)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, torch.nn.Identity())
    return model


def on_meta() -> PreTrainedModel:
    return tiny_model("llama", 0, torch.bfloat16).to(torch.device("meta"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: tiny_model("llama"), "expected weights of bfloat16, found float32"),
        (quantised, "LlamaForCausalLM has no linear layer with a weight of its own that can be packed"),
        (on_meta, "packed weights run on the CPU, not on meta"),
    ],
)
def test_what_cannot_be_packed_is_said(make: Any, line: str) -> None:
    with pytest.raises(SpecBranchError, match=f"^target_weights is 'lossless', but {line}$"):
        pack_model(make(), "target", "lossless")
    assert pack_model(make(), "target", "auto") == ""


def test_a_model_that_asks_for_a_layers_weight_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    twin = support.meta_twin

    def nosy_twin(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
        made: Any = twin(model, dtype)
        made.model.layers[0].mlp = Nosy().to("meta", dtype)
        return made

    monkeypatch.setattr(packing, "meta_twin", nosy_twin)
    model = nosy_model()
    with pytest.raises(SpecBranchError, match="LlamaForCausalLM does not run with packed weights: 'PackedLinear'"):
        pack_model(model, "draft", "lossless")
    assert weight_format(model) == ""


@pytest.mark.parametrize("value", ["int3", None, 3, True, ""])
def test_unknown_words(value: object) -> None:
    with pytest.raises(
        SpecBranchError, match=r"^draft_weights is .*; expected one of auto, keep, lossless, int8, int4$"
    ):
        SpecBranch.from_pretrained("bundled", "bundled", draft_weights=value)  # type: ignore[arg-type]


def test_a_loaded_model_stays_as_it_is() -> None:
    model = tiny_model("llama", 0, torch.bfloat16)
    for word in ("lossless", "int8", "int4"):
        with pytest.raises(SpecBranchError, match=rf"^target_weights is '{word}', but target is a loaded model"):
            SpecBranch.from_pretrained(model, target_weights=word)
    with pytest.raises(
        SpecBranchError, match=r"^target_arithmetic is 'fast', but the weights of the loaded target are"
    ):
        SpecBranch.from_pretrained(model, target_arithmetic="fast")
    SpecBranch.from_pretrained(model)
    assert weight_format(model) == ""


# ---- 8 and 4 bits


@pytest.mark.parametrize(("word", "format"), [("int8", "q8_0"), ("int4", "q4_0")])
def test_rounded_weights_are_those_of_a_rounded_checkpoint(word: str, format: str) -> None:
    """A target's: exact products over them are those over their values."""
    model, twin = (tiny_model("llama", 0, torch.bfloat16, intermediate_size=64) for _ in range(2))
    assert pack_model(model, "target", word) == weight_format(model) == format
    for name, weight in twin.named_parameters():
        if weight.dim() == 2 and ("proj" in name or "lm_head" in name):
            blocks = quantize_weight(weight.detach(), format)
            weight.data = unpack_rows(pack_blocks(blocks, format), torch.arange(len(weight)))
    prompt = [5, 3, 8, 1, 9]
    options: dict[str, Any] = {"max_new_tokens": 20, "method": "autoregressive", "temperature": 0}
    ours, others = (SpecBranch(each).generate(prompt, **options).tokens for each in (model, twin))
    assert ours == others


@pytest.mark.parametrize("word", ["int8", "int4"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_rounded_draft_changes_no_text(word: str, temperature: float) -> None:
    engine = SpecBranch.from_pretrained("bundled", "bundled", dtype="bfloat16", draft_weights=word)
    assert weight_format(engine.models["draft"]) == {"int8": "q8_0", "int4": "q4_0"}[word]
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": temperature, "seed": 7}
    for method in ("speculative", "specbranch"):
        text = engine.generate("def add(a, b):", method=method, **options)
        assert text.tokens == engine.generate("def add(a, b):", method="autoregressive", **options).tokens


@pytest.mark.parametrize(("arithmetic", "expected"), [(None, "fast"), ("exact", "exact"), ("fast", "fast")])
def test_the_arithmetic_of_a_rounded_draft(arithmetic: str | None, expected: str) -> None:
    model = tiny_model("llama", 0, torch.bfloat16)
    pack_model(model, "draft", "int4", arithmetic)
    assert {module.arithmetic for module in model.modules() if isinstance(module, PackedLinear)} == {expected}


def test_a_target_drafts_for_itself() -> None:
    engine = SpecBranch.from_pretrained("bundled", "self", dtype="bfloat16")
    assert weight_format(engine.models["target"]) in ("", "lossless")
    assert weight_format(engine.models["draft"]) == "q4_0"
    text = engine.generate("def add(a, b):", max_new_tokens=40, method="speculative", temperature=0)
    plain = engine.generate("def add(a, b):", max_new_tokens=40, method="autoregressive", temperature=0)
    assert text.tokens == plain.tokens
    assert text.stats.accepted > 0
    with pytest.raises(SpecBranchError, match=r"^draft is 'self', but target is a loaded model"):
        SpecBranch.from_pretrained(engine.models["target"], "self")


def test_rows_that_are_no_whole_blocks_are_kept() -> None:
    model = tiny_model("llama", 0, torch.bfloat16, intermediate_size=48)
    pack_model(model, "draft", "int4")
    layer = model.model.layers[0].mlp
    assert isinstance(layer.up_proj, PackedLinear)
    assert type(layer.down_proj) is nn.Linear


def test_an_embedding_that_shares_a_rounded_weight_keeps_its_own() -> None:
    model: Any = tiny_model("qwen2", 0, torch.bfloat16, tie_word_embeddings=True)
    before = model.get_input_embeddings().weight.clone()
    pack_model(model, "draft", "int4")
    assert isinstance(model.get_output_embeddings(), PackedLinear)
    assert torch.equal(model.get_input_embeddings().weight, before)


@pytest.mark.parametrize("isa", ["avx2", "avx512", "bf16", "amx"])
def test_auto_rounds_a_large_draft(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "packed_sample", lambda *arguments: pytest.fail("measured"))
    monkeypatch.setattr(packing, "build_info", lambda: {"isa": isa})
    model = tiny_model("llama", 0, torch.bfloat16)
    assert pack_model(model, "draft", "auto") == ""  # a small one stays in the caches
    monkeypatch.setattr(packing, "LEAST", 0)
    assert pack_model(model, "draft", "auto") == "q4_0"
    monkeypatch.setattr(packing, "build_info", lambda: {"isa": "baseline"})
    assert pack_model(tiny_model("llama", 0, torch.bfloat16), "draft", "auto") == ""


# ---- auto


@pytest.fixture(params=["bf16", "amx"])
def measured(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Ratios that `auto` measures, one after the other."""
    ratios: list[float] = []
    monkeypatch.setattr(quicker, "_ratio", lambda *arguments: ratios.pop(0))
    monkeypatch.setattr(packing, "LEAST", 0)
    monkeypatch.setattr(packing, "build_info", lambda: {"isa": request.param})
    yield ratios
    assert not ratios


def test_auto_packs_where_that_is_faster(measured: list[float]) -> None:
    model = tiny_model("llama", 0, torch.bfloat16)
    measured += [1.0, 1.0]
    assert pack_model(model, "target", "auto") == weight_format(model) == ""
    measured += [0.8, 1.05]
    assert pack_model(model, "target", "auto") == weight_format(model) == "lossless"


def test_auto_keeps_what_is_small_and_what_has_no_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "packed_sample", lambda *arguments: pytest.fail("measured"))
    model = tiny_model("llama", 0, torch.bfloat16)
    assert pack_model(model, "target", "auto") == ""
    monkeypatch.setattr(packing, "LEAST", 0)
    monkeypatch.setattr(packing, "build_info", lambda: {"isa": "avx512"})
    assert pack_model(model, "target", "auto") == ""


def test_the_measurement_runs() -> None:
    model = tiny_model("llama", 0, torch.bfloat16)
    before = torch.get_num_threads()
    weights = [weight for weight, _ in packing._packable(model, "lossless")[0]]
    assert len(quicker.packed_sample(weights, 1)) in (0, len(weights))
    assert torch.get_num_threads() == before
