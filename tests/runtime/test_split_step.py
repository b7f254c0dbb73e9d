"""benchmarks/split_step.py: it runs, and what it says adds up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import split_step


def test_a_step_is_split_by_op(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "split.json"
    options = ["--role", "draft", "--rows", "1", "3", "--rounds", "2", "--unfused", "--threads", "1", "--out", str(out)]
    split_step.main(options)
    report = json.loads(out.read_text())
    assert [found["rows"] for found in report["splits"]] == [1, 3]
    for found in report["splits"]:
        fused, own = found["calls"]["fused"], found["calls"]["unfused"]
        assert fused["specbranch::linear"] == 4 * 2 + 1  # of two layers, and the output layer
        assert own["specbranch::linear"] == 7 * 2 + 1
        assert fused["specbranch::rotary_commit"] == fused["specbranch::tree_attention"] == 2
        assert "specbranch::rms_norm" not in own
        assert all(milliseconds > 0 for times in found["milliseconds"].values() for milliseconds in times.values())
    shown = capsys.readouterr().out
    assert "1 rows, fused: " in shown
    assert "% outside products" in shown
