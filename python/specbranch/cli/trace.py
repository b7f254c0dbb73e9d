"""The logs of generations as a trace for chrome://tracing and ui.perfetto.dev.

The format is Chrome's Trace Event Format: complete events (ph "X"), instants (ph "i"), times in microseconds, and
metadata events that name processes and threads. Each prompt is a process; its threads are the lanes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from specbranch.cli.files import json_object
from specbranch.core.messages import Step
from specbranch.core.stats import Round, Stats

THREADS = {"rounds": 1, "target": 2, "draft": 3, "retrieval": 4}  # the lanes, in the order they are shown

Event = dict[str, Any]


def trace(runs: Sequence[tuple[str, Stats]]) -> dict[str, Any]:
    """The trace of some generations, each with its prompt's id, on one clock that starts with the first round."""
    origin = min((round.begin for _, stats in runs for round in stats.log), default=0.0)
    events: list[Event] = []
    for process, (prompt, stats) in enumerate(runs, 1):
        retrieved = any(round.retrieved for round in stats.log)
        lanes = [lane for lane in THREADS if lane != "retrieval" or retrieved]
        events += _names(process, f"{prompt} ({stats.method})", lanes)
        for round in stats.log:
            events += _round_events(process, round, origin)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def is_trace(file: Path) -> bool:
    """Whether a file is one of ours, and not another program's."""
    found = json_object(file) or {}
    events = found.get("traceEvents")
    if found.keys() != {"traceEvents", "displayTimeUnit"} or not isinstance(events, list):
        return False
    return all(
        isinstance(event, dict) and (event.get("ph") == "M" or str(event.get("cat")) in THREADS) for event in events
    )


def outcome(round: Round) -> str:
    """hit: drafted work below the next token is kept. rollback: drafted tokens were thrown away. miss: neither."""
    if round.hit:
        return "hit"
    return "rollback" if round.rolled_back else "miss"


def _round_events(process: int, round: Round, origin: float) -> Iterable[Event]:
    steps = [*round.target, *round.draft]
    end = max([round.end, round.begin, *(step.end for step in steps)])  # an interrupted round has no end
    yield _event(process, "rounds", outcome(round), round.begin - origin, end - origin) | {
        "args": {
            "verified": round.verified,
            "accepted": round.accepted,
            "hit": round.hit,
            "rolled_back": round.rolled_back,
            "wasted": round.wasted,
            "tokens": round.tokens,
            "overlapped": round.overlapped,
        }
    }
    for lane, name, forwards in (("target", "verify", round.target), ("draft", "draft", round.draft)):
        for step in forwards:
            yield _forward(process, lane, name, step, origin)
    if round.retrieved:  # in no time to speak of, and no forward: an instant where the round begins
        yield {
            "name": "retrieved",
            "cat": "retrieval",
            "ph": "i",
            "s": "t",  # for its thread
            "ts": _microseconds(round.begin - origin),
            "pid": process,
            "tid": THREADS["retrieval"],
            "args": {"retrieved": round.retrieved, "retrieved_accepted": round.retrieved_accepted},
        }


def _forward(process: int, lane: str, name: str, step: Step, origin: float) -> Event:
    return _event(process, lane, name, step.begin - origin, step.end - origin) | {"args": {"rows": step.rows}}


def _event(process: int, lane: str, name: str, begin: float, end: float) -> Event:
    """Times in seconds. Both ends are rounded to nanoseconds, so that neighbours never overlap."""
    first, last = round(begin * 1e9), round(end * 1e9)
    return {
        "name": name,
        "cat": lane,
        "ph": "X",
        "ts": first / 1000,
        "dur": (last - first) / 1000,
        "pid": process,
        "tid": THREADS[lane],
    }


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e9) / 1000


def _names(process: int, name: str, lanes: Iterable[str]) -> Iterable[Event]:
    yield {"name": "process_name", "ph": "M", "pid": process, "args": {"name": name}}
    for lane in lanes:
        thread = THREADS[lane]
        yield {"name": "thread_name", "ph": "M", "pid": process, "tid": thread, "args": {"name": lane}}
        yield {"name": "thread_sort_index", "ph": "M", "pid": process, "tid": thread, "args": {"sort_index": thread}}
