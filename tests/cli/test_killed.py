"""Runs that are killed at any moment and started again end with what an uninterrupted one gives, to the bit, but for
what is measured in seconds; and nothing else is left behind."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import Killer

from specbranch import bundled
from specbranch.replay.record import Record

PAIR = ["--target", "bundled", "--draft", "bundled", "--threads", "1", "--overlap", "off"]
TIMED = {"command", "interrupted", "machine", "resumed", "rows", "memory", "memory_over_bytes"}


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    with Killer() as killer:
        yield killer


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts" / "some.jsonl"
    file.parent.mkdir()
    lines = (json.dumps({"id": record["id"], "prompt": record["prompt"]}) for record in bundled.prompts()[:5])
    file.write_text("\n".join(lines), encoding="utf-8")
    return str(file)


def untimed(value: Any) -> Any:
    """What of a report is not measured in seconds or bytes of this process."""
    if isinstance(value, dict):
        kept = {key: each for key, each in value.items() if key not in TIMED and not is_time(key)}
        return {key: untimed(each) for key, each in kept.items()}
    return [untimed(each) for each in value] if isinstance(value, list) else value


def is_time(key: str) -> bool:
    return any(word in key for word in ("second", "resident", "busy", "ratio", "utilization", "throughput"))


def tensors(record: Record) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor | None] = {}
    for number, text in enumerate(record.texts):
        found |= {f"{number}.tokens": text.tokens, f"{number}.features": text.features}
        found |= {f"{number}.said.{name}": values for name, values in vars(text.proposals).items()}
        found |= {f"{number}.tails.{name}": values for name, values in vars(text.tails).items()}
    return {name: values for name, values in found.items() if values is not None}


def same_record(a: Path, b: Path) -> bool:
    one, two = Record.load(a), Record.load(b)
    mine, yours = tensors(one), tensors(two)
    bits = [torch.equal(values.nan_to_num(-7), yours[name].nan_to_num(-7)) for name, values in mine.items()]
    heads = [replace(each, texts=[], costs={}, round_seconds=0.0, machine={}) for each in (one, two)]
    entries = [[(t.id, t.task, t.prompt, t.prompt_tokens) for t in each.texts] for each in (one, two)]
    return all(bits) and mine.keys() == yours.keys() and heads[0] == heads[1] and entries[0] == entries[1]


COMMANDS = {
    "record": ["--max-new-tokens", "24", "--temperature", "1"],
    "train-hrad": ["--max-new-tokens", "24"],
    "bench": ["--max-new-tokens", "12", "--peers", "greedy", "--methods", "specbranch-paper", "--calibrate"],
}


@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_run_goes_on(killer: Killer, tmp_path: Path, prompts: str, command: str, kills: int) -> None:
    def line(folder: str) -> list[str]:
        (tmp_path / folder).mkdir(exist_ok=True)
        out = str(tmp_path / folder / "out")
        file = ["--json" if command == "bench" else "--out", out]
        return [command, *PAIR, "--prompts", prompts, *COMMANDS[command], *file]

    status, seconds, said = killer.run(line("whole"))
    assert status == 0, said
    moments = random.Random(kills)
    for number in range(kills):
        after = seconds * (number + moments.random()) / kills  # one in each part of a run
        status, _, said = killer.run(line("killed"), after)
        assert status in (0, -9), f"killed after {after} of {seconds}: {said}"
    status, _, said = killer.run(line("killed"))
    assert status == 0, said
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    names = sorted(str(path.relative_to(killed)) for path in killed.rglob("*"))
    assert names == sorted(str(path.relative_to(whole)) for path in whole.rglob("*"))
    if command == "bench":
        assert untimed(json.loads((killed / "out").read_text())) == untimed(json.loads((whole / "out").read_text()))
    elif command == "record":
        assert same_record(killed / "out", whole / "out")
    else:
        assert same_record(killed / "out" / "rounds.safetensors", whole / "out" / "rounds.safetensors")
        predictors = [folder / "out" / "hrad.safetensors" for folder in (killed, whole)]
        assert predictors[0].read_bytes() == predictors[1].read_bytes()
