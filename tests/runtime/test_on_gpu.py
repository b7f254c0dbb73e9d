"""scripts/on_gpu.sh without a GPU: every stage's command runs, and nothing that was made is lost."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts/on_gpu.sh"


def on_gpu(*arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def stages(out: Path) -> dict[str, tuple[str, str]]:
    """Seconds and status of each."""
    _, *lines = (out / "stages.tsv").read_text().splitlines()
    return {name: (seconds, status) for name, seconds, status in (line.split("\t") for line in lines)}


def test_every_stage_runs_at_tiny_sizes(tmp_path: Path) -> None:
    """A typo must not cost the minutes that a GPU is at hand."""
    done = on_gpu("--dry-run", "900", str(tmp_path))
    assert done.returncode == 0, done.stdout[-5000:]
    found = stages(tmp_path)
    assert len(found) == 16
    assert {status for _, status in found.values()} == {"0"}
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        files = {Path(name).name for name in archive.getnames()}
        rows = json.load(archive.extractfile("./llama.json"))["rows"]  # type: ignore[arg-type]
    decoding = {f"{name}.json" for name in ("qwen", "qwen_weak", "qwen_draft_first", "llama", "llama_weak")}
    assert {*decoding, "deepseek.json", "vicuna.json", "ops.jsonl", "profile.json", "log.txt", "stages.tsv"} <= files
    runners = {row["name"]: row["runners"]["target"] for row in rows if "runners" in row}
    assert set(runners.values()) == {"captured"}
    assert len(list(tmp_path.iterdir())) == 3  # what comes back from a machine may be a few files only


def test_what_there_is_no_time_for_is_left_out_and_said(tmp_path: Path) -> None:
    done = on_gpu("--dry-run", "6", str(tmp_path), "probe", "profile", "ops")
    assert done.returncode != 0
    found = stages(tmp_path)
    assert found["probe"][1] == "0"
    assert found["ops"] == ("0", "left out: no time")
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert {"log.txt", "stages.tsv"} <= set(archive.getnames())


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    for arguments, message in (
        ((), "BUDGET OUT"),
        (("soon", str(tmp_path)), "BUDGET OUT"),
        (("60", str(tmp_path), "lunch"), "there is no stage 'lunch'"),
    ):
        done = on_gpu(*arguments)
        assert done.returncode == 2
        assert message in done.stdout
    done = on_gpu("--dry-run", "60", str(tmp_path / "out"), "probe", python="python-of-nobody")
    assert done.returncode != 0
    assert "there is no python-of-nobody" in done.stdout
