"""The figures of a benchmark as one picture: speed-ups, rollback rates, and what was thrown away, task by task."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specbranch.cli.bench import report
from specbranch.cli.files import whole
from specbranch.core.extras import check_installed
from specbranch.core.stats import CAUSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("png", "svg", "pdf", "jpg", "webp")
BAR = 0.7  # its height, of the room that it has
OURS, PEER = "#4a78b5", "#a9adb3"
CAUSE_COLOURS = dict(zip(CAUSES, ("#d1605e", "#e6a042", "#8d7fc0", "#b9bdc3"), strict=True))
CAUSE_NAMES = {
    "rejected": "rejected by the target",
    "behind_rejection": "behind a rejected token",
    "losing_branches": "on a losing branch",
    "left_over": "left over at the end",
}

MARK = "specbranch bench"  # in every picture, so that it can be told from others
IMAGE_COMMENT = 0x9286  # of Exif: UserComment

Row = dict[str, Any]


def is_plot(file: Path) -> bool:
    """Whether a file is a picture of ours."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(MARK.encode()) >= 0


def check(path: str) -> None:
    """Say now, not after the run, that no picture can come. Raises SpecBranchError or ValueError."""
    if _format(path) not in FORMATS:
        raise ValueError(f"--plot {path}: the name must end in one of {', '.join('.' + name for name in FORMATS)}")
    check_installed("--plot", "plot")


def plot(path: str, rows: Sequence[Row], title: str) -> None:
    """Write the picture of the rows of `report.summarize`, whole or not at all; a column for each task."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    drafting = [row for row in rows if row["wasted_per_token"] is not None]
    names = list(dict.fromkeys(row["name"] for row in rows))
    drafting_names = [name for name in names if any(row["name"] == name for row in drafting)]
    panels = [(names, _speed_ups), *([(drafting_names, _rollbacks), (drafting_names, _causes)] if drafting else [])]

    heights = [0.28 * len(shown) + 0.75 for shown, _ in panels]
    figure = Figure(figsize=(2.2 + 3.8 * len(tasks), sum(heights) + 0.9), layout="constrained")
    grid = figure.subplots(len(panels), len(tasks), squeeze=False, sharex="row", height_ratios=heights)
    base = report.base_of(rows)
    for panel, (shown, draw) in enumerate(panels):
        for column, task in enumerate(tasks):
            axes = grid[panel][column]
            own = {row["name"]: row for row in rows if row["task"] == task}
            draw(axes, [own.get(name) for name in shown], base)
            _frame(axes, shown, labelled=column == 0)
            if panel == 0:
                prompts = max(row["prompts"] for row in own.values())
                axes.set_title(f"{task} ({prompts} prompt{'s' if prompts != 1 else ''})", fontsize=10)
    if drafting:
        handles = [Patch(color=CAUSE_COLOURS[cause], label=CAUSE_NAMES[cause]) for cause in CAUSES]
        columns = 4 if len(tasks) > 1 else 2
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    with whole(path) as part:
        figure.savefig(part, format=_format(path), dpi=150, **_marked(_format(path)))


def _marked(format: str) -> dict[str, Any]:
    """What writes MARK into a picture."""
    if format in ("png", "svg", "pdf"):
        return {"metadata": {"Software" if format == "png" else "Creator": MARK}}
    from PIL.Image import Exif

    exif = Exif()
    exif[IMAGE_COMMENT] = MARK.encode()
    return {"pil_kwargs": {"exif": exif.tobytes()}}


def _format(path: str) -> str:
    return Path(path).suffix.lower().removeprefix(".")


def _speed_ups(axes: Axes, rows: Sequence[Row | None], base: str) -> None:
    """Bars with whiskers over the confidence interval; a line where the base is."""
    for place, row in enumerate(rows):
        ratio = None if row is None else row[f"ratio_to_{base}"]
        if row is None or ratio is None:
            continue
        ours = row["tokens_per_target_forward"] is not None
        axes.barh(place, ratio, BAR, color=OURS if ours else PEER)
        low, high = row[f"ratio_to_{base}_interval"] or (ratio, ratio)
        if high > low:
            axes.plot((low, high), (place, place), color="#333333", linewidth=1.2, marker="|", markersize=6)
        _value(axes, place, max(ratio, high), ratio)
    axes.axvline(1, color="#333333", linewidth=0.8, linestyle=":")
    axes.set_xlabel(f"speed-up over {base}, with the 95 % interval over prompts", fontsize=9)


def _rollbacks(axes: Axes, rows: Sequence[Row | None], base: str) -> None:
    for place, row in enumerate(rows):
        if row is not None and row["rollback_rate"] is not None:
            axes.barh(place, row["rollback_rate"], BAR, color=CAUSE_COLOURS["rejected"])
            _value(axes, place, row["rollback_rate"], row["rollback_rate"])
    axes.set_xlim(0, 1.1)
    axes.set_xlabel("rollback rate", fontsize=9)


def _causes(axes: Axes, rows: Sequence[Row | None], base: str) -> None:
    for place, row in enumerate(rows):
        if row is None or row["wasted_per_token"] is None:
            continue
        left = 0.0
        for cause in (cause for cause in CAUSES if row[f"{cause}_per_token"] > 0):  # an empty bar takes the margin
            axes.barh(place, row[f"{cause}_per_token"], BAR, left, color=CAUSE_COLOURS[cause])
            left += row[f"{cause}_per_token"]
        _value(axes, place, left, left)
    axes.set_xlabel("drafted tokens thrown away per token of the text", fontsize=9)


def _value(axes: Axes, place: int, end: float, value: float) -> None:
    """The figure, a little right of where the bar (or its whisker) ends."""
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # keeps the line of the base out of the digits
    text = f"{value:.2f}"
    axes.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=8, bbox=paper)


def _frame(axes: Axes, names: Sequence[str], *, labelled: bool) -> None:
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names if labelled else [""] * len(names), fontsize=9)
    axes.margins(x=0.14)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
