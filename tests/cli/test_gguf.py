"""GGUF files on the command line: every command takes them, and says in a line what it cannot do with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from specbranch.cli import main as cli

GENERATE = ["--prompt", "def f(n):\n    return", "--max-new-tokens", "12", "--threads", "1"]
SHORT = ["--max-new-tokens", "4", "--limit", "1", "--threads", "1"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    path.write_text(json.dumps({"id": "a", "prompt": "def f(x):"}) + "\n")
    return str(path)


def pair(folder: Path, end: str = ".gguf") -> list[str]:
    return ["--target", str(folder / f"target{end}"), "--draft", str(folder / f"draft{end}")]


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    return said.err


def test_generate(capsys: pytest.CaptureFixture[str], gguf_pair: Path) -> None:
    found = []
    for end, options in ((".gguf", []), (".gguf", ["--draft-arithmetic", "exact", "--dtype", "bfloat16"]), ("", [])):
        assert cli.main(["generate", *pair(gguf_pair, end), *GENERATE, *options, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["tokens"] == found[1]["tokens"] == found[2]["tokens"]
    assert found[0]["finish_reason"] == found[2]["finish_reason"]
    assert found[0]["stats"]["target_weights"]


def test_doctor(capsys: pytest.CaptureFixture[str], gguf_pair: Path, tmp_path: Path) -> None:
    assert cli.main(["doctor", "--json", *pair(gguf_pair), "--load"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["cuda_graphs"]["target"] == "refused on CUDA: weights of a GGUF file run on the CPU"
    assert [weights.split(" (")[0] for weights in findings["loaded"]["weights"]] == ["bfloat16", "bfloat16"]
    assert all(weights.endswith(")") for weights in findings["loaded"]["weights"])
    assert findings["loaded"]["same_tokens"]
    path = tmp_path / "half.gguf"
    path.write_bytes((gguf_pair / "target.gguf").read_bytes()[:1_000_000])
    assert cli.main(["doctor", "--json", "--target", str(path)]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert problem.startswith(f"target {path}: not a whole file: ")
    said = failure(capsys, "generate", "--target", str(path), "--method", "autoregressive", *GENERATE)
    assert said == f"specbranch: error: {problem}\n"


def test_bench_and_its_peers(capsys: pytest.CaptureFixture[str], gguf_pair: Path, prompts: str, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    run = ["bench", *pair(gguf_pair), "--prompts", prompts, *SHORT]
    assert cli.main([*run, "--json", str(out)]) == 0
    capsys.readouterr()
    report = json.loads(out.read_text())
    assert all(report["settings"]["weights"].values())
    tokens = {record["name"]: record["error"] for record in report["records"]}
    assert tokens.keys() >= {"specbranch", "autoregressive", "greedy", "assisted", "prompt-lookup"}
    assert set(tokens.values()) == {None}
    line = failure(capsys, *run, "--peers", "vllm-plain")
    assert "--peers vllm needs checkpoints, not the GGUF file" in line


def test_record_and_plan(capsys: pytest.CaptureFixture[str], gguf_pair: Path, prompts: str, tmp_path: Path) -> None:
    out = str(tmp_path / "r.safetensors")
    assert cli.main(["record", *pair(gguf_pair), "--prompts", prompts, "--out", out, *SHORT]) == 0
    capsys.readouterr()
    assert cli.main(["plan", out]) == 0
    assert "specbranch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--dtype", "float32"], "dtype float32; expected auto or bfloat16 for a GGUF file"),
        (["--device", "cuda"], "packed weights run on the CPU, not with device cuda"),
        (["--device-map", "auto"], "packed weights run on the CPU, not with device_map 'auto'"),
        (["--target-weights", "lossless"], "target_weights is 'lossless', but weights of"),
    ],
)
def test_options_that_do_not_fit(
    capsys: pytest.CaptureFixture[str], gguf_pair: Path, options: list[str], line: str
) -> None:
    assert line in failure(capsys, "generate", *pair(gguf_pair), *GENERATE, *options)


def test_arithmetic_without_blocks(capsys: pytest.CaptureFixture[str], gguf_pair: Path) -> None:
    run = ["generate", *pair(gguf_pair, ""), *GENERATE]
    assert "are not in blocks" in failure(capsys, *run, "--draft-arithmetic", "fast")
    alone = ["generate", "--target", str(gguf_pair / "target"), "--method", "autoregressive", *GENERATE]
    assert "--draft-arithmetic has no effect without --draft" in failure(capsys, *alone, "--draft-arithmetic", "fast")
