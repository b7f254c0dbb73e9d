"""Draw a few rounds of a trace of `specbranch generate --trace`, as a trace viewer shows them.

python benchmarks/plot_trace.py TRACE.json OUT.png [--prompt N] [--begin MS] [--length MS]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

LANES = ("rounds", "target", "draft")  # from top to bottom
HEIGHT = 0.72
COLOURS = {
    "hit": "#3f8f63",
    "saved": "#93c47d",
    "rollback": "#d1605e",
    "miss": "#a9adb3",
    "verify": "#4a78b5",
    "draft": "#e6a042",
}
MEANING = {
    "hit": "hit: the best path lives on",
    "saved": "hit on another branch: the best path was refused, work below the sibling lives on",
    "rollback": "rollback: refused, nothing left",
    "miss": "miss: nothing refused, nothing left",
}
LETTER = 0.08  # inches that one letter of a label takes

Event = dict[str, Any]


def events_of(trace: dict[str, Any], prompt: int) -> tuple[str, dict[str, list[Event]]]:
    """The name of a trace's process number `prompt` (from 1) and its events by lane, in milliseconds from its start."""
    own = [event for event in trace["traceEvents"] if event["pid"] == prompt]
    if not own:
        raise SystemExit(f"the trace has no prompt number {prompt}")
    title = next(event["args"]["name"] for event in own if event["name"] == "process_name")
    lane_of = {event["tid"]: event["args"]["name"] for event in own if event["name"] == "thread_name"}
    start = min(event["ts"] for event in own if event["ph"] == "X")
    lanes: dict[str, list[Event]] = {lane: [] for lane in LANES}
    for event in own:
        if event["ph"] == "X":
            times = {"begin": (event["ts"] - start) / 1000, "ms": event["dur"] / 1000}
            lanes[lane_of[event["tid"]]].append(event | times)
    return title, lanes


def label(event: Event) -> Sequence[str]:
    """What to write into a bar, the longest first: the first that fits is taken."""
    args = event["args"]
    if event["cat"] == "rounds":
        tokens, counts = f"+{args['tokens']}", f"{args['accepted']} of {args['verified']}"
        return (f"{event['name']}: {counts} accepted, {tokens}", f"{counts}, {tokens}", tokens)
    rows = str(args["rows"])
    return (f"{event['name']} {rows} row{'s' if rows != '1' else ''}", rows)


def colour(event: Event) -> str:
    saved = event["name"] == "hit" and event["args"]["rolled_back"] > 0
    return COLOURS["saved" if saved else event["name"]]


def draw(axes: Axes, lanes: dict[str, list[Event]], begin: float, end: float, inches: float) -> None:
    per_letter = LETTER * (end - begin) / inches
    for place, lane in enumerate(LANES):
        for event in lanes[lane]:
            left, right = max(event["begin"], begin), min(event["begin"] + event["ms"], end)
            if left >= right:
                continue
            axes.barh(
                place,
                right - left,
                HEIGHT,
                left,
                color=colour(event),
                edgecolor="white",
                linewidth=0.8,
            )
            text = next((text for text in label(event) if (len(text) + 1) * per_letter < right - left), None)
            if text is not None:
                middle = (left + right) / 2
                axes.text(middle, place, text, ha="center", va="center", fontsize=8, color="white", fontweight="bold")
    for event in lanes["rounds"]:  # a fine line where a round begins, through all lanes
        if begin < event["begin"] < end:
            axes.axvline(event["begin"], color="#888888", linewidth=0.6, linestyle=":", zorder=0)
    axes.set_xlim(begin, end)
    axes.set_ylim(len(LANES) - 0.5, -0.5)
    axes.set_yticks(range(len(LANES)), LANES)
    axes.set_xlabel("milliseconds since the first round began")
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", metavar="TRACE.json")
    parser.add_argument("out", metavar="OUT.png")
    parser.add_argument("--prompt", type=int, default=1, metavar="N", help="which prompt, from 1 (default: 1)")
    parser.add_argument("--begin", type=float, default=0.0, metavar="MS", help="start of the window (default: 0)")
    parser.add_argument("--length", type=float, metavar="MS", help="length of the window (default: six rounds)")
    args = parser.parse_args()

    title, lanes = events_of(json.loads(Path(args.trace).read_text(encoding="utf-8")), args.prompt)
    rounds = [event for event in lanes["rounds"] if event["begin"] + event["ms"] > args.begin]
    if not rounds:
        raise SystemExit(f"no round after {args.begin:g} ms")
    last = rounds[min(5, len(rounds) - 1)]
    end = last["begin"] + last["ms"] if args.length is None else args.begin + args.length

    figure = Figure(figsize=(12, 3.3), layout="constrained")
    axes = figure.add_subplot()
    draw(axes, lanes, args.begin, end, inches=11)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_title("rounds: accepted of verified, tokens committed; models: rows of a forward", loc="right", fontsize=8)
    handles = [Patch(color=COLOURS[name], label=meaning) for name, meaning in MEANING.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(args.out, dpi=150)


if __name__ == "__main__":
    main()
