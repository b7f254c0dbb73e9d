"""--max-requests: several prompts of a file at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from specbranch import GenerationInterrupted, bundled
from specbranch.cli import main as cli
from specbranch.several import Several

PAIR = ["--target", "bundled", "--draft", "bundled", "--threads", "1"]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "some.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in bundled.prompts()[:5]), encoding="utf-8")
    return str(file)


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_same_output_in_the_order_of_the_file(
    capsys: pytest.CaptureFixture[str], prompts: str, form: list[str]
) -> None:
    asked = ["generate", *PAIR, "--prompts", prompts, "--max-new-tokens", "14", "--temperature", "0.7", *form]
    _, alone, _ = output(capsys, *asked)
    status, together, _ = output(capsys, *asked, "--max-requests", "3")
    assert status == 0

    def lines(text: str) -> list[Any]:
        return [json.loads(line) | {"stats": None} if form else line for line in text.splitlines()]

    assert lines(together) == lines(alone)


def test_one_that_fails_leaves_the_others(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    long = {"id": "long", "prompt": "a b c " * 3000}
    file = tmp_path / "some.jsonl"
    records = [bundled.prompts()[0], long, bundled.prompts()[1]]
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    asked = ["generate", *PAIR, "--prompts", str(file), "--max-new-tokens", "8", "--json", "--max-requests", "2"]
    status, out, err = output(capsys, *asked)
    assert status == 1
    assert [json.loads(line)["id"] for line in out.splitlines()] == [records[0]["id"], records[2]["id"]]
    assert err.startswith("specbranch: error: prompt long: ")


def test_ctrl_c_prints_what_there_is(
    capsys: pytest.CaptureFixture[str], prompts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance, left = Several.advance, iter(range(4))

    def interrupted(self: Several) -> list[int]:
        if next(left, None) is None:
            ending: GenerationInterrupted = self.interrupted()
            raise ending
        return advance(self)

    monkeypatch.setattr(Several, "advance", interrupted)
    asked = ["generate", *PAIR, "--prompts", prompts, "--max-new-tokens", "60", "--json", "--max-requests", "5"]
    status, out, err = output(capsys, *asked)
    assert status == 130
    assert [json.loads(line)["finish_reason"] for line in out.splitlines()] == ["interrupted"] * 5
    assert err == "specbranch: interrupted\n"


def test_it_is_for_files(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = output(capsys, "generate", *PAIR, "--prompt", "one", "--max-requests", "2")
    assert status == 1
    assert err == "specbranch: error: --max-requests has no effect with --prompt; it is for --prompts\n"


def test_bench(capsys: pytest.CaptureFixture[str], tmp_path: Path, prompts: str) -> None:
    out = tmp_path / "out.json"
    asked = ["bench", *PAIR, "--prompts", prompts, "--methods", "specbranch", "--peers", "greedy"]
    status, table, _ = output(capsys, *asked, "--max-new-tokens", "12", "--max-requests", "2", "--json", str(out))
    assert status == 0
    assert "2 prompts at once" in table
    records = json.loads(out.read_text())["records"]
    assert len(records) == 5 * 3
    ours = [record for record in records if record["name"] == "specbranch"]
    assert all(record["same_tokens"] for record in ours)
    speeds = [round(record["tokens_per_second"], 6) for record in ours]
    assert speeds[0] == speeds[1]  # of one group
    assert len(set(speeds)) == 3
