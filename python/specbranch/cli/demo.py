"""`specbranch demo`: autoregressive decoding and SpecBranch side by side, on the bundled pair."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from specbranch.cli.arguments import whole
from specbranch.cli.loading import load_pair
from specbranch.cli.messages import FAILURE
from specbranch.cli.tables import FoldedTable, figures, key
from specbranch.cli.terminal import output_console, progress

if TYPE_CHECKING:
    from rich.table import Table

    from specbranch import Generation

NAMES = {"autoregressive": "autoregressive", "specbranch": "SpecBranch"}  # as shown, by method
PROMPTS, NEW_TOKENS = 3, 96


HELP = "compare autoregressive decoding and SpecBranch on the bundled pair"
OUTPUTS = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=whole(1), metavar="N", help="CPU threads (default: torch's)")


def run(args: argparse.Namespace) -> int:
    """Generate with both methods; print texts, speeds, and whether the tokens are the same (1 if not)."""
    from specbranch import bundled
    from specbranch.text.encoding import encode

    engine = load_pair("bundled", "bundled", dtype="float32", threads=args.threads)
    prompts = [record["prompt"] for record in bundled.prompts()[:PROMPTS]]
    results: list[dict[str, Generation]] = []
    with progress((len(prompts) + 1) * len(NAMES)) as bar:
        for number, prompt in enumerate([prompts[0], *prompts]):  # the first time warms up
            ids = encode(engine.tokenizer, prompt)
            result = {}
            for method in NAMES:
                bar.next(NAMES[method])
                result[method] = engine.generate(ids, max_new_tokens=NEW_TOKENS, method=method)
                bar.done()
            if number > 0:
                results.append(result)

    console = output_console()
    for prompt, result in zip(prompts, results, strict=True):
        console.print(_side_by_side(prompt, result))
    console.print(_summary(results))
    same = all(result["autoregressive"].tokens == result["specbranch"].tokens for result in results)
    console.print(f"same tokens: {'yes' if same else 'NO'}")
    return 0 if same else FAILURE


def _side_by_side(prompt: str, result: dict[str, Generation]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(prompt.rstrip("\n"), style="dim"), title_justify="left", expand=True)
    for method in NAMES:
        table.add_column(NAMES[method], ratio=1, overflow="fold")
    table.add_row(*(Text(result[method].text, overflow="fold") for method in NAMES))
    table.add_section()
    table.add_row(*(_speed(result[method].stats.as_dict()) for method in NAMES))
    return table


def _speed(stats: dict[str, Any]) -> str:
    line = f"{stats['tokens_per_second']:.0f} tokens/s, {stats['target_forwards']} target forwards"
    if stats["drafted_tokens"] > 0:
        line += f", acceptance {stats['acceptance_rate']:.2f}"
    return line


def _summary(results: Sequence[dict[str, Generation]]) -> FoldedTable:
    stats = {method: [result[method].stats.as_dict() for result in results] for method in NAMES}

    def medians(key: str) -> list[float]:
        return [median(each[key] for each in stats[method]) for method in NAMES]

    speeds = medians("tokens_per_second")
    accepted = [[s["acceptance_rate"] for s in stats[method] if s["drafted_tokens"] > 0] for method in NAMES]
    return FoldedTable(
        "medians",
        [key("method", NAMES.values())],
        [
            figures("tokens/s", (f"{speed:.0f}" for speed in speeds)),
            figures("speed-up", (f"{speed / speeds[0]:.2f}x" for speed in speeds)),
            figures("per target\nforward", (f"{tokens:.2f}" for tokens in medians("tokens_per_target_forward"))),
            figures("acceptance", (f"{median(rates):.2f}" if rates else "-" for rates in accepted)),
        ],
    )
