"""The trace of `generate --trace`: every forward and every round is in it, where and when it was."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from specbranch import SpecBranch, bundled
from specbranch.cli import main as cli
from specbranch.cli.trace import is_trace, outcome, trace
from specbranch.core.messages import Step
from specbranch.core.stats import Round, Stats
from specbranch.together import Together

PAIR = ["--target", "bundled", "--draft", "bundled", "--threads", "2"]
ROUNDING = 0.002  # microseconds: two ends rounded to nanoseconds


def lanes(file: dict) -> dict[tuple[str, str], list[dict]]:
    """The complete events and the instants by (process name, thread name), in order of time."""
    events = file["traceEvents"]
    names = {(e["name"], e["pid"], e.get("tid")): e["args"]["name"] for e in events if e["name"].endswith("_name")}
    found = defaultdict(list)
    for event in events:
        if event["ph"] != "M":
            process = names["process_name", event["pid"], None]
            found[process, names["thread_name", event["pid"], event["tid"]]].append(event)
    return {lane: sorted(events, key=lambda e: e["ts"]) for lane, events in found.items()}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("method", ["autoregressive", "speculative", "pearl", "specbranch"])
def test_every_forward_is_there_and_lies_in_its_round(bundled_pair: SpecBranch, method: str, overlap: bool) -> None:
    runs = [
        (record["id"], bundled_pair.generate(record["prompt"], max_new_tokens=24, method=method, overlap=overlap).stats)
        for record in bundled.prompts()[:2]
    ]
    file = trace(runs)
    found = lanes(json.loads(json.dumps(file)))
    origin = runs[0][1].log[0].begin
    for prompt, stats in runs:
        process = f"{prompt} ({method})"
        rounds = found[process, "rounds"]
        assert [e["args"]["tokens"] for e in rounds] == [round.tokens for round in stats.log]
        assert [e["name"] for e in rounds] == [outcome(round) for round in stats.log]
        for lane, kind in (("target", "target"), ("draft", "draft")):
            steps = [step for round in stats.log for step in getattr(round, kind)]
            events = found.get((process, lane), [])
            assert len(events) == len(steps) == getattr(stats, f"{kind}_forwards")
            for event, step in zip(events, steps, strict=True):
                assert event["ts"] == pytest.approx((step.begin - origin) * 1e6, abs=ROUNDING)
                assert event["dur"] == pytest.approx(step.seconds * 1e6, abs=ROUNDING)
                assert event["args"]["rows"] == step.rows
            for event in events:
                assert any(covers(round, event) for round in rounds)
    for (_, lane), events in found.items():
        assert lane == "retrieval" or all(a["ts"] + a["dur"] <= b["ts"] + ROUNDING for a, b in pairwise(events))
    first, second = (found[f"{prompt} ({method})", "rounds"] for prompt, _ in runs)
    assert first[-1]["ts"] + first[-1]["dur"] <= second[0]["ts"]  # prompts come one after another


@pytest.mark.parametrize("draft", [True, False])
def test_what_was_retrieved_has_a_lane_of_its_own(bundled_pair: SpecBranch, draft: bool, tmp_path: Path) -> None:
    """Only in texts where something was, and a mark in each such round."""
    again = "def first(x):\n    return x + 1\n\n\n" * 3
    model = bundled_pair.draft if draft else None
    engine = SpecBranch(
        bundled_pair.target, model, tokenizer=bundled_pair.tokenizer, method="speculative", retrieval=True
    )
    stats = engine.generate(again, max_new_tokens=24, overlap=False).stats
    plain = bundled_pair.generate(again, max_new_tokens=24, method="pearl", retrieval=False).stats
    file = trace([("p", stats), ("q", plain)])
    (tmp_path / "trace.json").write_text(json.dumps(file))
    assert is_trace(tmp_path / "trace.json")
    found = lanes(json.loads(json.dumps(file)))
    rounds = [(event, round) for event, round in zip(found["p (speculative)", "rounds"], stats.log, strict=True)]
    assert [(e["ts"], *e["args"].values()) for e in found["p (speculative)", "retrieval"]] == [
        (event["ts"], round.retrieved, round.retrieved_accepted) for event, round in rounds if round.retrieved
    ]
    for name in ("retrieved", "retrieved_accepted"):
        marks = found["p (speculative)", "retrieval"]
        assert sum(event["args"][name] for event in marks) == getattr(stats, name) > 0
    named = [(e["pid"], e["args"]["name"]) for e in file["traceEvents"] if e["name"] == "thread_name"]
    assert [name for pid, name in named if pid == 1] == ["rounds", "target", "draft", "retrieval"]
    assert [name for pid, name in named if pid == 2] == ["rounds", "target", "draft"]


def covers(round: dict, event: dict) -> bool:
    begin, end = event["ts"], event["ts"] + event["dur"]
    return round["ts"] - ROUNDING <= begin and end <= round["ts"] + round["dur"] + ROUNDING


def test_rounds_are_named_by_what_became_of_the_drafts():
    assert outcome(Round(0.0, False, hit=True, rejected=1)) == "hit"  # on another branch
    assert outcome(Round(0.0, False, rejected=1, behind_rejection=2)) == "rollback"
    assert outcome(Round(0.0, False)) == "miss"


def test_a_round_cut_short_reaches_to_its_last_forward():
    stats = Stats(method="pearl", log=[Round(1.0, True, draft=[Step(1.0, 1.5, 1)], target=[Step(1.25, 1.75, 3)])])
    (event,) = lanes(trace([("p", stats)]))["p (pearl)", "rounds"]
    assert (event["ts"], event["dur"]) == (0.0, 0.75e6)


def test_generate_writes_the_trace_of_every_prompt(capsys, tmp_path):
    prompts, out = tmp_path / "p.jsonl", tmp_path / "trace.json"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in bundled.prompts()[:2]))
    arguments = ["generate", *PAIR, "--prompts", str(prompts), "--max-new-tokens", "16", "--overlap", "on", "--json"]
    assert cli.main([*arguments, "--trace", str(out)]) == 0
    capsys.readouterr()
    assert cli.main([*arguments, "--trace", str(out)]) == 0  # over its own
    written = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = lanes(json.loads(out.read_text()))
    for answer in written:
        process = f"{answer['id']} (specbranch)"
        assert len(found[process, "rounds"]) == answer["stats"]["rounds"]
        assert len(found[process, "target"]) == answer["stats"]["target_forwards"]
        drafted = found.get((process, "draft"), [])  # the method may find that a draft does not pay
        assert len(drafted) == answer["stats"]["draft_forwards"]
        for number in ("tokens", "verified", "accepted", "rolled_back"):
            assert isinstance(found[process, "rounds"][0]["args"][number], int)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []


def test_ctrl_c_leaves_the_trace_of_what_was_done(capsys, tmp_path, monkeypatch):
    verify, calls = Together.verify, []

    def interrupted(self, texts):
        calls.append(texts)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return verify(self, texts)

    monkeypatch.setattr(Together, "verify", interrupted)
    out = tmp_path / "trace.json"
    arguments = ["--prompt", bundled.prompts()[0]["prompt"], "--overlap", "off", "--trace", str(out)]
    assert cli.main(["generate", *PAIR, *arguments]) == 130
    found = lanes(json.loads(out.read_text()))
    assert len(found["prompt (specbranch)", "target"]) == 3
    assert len(found["prompt (specbranch)", "rounds"]) == 4  # the last one was cut short


@pytest.mark.parametrize("name", ["missing/trace.json", "."])
def test_a_trace_that_cannot_be_written_is_refused_before_anything_is_loaded(capsys, tmp_path, monkeypatch, name):
    monkeypatch.setattr("specbranch.cli.generate.load_engine", lambda args: pytest.fail("loaded"))
    assert cli.main(["generate", *PAIR, "--prompt", "x", "--trace", str(tmp_path / name)]) == 1
    assert "directory" in capsys.readouterr().err


def test_the_picture_of_a_trace(tmp_path):
    pytest.importorskip("matplotlib")
    script = Path(__file__).parents[2] / "benchmarks" / "plot_trace.py"
    rounds = [
        Round(1.0, True, 1.02, [Step(1.0, 1.01, 1)], [Step(1.0, 1.02, 3)], verified=2, accepted=2, hit=True, tokens=3),
        Round(1.02, True, 1.05, [], [Step(1.02, 1.04, 1)], verified=1, rejected=1, tokens=1),
    ]
    file, out = tmp_path / "trace.json", tmp_path / "trace.png"
    rounds[0].retrieved = rounds[0].retrieved_accepted = 1
    file.write_text(json.dumps(trace([("p", Stats(method="pearl", log=rounds))])))
    subprocess.run([sys.executable, script, file, out], check=True)
    assert out.read_bytes().startswith(b"\x89PNG")
    refused = subprocess.run([sys.executable, script, file, out, "--begin", "60"], capture_output=True, text=True)
    assert (refused.returncode, refused.stderr) == (1, "no round after 60 ms\n")
