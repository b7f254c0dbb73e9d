"""What works with torch and numpy alone, and what is said where a package of an extra is missing."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from specbranch import SpecBranch, SpecBranchError
from specbranch.core import extras
from specbranch.core.extras import PACKAGES, MissingPackageError, check_installed

ROOT = Path(__file__).parents[1]
# Before anything else is imported. The packages of all extras are refused unless `allowed`.
WITHOUT = """
import sys
REFUSED = {refused}
class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refusing())
"""
CLI = "from specbranch.cli.main import main; sys.exit(main({arguments!r}))"


def run_without(refused: set[str], code: str) -> subprocess.CompletedProcess[str]:
    script = WITHOUT.format(refused=refused) + code
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def cli_without(refused: set[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_without(refused, CLI.format(arguments=list(arguments)))


ALL = {package for packages in PACKAGES.values() for package in packages}


def test_the_ops_and_the_values_need_torch_and_numpy_only() -> None:
    code = """
import torch, specbranch_ext, specbranch
from specbranch_ext import reference
logits, positions = torch.randn(3, 50), torch.arange(3)
given = dict(seed=5, temperature=0.7, top_k=0, top_p=1.0, min_p=0.0)
ours = specbranch_ext.draft_sample(logits, positions, 4, **given)
theirs = reference.draft_sample(logits, positions, 4, **given)
assert torch.equal(ours.tokens, theirs.tokens)
assert "specbranch" in specbranch.METHODS and specbranch.Sampling(temperature=0.5).temperature == 0.5
assert specbranch.__version__
assert not REFUSED & {*sys.modules}
"""
    done = run_without(ALL, code)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_engine_names_what_is_missing_and_the_line_that_installs_it() -> None:
    for package in PACKAGES["transformers"]:
        code = (
            "from specbranch import SpecBranchError\n"
            "for kind in (SpecBranchError, ImportError):\n"
            "    try:\n"
            "        from specbranch import SpecBranch\n"
            "    except kind as error:\n"
            "        print(error)\n"
        )
        done = run_without({package}, code)
        line = f"specbranch.SpecBranch needs {package}: pip install 'specbranch[transformers]'\n"
        assert (done.stdout, done.stderr) == (2 * line, "")


COMMANDS = [
    ("generate", "--target", "bundled", "--draft", "bundled", "--prompt", "x"),
    ("bench", "--target", "bundled", "--draft", "bundled", "--prompts", "p.jsonl"),
    ("record", "--target", "bundled", "--draft", "bundled", "--prompts", "p.jsonl", "--out", "r"),
    ("plan", "r"),
    ("train-hrad", "--target", "bundled", "--draft", "bundled", "--prompts", "p.jsonl", "--out", "r"),
    ("demo",),
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: str(arguments[0]))
def test_every_command_names_what_is_missing_on_one_line(arguments: tuple[str, ...]) -> None:
    missing = {"plan": "rich", "demo": "gguf"}.get(arguments[0], "transformers")
    done = cli_without({missing}, *arguments)
    line = f"specbranch: error: specbranch {arguments[0]} needs {missing}: pip install 'specbranch[cli]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)


@pytest.mark.parametrize("arguments", [(), ("--help",), ("--version",), *((each[0], "--help") for each in COMMANDS)])
def test_help_and_version_need_no_extra(arguments: tuple[str, ...]) -> None:
    done = cli_without(ALL, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("specbranch " if arguments == ("--version",) else "usage: specbranch")


def test_doctor_says_what_is_missing_and_what_there_is() -> None:
    done = cli_without(ALL, "doctor")
    assert (done.returncode, done.stderr) == (1, "")
    assert "specbranch generate needs transformers: pip install 'specbranch[cli]'" in " ".join(done.stdout.split())
    assert "isa levels: " in done.stdout


def test_a_device_map_needs_accelerate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    line = "device_map needs accelerate: pip install 'specbranch[accelerate]'"
    with pytest.raises(SpecBranchError) as caught:
        SpecBranch.from_pretrained("bundled", device_map="auto")
    assert str(caught.value) == line
    from specbranch.cli.main import main

    pair = ["--target", "bundled", "--method", "autoregressive"]
    assert main(["generate", *pair, "--device-map", "auto", "--prompt", "x"]) == 1
    assert capsys.readouterr().err == f"specbranch: error: {line}\n"


@pytest.mark.parametrize(
    ("version", "does"), [("5.16.9", False), ("5.17", True), ("5.99.0.dev0", True), ("6.0", False)]
)
def test_transformers_of_another_version(monkeypatch: pytest.MonkeyPatch, version: str, does: bool) -> None:
    monkeypatch.setattr(extras, "version", lambda name: version)
    monkeypatch.setattr(extras, "requires", lambda name: ["torch", 'transformers<6,>=5.17; extra == "transformers"'])
    if does:
        check_installed("This", "cli")
        return
    with pytest.raises(MissingPackageError) as caught:
        check_installed("This", "cli")
    expected = f"This needs transformers >=5.17,<6: found {version}; pip install 'specbranch[cli]'"
    assert str(caught.value) == expected


def test_the_extras_are_those_of_pyproject() -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = declared.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    found = {
        name: re.findall(r'"([\w-]+(?:\[[\w,-]+\])?)', line)
        for name, line in re.findall(r"^(\w+) = \[(.*?)\]$", table, re.M | re.S)
    }

    def all_of(extra: str) -> list[str]:
        parts = [all_of(each[11:-1]) if each.startswith("specbranch[") else [each] for each in found[extra]]
        return [name for part in parts for name in part]

    for extra, packages in PACKAGES.items():
        assert tuple(all_of(extra)) == packages, extra
    assert re.search(r'^dependencies = \["torch>=[\d.]+", "numpy"\]', declared, re.M)
    assert importlib.metadata.version("specbranch")


def test_the_doors_into_other_engines_do_too() -> None:
    done = run_without({"gguf"}, "import specbranch.integrations.vllm")
    assert done.stderr.splitlines()[-1].endswith(
        "specbranch.integrations needs gguf: pip install 'specbranch[transformers]'"
    )
