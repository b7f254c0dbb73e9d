"""From the records of a benchmark to its rows and its tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from rich.table import Table

REFERENCE = "autoregressive"  # its tokens are what every other text is compared with
BASELINE = "greedy"  # its speed is what every other speed is divided by

Record = dict[str, Any]  # one contender on one prompt; see `bench.py`
_RATES = ("acceptance_rate", "hit_rate", "rollback_rate")


def compare_tokens(tokens: Sequence[int], reference: Sequence[int]) -> int | None:
    """The first position where two token lists differ (one may simply end there); None if they are equal."""
    if list(tokens) == list(reference):
        return None
    pairs = zip(tokens, reference, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(reference)))


def summarize(records: Iterable[Record]) -> list[dict[str, Any]]:
    """One row per task and contender, and per contender over all tasks ("all") when there are several.

    Medians are over prompts. `ratio_to_greedy` divides the medians of the prompts that both finished, and
    `median_prompt_ratio` is the median of their ratios; both None without the greedy peer. `same_tokens` is
    None where texts cannot be compared (a peer that samples). The decode_ figures leave the prefill out.
    """
    finished = [record for record in records if record.get("error") is None]
    tasks = list(dict.fromkeys(record["task"] for record in finished))
    groups = [(task, [r for r in finished if r["task"] == task]) for task in tasks]
    if len(tasks) > 1:
        groups.append(("all", finished))
    return [
        _row(task, [r for r in group if r["name"] == name], [r for r in group if r["name"] == BASELINE])
        for task, group in groups
        for name in dict.fromkeys(r["name"] for r in group)
    ]


def _row(task: str, own: list[Record], baseline: list[Record]) -> dict[str, Any]:
    pairs = _pairs(own, baseline, "tokens_per_second")
    decode_pairs = _pairs(own, baseline, "decode_tokens_per_second")
    compared = [r for r in own if r["same_tokens"] is not None]
    differences = [r["first_difference"] for r in compared if not r["same_tokens"]]
    peaks = [r["memory_over_bytes"] for r in own if r["memory_over_bytes"] is not None]
    row = {
        "name": own[0]["name"],
        "task": task,
        "prompts": len(own),
        "new_tokens": sum(r["new_tokens"] for r in own),
        "tokens_per_second": median(r["tokens_per_second"] for r in own),
        "ratio_to_greedy": _ratio_of_medians(pairs),
        "median_prompt_ratio": median(a / b for a, b in pairs) if pairs else None,
        "prefill_seconds": median(r["prefill_seconds"] for r in own),
        "decode_tokens_per_second": _median(
            r["decode_tokens_per_second"] for r in own if r["decode_tokens_per_second"] is not None
        ),
        "decode_ratio_to_greedy": _ratio_of_medians(decode_pairs),
        "same_tokens": all(r["same_tokens"] for r in compared) if compared else None,
        "prompts_with_same_tokens": len(compared) - len(differences) if compared else None,
        "first_difference": differences[0] if differences else None,
        "memory_over_bytes": max(peaks) if peaks else None,
    }
    stats = [r["stats"] for r in own if r["stats"] is not None]
    drafting = [s for s in stats if s["drafted_tokens"] > 0]  # a rate says nothing where nothing was drafted
    row["tokens_per_target_forward"] = _median(s["tokens_per_target_forward"] for s in stats)
    for rate in _RATES:
        row[rate] = _median(s[rate] for s in drafting)
    return row


def _pairs(own: list[Record], baseline: list[Record], key: str) -> list[tuple[float, float]]:
    """`key` of a contender and of the baseline on every prompt that has both."""
    base = {(r["task"], r["id"]): r[key] for r in baseline if r[key] is not None}
    return [(r[key], base[r["task"], r["id"]]) for r in own if r[key] is not None and (r["task"], r["id"]) in base]


def _ratio_of_medians(pairs: list[tuple[float, float]]) -> float | None:
    return median(a for a, _ in pairs) / median(b for _, b in pairs) if pairs else None


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return median(found) if found else None


def table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """The rows for a terminal; decode/s: tokens per second after the prefill."""
    view = Table(title=title, title_justify="left")
    view.add_column("task")
    view.add_column("name", no_wrap=True)
    for heading in ("tokens/s", "x greedy", "decode/s", "x greedy", "per forward", "accepted", "same tokens"):
        view.add_column(heading, justify="right")
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before["task"] != row["task"]:
            view.add_section()
        view.add_row(
            row["task"],
            row["name"],
            f"{row['tokens_per_second']:.2f}",
            _figure(row["ratio_to_greedy"]),
            _figure(row["decode_tokens_per_second"]),
            _figure(row["decode_ratio_to_greedy"]),
            _figure(row["tokens_per_target_forward"]),
            _figure(row["acceptance_rate"]),
            _same(row),
        )
    return view


def difference_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each row that differs from autoregressive: where first, and how close the target's choice was."""
    lines = []
    for row in rows:
        difference = row["first_difference"]
        if difference is not None and row["task"] != "all":
            gap = difference["logit_gap"]
            decided = "" if gap is None else f"; the target's two best scores there differ by {gap:.4g}"
            lines.append(
                f"{row['name']} differs from {REFERENCE} first in {difference['id']} at new token "
                f"{difference['position']}{decided}"
            )
    return lines


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _same(row: dict[str, Any]) -> str:
    if row["same_tokens"] is None:
        return "-"
    return "yes" if row["same_tokens"] else f"{row['prompts_with_same_tokens']} of {row['prompts']}"
