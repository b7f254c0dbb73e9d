"""The compiled module: what it was built with, every level that this processor has, and its absence."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import specbranch_ext

LEVELS = ["baseline", "avx2", "avx512", "bf16", "amx"]
HERE = Path(specbranch_ext.__file__).parent

SAMPLE = """
import os
import sys
import torch
from specbranch_ext import build_info, draft_sample, linear, pack_blocks, pack_weight, packed_linear, quantize_weight
from specbranch_ext import reference, tree_attention, verify
from specbranch_ext.packed import BLOCKS

generator = torch.Generator().manual_seed(0)
for vocabulary in (37, 10_007):
    logits = torch.randn(2, vocabulary, generator=generator) * 2
    positions = torch.arange(2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for options in ({}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 100, "top_p": 0.9, "min_p": 0.01}):
            arguments = (logits.to(dtype), positions, 5)
            ours = draft_sample(*arguments, seed=3, **options)
            expected = reference.draft_sample(*arguments, seed=3, **options)
            assert torch.equal(ours.tokens, expected.tokens) and torch.equal(ours.scores, expected.scores)
            arguments = (logits.to(dtype), positions, positions - 1, positions)
            ours, expected = verify(*arguments, **options), reference.verify(*arguments, **options)
            assert torch.equal(ours.target_tokens, expected.target_tokens)
query = torch.randn(3, 4, 24, generator=generator)
keys, values = torch.randn(2, 2, 40, 24, generator=generator)
torch.testing.assert_close(tree_attention(query, keys, values, 30), reference.tree_attention(query, keys, values, 30))
for rows, size_in, size_out in ((1, 40, 30), (9, 1100, 21), (30, 96, 130)):
    x, w = torch.randn(rows, size_in, generator=generator), torch.randn(size_out, size_in, generator=generator)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        together = linear(x.to(dtype), w.to(dtype))
        torch.testing.assert_close(together, reference.linear(x.to(dtype), w.to(dtype)), rtol=0.01, atol=1e-3)
        assert torch.equal(together, torch.cat([linear(row[None], w.to(dtype)) for row in x.to(dtype)]))
        if dtype == torch.bfloat16:
            assert torch.equal(together, packed_linear(x.to(dtype), pack_weight(w.to(dtype))))
sys.path.insert(0, os.environ["SUPPORT"])
from gguf_blocks import decoded, make_blocks
for format in BLOCKS:
    blocks = make_blocks(format, 37, 512)
    x = torch.randn(13, 512, generator=generator).bfloat16()
    exact, fast = (pack_blocks(blocks, format, arithmetic) for arithmetic in ("exact", "fast"))
    assert torch.equal(packed_linear(x, exact), linear(x, decoded(blocks, format)))
    assert torch.equal(packed_linear(x, fast), reference.packed_linear(x, fast))
for format in ("q8_0", "q4_0"):
    w = torch.randn(19, 96, generator=generator).bfloat16()
    assert torch.equal(quantize_weight(w, format), reference.quantize_weight(w, format))
print(build_info()["isa"])
"""


def run(code: str, folder: Path = HERE.parent, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in `folder`, where Python looks for packages first."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **environment},
        check=False,
    )


def test_build_info():
    info = specbranch_ext.build_info()
    assert info["isa"] in info["isa_levels"]
    assert info["cuda"] or info["cuda_reason"]
    assert info["compiler"]


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_equals_the_reference(level):
    chosen = specbranch_ext.build_info()["isa"]
    if level == chosen:
        pytest.skip("the other tests run this level")
    result = run(SAMPLE, SPECBRANCH_ISA=level, SUPPORT=str(Path(__file__).parents[1] / "support"))
    missing = f"SPECBRANCH_ISA={level}: this processor or build has only"
    if LEVELS.index(level) > LEVELS.index(chosen) and "SPECBRANCH_ISA" not in os.environ:
        assert missing in result.stderr
    else:
        assert result.stdout.split() == [level], result.stderr


def test_import_without_the_compiled_module_says_what_to_do(tmp_path):
    shutil.copytree(HERE, tmp_path / "specbranch_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "setup.py").touch()
    # An editable install's finder would still find the compiled module of the installed package.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]; import specbranch_ext"
    error = run(code, tmp_path).stderr
    assert "ImportError: specbranch_ext was imported without its compiled module" in error
    assert "pip install -e ." in error
    assert "Python found the source folder" in error


def test_the_module_links_no_torch_library():
    if sys.platform != "linux" or shutil.which("ldd") is None:
        pytest.skip("needs ldd")
    module = Path(specbranch_ext._C.__file__)
    needed = subprocess.run(["ldd", str(module)], capture_output=True, text=True, check=True).stdout
    names = [line.split()[0] for line in needed.splitlines()]  # not the addresses: those may well hold "c10"
    assert not [name for name in names if "torch" in name or "c10" in name]
