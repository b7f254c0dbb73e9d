"""The example decoder runs on the bundled pair and gives the target's own tokens."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specbranch import SpecBranch, bundled

EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_decoder.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("custom_decoder", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pair():
    return [AutoModelForCausalLM.from_pretrained(bundled.path(name)).eval() for name in ("target", "draft")]


@pytest.fixture(scope="module")
def prompt_ids():
    tokenizer = AutoTokenizer.from_pretrained(bundled.path("target"))
    return [tokenizer(record["prompt"]).input_ids for record in bundled.prompts()[:3]]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.95, "seed": 5}])
@pytest.mark.parametrize(("depth", "width"), [(4, 2), (3, 1), (1, 4)])
def test_every_tree_gives_the_tokens_of_plain_decoding(example, pair, prompt_ids, sampling, depth, width):
    forwards, plain_forwards = 0, 0
    for ids in prompt_ids:
        plain, count = example.generate(*pair, ids, max_new_tokens=24, depth=0, **sampling)
        assert count == len(plain) <= 24
        plain_forwards += count
        options = {"depth": depth, "width": width, **sampling}
        tokens, count = example.generate(*pair, ids, max_new_tokens=24, **options)
        assert tokens == plain
        forwards += count
    assert forwards < plain_forwards


def test_greedy_text_is_that_of_transformers(example, pair, prompt_ids):
    for ids in prompt_ids:
        tokens, _ = example.generate(*pair, ids, max_new_tokens=24)
        own = pair[0].generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :]
        assert tokens == own.tolist()


def test_the_scheduler_gives_the_same_tokens(example, pair, prompt_ids):
    engine = SpecBranch.from_pretrained("bundled", draft="bundled", threads=1)
    sampling: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "seed": 2}
    for ids in prompt_ids:
        tokens, _ = example.generate(*pair, ids, max_new_tokens=24, **sampling)
        assert tokens == engine.generate(ids, max_new_tokens=24, **sampling).tokens


def test_it_runs_as_a_script():
    command = [sys.executable, str(EXAMPLE), "--prompt", "def main():", "--max-new-tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def main():")
    assert "target forwards" in done.stdout
