"""From the records of a benchmark to its rows and its tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from specbranch.cli.bench.intervals import ratio_interval
from specbranch.cli.tables import FoldedTable, figures, key
from specbranch.core.stats import CAUSES
from specbranch.text.prompts import CONSTRAINTS

REFERENCE = "autoregressive"  # its tokens are what every other text is compared with
BASELINE = "greedy"  # its speed is what every other speed is divided by

Record = dict[str, Any]  # one contender on one prompt; see `bench.py`
_RATES = ("acceptance_rate", "hit_rate", "rollback_rate")


def lap(record: Record) -> int:
    """The pass over the prompts that a record is of."""
    return int(record.get("lap", 0))


def compare_tokens(tokens: Sequence[int], reference: Sequence[int]) -> int | None:
    """The first position where two token lists differ (one may simply end there); None if they are equal."""
    if list(tokens) == list(reference):
        return None
    pairs = zip(tokens, reference, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(reference)))


def summarize(records: Iterable[Record]) -> list[dict[str, Any]]:
    """One row per task and contender, and per contender over all tasks ("all") when there are several.

    Medians are over prompts. `ratio_to_greedy` divides the medians of the prompts that both finished, and
    `median_prompt_ratio` is the median of their ratios; both None without the greedy peer. An _interval holds the
    95 % confidence interval of a ratio, over prompts; None for a single prompt, and for a contender against itself.
    `same_tokens` is None where texts cannot be compared (a peer that samples). `constraint`: the kinds that texts were
    under. The decode_ figures leave the prefill
    out. `wasted_per_token` and its parts are totals: all wasted tokens over all new tokens. Ratios are to what ran in
    the same lap; the row of what ran in several is that of the first.
    """
    finished = [record for record in records if record.get("error") is None]
    tasks, names = (list(dict.fromkeys(record[key] for record in finished)) for key in ("task", "name"))
    groups = [(task, [r for r in finished if r["task"] == task]) for task in tasks]
    if len(tasks) > 1:
        groups.append(("all", finished))
    return [
        _row(task, *(_named(group, each) for each in (name, BASELINE, REFERENCE)))
        for task, group in groups
        for name in names
        if _named(group, name)
    ]


def _named(records: Iterable[Record], name: str) -> list[Record]:
    return [record for record in records if record["name"] == name]


def _row(task: str, own: list[Record], greedy: list[Record], autoregressive: list[Record]) -> dict[str, Any]:
    first = min(lap(r) for r in own)
    own = [r for r in own if lap(r) == first]
    pairs = _pairs(own, greedy, "tokens_per_second")
    plain_pairs = _pairs(own, autoregressive, "tokens_per_second")
    compared = [r for r in own if r["same_tokens"] is not None]
    differences = [r["first_difference"] for r in compared if not r["same_tokens"]]
    peaks = [r["memory_over_bytes"] for r in own if r["memory_over_bytes"] is not None]
    row = {
        "name": own[0]["name"],
        "task": task,
        "constraint": ", ".join(sorted({r["constraint"] for r in own if r.get("constraint")})) or None,
        "prompts": len(own),
        "new_tokens": sum(r["new_tokens"] for r in own),
        "tokens_per_second": median(r["tokens_per_second"] for r in own),
        "ratio_to_greedy": _ratio_of_medians(pairs),
        "ratio_to_greedy_interval": ratio_interval(pairs) if own[0]["name"] != BASELINE else None,
        "ratio_to_autoregressive": _ratio_of_medians(plain_pairs),
        "ratio_to_autoregressive_interval": ratio_interval(plain_pairs) if own[0]["name"] != REFERENCE else None,
        "median_prompt_ratio": median(a / b for a, b in pairs) if pairs else None,
        "prefill_seconds": median(r["prefill_seconds"] for r in own),
        "decode_tokens_per_second": _median(
            r["decode_tokens_per_second"] for r in own if r["decode_tokens_per_second"] is not None
        ),
        "decode_ratio_to_greedy": _ratio_of_medians(_pairs(own, greedy, "decode_tokens_per_second")),
        "decode_ratio_to_autoregressive": _ratio_of_medians(_pairs(own, autoregressive, "decode_tokens_per_second")),
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
    tokens = sum(s["new_tokens"] for s in drafting)
    for total, name in (("wasted_tokens", "wasted_per_token"), *((cause, f"{cause}_per_token") for cause in CAUSES)):
        row[name] = sum(s[total] for s in drafting) / tokens if tokens else None
    return row


def _pairs(own: list[Record], baseline: list[Record], key: str) -> list[tuple[float, float]]:
    """`key` of a contender and of the baseline on every prompt that has both."""
    base = {_place(r): r[key] for r in baseline if r[key] is not None}
    return [(r[key], base[_place(r)]) for r in own if r[key] is not None and _place(r) in base]


def _place(record: Record) -> tuple[int, str, str]:
    return lap(record), record["task"], record["id"]


def _ratio_of_medians(pairs: list[tuple[float, float]]) -> float | None:
    return median(a for a, _ in pairs) / median(b for _, b in pairs) if pairs else None


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return median(found) if found else None


def base_of(rows: Sequence[dict[str, Any]]) -> str:
    """What speed-ups are measured against: greedy, or without that peer autoregressive."""
    return BASELINE if any(row["ratio_to_greedy"] is not None for row in rows) else REFERENCE


def title(settings: dict[str, Any]) -> str:
    sampling = "greedy"
    if settings["temperature"] > 0:
        sampling = f"temperature {settings['temperature']:g}, top-p {settings['top_p']:g}"
    new_tokens = settings["max_new_tokens"]
    packed = sorted({word for word in settings.get("weights", {}).values() if word})
    dtype = f"{settings['dtype']} ({', '.join(packed)})" if packed else settings["dtype"]
    at_once = settings.get("max_requests", 1)
    together = f", {at_once} prompts at once" if at_once > 1 else ""
    under = "".join(f", {kind}" for kind in CONSTRAINTS if settings.get(kind) is not None)
    return f"{dtype}, threads: {settings['threads']}, new tokens: {new_tokens}, {sampling}{together}{under}"


def tables(rows: Sequence[dict[str, Any]], title: str) -> list[FoldedTable]:
    """The rows for a terminal: speeds and texts, then what the drafting methods drafted."""
    drafting = [row for row in rows if row["wasted_per_token"] is not None]
    return [_speed_table(rows, title), *([_drafting_table(drafting)] if drafting else [])]


def _speed_table(rows: Sequence[dict[str, Any]], title: str) -> FoldedTable:
    """decode/s: tokens per second after the prefill."""
    base = base_of(rows)
    over = {BASELINE: "x greedy", REFERENCE: "x auto-\nregr."}
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "tokens/s": lambda row: _figure(row["tokens_per_second"]),
        over[base]: lambda row: _figure(row[f"ratio_to_{base}"]),
        "95 %\ninterval": lambda row: _interval(row[f"ratio_to_{base}_interval"]),
    }
    if base != REFERENCE:
        columns[over[REFERENCE]] = lambda row: _figure(row[f"ratio_to_{REFERENCE}"])
    columns |= {
        "decode/s": lambda row: _figure(row["decode_tokens_per_second"]),
        f"decode\n{over[base]}": lambda row: _figure(row[f"decode_ratio_to_{base}"]),
        "same\ntokens": _same,
    }
    return _table(rows, columns, title)


def _drafting_table(rows: Sequence[dict[str, Any]]) -> FoldedTable:
    """accepted, hits, rollback: rates. wasted: drafted tokens thrown away per token of the text."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "per target\nforward": lambda row: _figure(row["tokens_per_target_forward"]),
        "accepted": lambda row: _figure(row["acceptance_rate"]),
        "hits": lambda row: _figure(row["hit_rate"]),
        "rollback": lambda row: _figure(row["rollback_rate"]),
        "wasted\nper token": lambda row: _figure(row["wasted_per_token"]),
    }
    return _table(rows, columns, "drafting")


def _table(
    rows: Sequence[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], str]], title: str
) -> FoldedTable:
    tasks = [row["task"] for row in rows]
    return FoldedTable(
        title,
        [key("task", tasks), key("name", (row["name"] for row in rows))],
        [figures(heading, map(text, rows)) for heading, text in columns.items()],
        sections=[row for row in range(1, len(rows)) if tasks[row] != tasks[row - 1]],
    )


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


def _interval(bounds: Sequence[float] | None) -> str:
    return "-" if bounds is None else f"{bounds[0]:.2f}-{bounds[1]:.2f}"


def _same(row: dict[str, Any]) -> str:
    if row["same_tokens"] is None:
        return "-"
    return "yes" if row["same_tokens"] else f"{row['prompts_with_same_tokens']} of {row['prompts']}"
