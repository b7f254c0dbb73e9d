"""Resuming a benchmark that was interrupted: what its file must hold, and which settings must be the same."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from specbranch.cli.bench import llama_peer, vllm_peer
from specbranch.cli.machine import describe_measuring_machine, describe_versions
from specbranch.text.prompts import Prompt

# Arguments that do not affect the measurements.
_ELSEWHERE = ("argv", "command", "json", "plot", "fresh", "trust_remote_code")


def request(args: argparse.Namespace, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What must be the same for all measurements of a file: options as given, texts, machine and versions.

    Raises ValueError where a peer of vLLM or llama.cpp is asked for and cannot be, and OSError for a corpus that cannot
    be read.
    """
    machine, versions = describe_measuring_machine(), describe_versions()
    if any(peer in vllm_peer.NAMES for peer in args.peers):
        versions |= vllm_peer.versions()
    if any(peer in llama_peer.NAMES for peer in args.peers):
        llama_peer.models(args)
        versions |= llama_peer.versions()
    texts = json.dumps([asdict(prompt) for prompt in prompts])
    options = {key: value for key, value in vars(args).items() if key not in _ELSEWHERE}
    asked: dict[str, Any] = {
        "options": {**options, "device": args.device or "cpu"},
        "prompts": {"sha256": hashlib.sha256(texts.encode()).hexdigest()},
        "machine": {name: machine[name] for name in ("cpu", "cores", "isa", "core_isa", "system")},
        "versions": versions,
    }
    if args.corpus is not None:
        asked["corpus"] = {"sha256": [_digest(file) for file in args.corpus]}
    as_written: dict[str, Any] = json.loads(json.dumps(asked))
    return as_written


def _digest(file: str) -> str:
    """Raises OSError that names the file."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while piece := stream.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def read_report(path: str, request: dict[str, Any], *, fresh: bool) -> dict[str, Any] | None:
    """The report at `path`, to resume; None where there is none, or with `fresh`.

    Raises ValueError for a report of other settings, and for any other file: that is never overwritten.
    """
    if not Path(path).exists():
        return None
    try:
        report = json.loads(Path(path).read_bytes())
    except ValueError:
        raise ValueError(f"{path} is no complete JSON file: it stays as it is; delete it or choose another") from None
    if not _is_report(report):
        raise ValueError(f"{path} is no report of specbranch bench: it stays as it is; choose another file")
    if fresh:
        return None
    if report.get("request") is None:
        raise ValueError(f"{path} does not say all of its settings; choose another file, or --fresh to measure anew")
    if changed := _differences(report["request"], request):
        raise ValueError(
            f"{path} was measured with other settings: {'; '.join(changed)}; "
            "choose another file, or --fresh to measure anew"
        )
    assert isinstance(report, dict)
    return report


def _is_report(report: object) -> bool:
    """Whether it has every part that a resumed run reads."""
    if not isinstance(report, dict) or not isinstance(report.get("settings"), dict):
        return False
    records, request = report.get("records"), report.get("request")
    if not isinstance(report.get("interrupted"), bool) or not isinstance(records, list):
        return False
    if request is not None and not (isinstance(request, dict) and all(isinstance(v, dict) for v in request.values())):
        return False
    needed = {"name", "task", "id", "error", *(() if request is None else ("prompt",))}
    return all(isinstance(record, dict) and needed <= record.keys() for record in records)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Each setting that differs, as a user writes it, with its value in the file and its value now."""
    lines = []
    for part, settings in now.items():
        known = before.get(part, {})
        for name in dict.fromkeys([*settings, *known]):
            old, new = known.get(name), settings.get(name)
            if old == new:
                continue
            if part == "prompts":
                lines.append("the prompts have other texts or constraints")
            else:
                shown = f"--{name.replace('_', '-')}" if part == "options" else name
                lines.append(f"{shown} was {_shown(old)}, is {_shown(new)}")
    return lines


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
