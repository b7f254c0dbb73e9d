"""The bundled pair: sizes, architecture, tokenizer and the agreement that makes speculation worthwhile."""

# mypy: allow-untyped-calls

from __future__ import annotations

import ast
import importlib.util
import json
import math
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]


def load_module(path: Path) -> ModuleType:
    # By path: these tests need neither the compiled core nor an installation.
    spec = importlib.util.spec_from_file_location(path.parent.name + "_" + path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bundled = load_module(ROOT / "python" / "specbranch" / "bundled" / "__init__.py")
TARGET: Path = bundled.path("target")
DRAFT: Path = bundled.path("draft")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    # Models this small gain nothing from a second thread, and lose much when the machine is busy.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TARGET)


@pytest.fixture(scope="module")
def target() -> Any:
    return AutoModelForCausalLM.from_pretrained(TARGET).eval()


@pytest.fixture(scope="module")
def draft() -> Any:
    return AutoModelForCausalLM.from_pretrained(DRAFT).eval()


@pytest.fixture(scope="module")
def held_out_pieces(tokenizer: Any) -> list[torch.Tensor]:
    """int64 [<= 512] pieces, the beginnings of standard library files that the models were not trained on."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [library / name for name in bundled.card()["held_out"]["files"] if (library / name).exists()]
    assert len(files) >= 12
    texts = [file.read_text(encoding="utf-8")[:1000] for file in files]
    return [torch.tensor([tokenizer.bos_token_id, *tokenizer(text).input_ids])[:512] for text in texts]


@pytest.fixture(scope="module")
def logits_pairs(
    target: Any, draft: Any, held_out_pieces: list[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """For every held-out piece (target_logits, draft_logits), float32 [n, V] each."""
    with torch.inference_mode():
        return [(target(piece[None]).logits[0], draft(piece[None]).logits[0]) for piece in held_out_pieces]


def greedy_ids(model: Any, ids: list[int], new_tokens: int) -> list[int]:
    output = model.generate(torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False)
    new_ids: list[int] = output[0, len(ids) :].tolist()
    return new_ids


def test_names() -> None:
    with pytest.raises(ValueError, match="target, draft"):
        bundled.path("teacher")


def test_together_at_most_8_megabytes() -> None:
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (TARGET, DRAFT)]
    assert sum(sizes) <= 8_000_000
    assert sizes == [bundled.card()[name]["bytes"] for name in ("target", "draft")]


def test_one_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (TARGET / name).read_bytes() == (DRAFT / name).read_bytes()


def test_llama_architecture_thin_target_shallow_draft(target: Any, draft: Any, tokenizer: Any) -> None:
    for model in (target, draft):
        assert type(model).__name__ == "LlamaForCausalLM"
        assert model.dtype == torch.float32  # stored as float16; config.json asks for float32
        assert model.config.vocab_size == len(tokenizer)
        assert model.config.max_position_embeddings >= 1024
    assert target.config.num_hidden_layers >= 12
    assert draft.config.num_hidden_layers <= 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "def f(x):\n    return x\n",
        "tabs\tand\r\nlines\n\n\n",
        "naïve café",
        "日本語",
        "👩‍👩‍👧 🎉",
        "\x00\x7f\u2028",
        "a  b   c ",
        " ,  .  ! don ' t",
    ],
)
def test_tokenizer_round_trip(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < len(tokenizer) for i in ids)


def test_end_of_text_token(tokenizer: Any, target: Any) -> None:
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer("a<|endoftext|>b").input_ids[1] == tokenizer.eos_token_id
    assert target.config.eos_token_id == target.generation_config.eos_token_id == tokenizer.eos_token_id


def test_greedy_agreement_on_held_out_files(logits_pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    same = [target_logits.argmax(-1) == draft_logits.argmax(-1) for target_logits, draft_logits in logits_pairs]
    count = sum(row.numel() for row in same)
    assert count >= 3000
    assert 0.55 <= sum(int(row.sum()) for row in same) / count <= 0.85


def test_target_is_better_than_draft_on_held_out_files(
    logits_pairs: list[tuple[torch.Tensor, torch.Tensor]], held_out_pieces: list[torch.Tensor], tokenizer: Any
) -> None:
    losses = [0.0, 0.0]  # nats a token, target and draft
    for pair, piece in zip(logits_pairs, held_out_pieces, strict=True):
        for model, logits in enumerate(pair):
            losses[model] += float(F.cross_entropy(logits[:-1], piece[1:])) / len(held_out_pieces)
    assert losses[0] < losses[1] < 0.6 * math.log(len(tokenizer))


def test_no_ties_for_the_best_token(logits_pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for logits in logits_pairs[0]:
        best = logits.topk(2).values
        assert (best[:, 0] > best[:, 1]).all()


def test_greedy_text_looks_like_python(target: Any, tokenizer: Any) -> None:
    prompts = [p["prompt"] for p in bundled.prompts()[:6]]
    texts = [p + tokenizer.decode(greedy_ids(target, tokenizer(p).input_ids, 40)) for p in prompts]
    good = [begins_with_python(text, len(prompt)) for prompt, text in zip(prompts, texts, strict=True)]
    assert sum(good) >= len(prompts) // 2


def begins_with_python(text: str, start: int) -> bool:
    """Whether some beginning of the text that holds a whole new line behind `start` is valid Python."""
    line_ends = [i for i, character in enumerate(text) if character == "\n" and i > start]
    for end in line_ends[1:]:
        try:
            ast.parse(text[:end])
        except SyntaxError:
            continue
        return True
    return False


def test_prompts() -> None:
    prompts = bundled.prompts()
    assert len(prompts) >= 20
    assert len({p["id"] for p in prompts}) == len({p["prompt"] for p in prompts}) == len(prompts)
    assert all(p["chat"] is False and p["prompt"].strip() for p in prompts)


def test_card_is_about_these_files() -> None:
    card = json.loads((TARGET.parent / "CARD.json").read_text(encoding="utf-8"))
    assert 0.55 <= card["held_out"]["greedy_agreement"] <= 0.85
    assert card["target"]["layers"] == json.loads((TARGET / "config.json").read_text())["num_hidden_layers"]
    assert card["draft"]["layers"] == json.loads((DRAFT / "config.json").read_text())["num_hidden_layers"]
