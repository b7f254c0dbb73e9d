"""What planning a draft step costs the host: SpecBranch's default policy over a tree that grows by 8 leaves a step.

    python benchmarks/bench_plan.py [--json OUT]

A step is what the loop does around the draft's forward: where to draft (likeliest), the leaves as nodes, draft_sample's
lists as proposals, their correction, and the proposals noted in the tree. Beside it: the choice of a trunk, a verdict's
lesson (observe), and the new root (reroot). Each with the compiled tree and with its definition in Python
(tests/support/plain_tree.py), which decoded before there was a compiled one.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from specbranch.core.tree import ProposalRows, Proposals, Signals, Tree
from specbranch.policies.branching import Hedging
from specbranch.policies.calibration import Calibrator
from specbranch.policies.costs import ModeCosts
from specbranch.policies.policy import InFlight, State

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests" / "support"))

from plain_calibration import PlainCalibrator
from plain_tree import PlainTree

LEAVES, CANDIDATES, NODES = 8, 6, 60
TRUNK = 6  # tokens drafted before the target is asked
REPEATS = 300
PARTS = ("draft step", "choose a trunk", "observe", "reroot")


class Sampled:
    """draft_sample's lists at one step."""

    def __init__(self, random: Random, leaves: int) -> None:
        self.tokens = [random.sample(range(50_000), CANDIDATES) for _ in range(leaves)]
        self.scores = [sorted((random.gauss(0, 3) for _ in range(CANDIDATES)), reverse=True) for _ in range(leaves)]
        self.entropy = [random.uniform(0, 4) for _ in range(leaves)]


def compiled(tree: Tree, nodes: list[int], sampled: Sampled, calibrator: Calibrator) -> None:
    """The draft's candidates below some nodes, corrected and noted."""
    rows, depth = ProposalRows(), tree.depth
    rows.add(sampled.tokens, sampled.scores, None, sampled.entropy, [depth[node] for node in nodes], (0.0, 0.0))
    tree.descend(nodes, calibrator.correct(rows))


def plain(tree: PlainTree, nodes: list[int], sampled: Sampled, calibrator: PlainCalibrator) -> None:
    """The same in Python."""
    proposals = []
    for node, tokens, scores, entropy in zip(nodes, sampled.tokens, sampled.scores, sampled.entropy, strict=True):
        weights = [math.exp(score - scores[0]) for score in scores]
        total = sum(weights)
        confidence = tuple(weight / total for weight in weights)
        signals = Signals(confidence[0], entropy, scores[0] - scores[1], tree.depth[node])
        proposals.append(Proposals(tuple(tokens), confidence, signals))
    tree.descend(nodes, [calibrator.correct(proposals)])


def round_seconds(make: Any, calibrator: Any, note: Callable[..., None], random: Random) -> dict[str, list[float]]:
    """Seconds of each part in one round: a trunk is drafted and chosen, branches grow, a verdict comes."""
    policy = Hedging()
    costs = ModeCosts()
    for rows in (1, 1, 4, 8):
        costs.draft.record(rows, 2e-3)  # rows are free, as on a device
        costs.target.record(rows, 2e-2)
    state = State(True, costs, 0.8, 1000)
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}

    def timed(part: str, run: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = run()
        seconds[part].append(time.perf_counter() - begin)
        return result

    tree = make(1, 100)
    for _ in range(TRUNK):
        end = tree.take(tree.best_choices()[-1])
        note(tree, [end], Sampled(random, 1), calibrator)
    choice = timed("choose a trunk", lambda: policy.choose_trunk(tree, state))
    nodes = tuple(tree.take(each) for each in choice.choices)
    flight = InFlight(nodes, nodes[choice.branch_point])

    def step() -> None:
        expansion = policy.draft_during(tree, flight, state)
        assert len(expansion.choices) == LEAVES
        leaves = [tree.take(each) for each in expansion.choices]
        note(tree, leaves, sampled, calibrator)
        for leaf in leaves:
            tree.branch(leaf, policy.width(tree, leaf, flight))

    while len(tree) < NODES + LEAVES:
        sampled = Sampled(random, LEAVES)
        timed("draft step", step)
    del seconds["draft step"][:-1]  # the last one, with about NODES nodes
    path = tree.best_path()[:4]
    timed("observe", lambda: calibrator.observe(tree, path, 7))
    timed("reroot", lambda: tree.reroot(path[1]))
    return seconds


def measure(make: Any, calibrator: Any, note: Callable[..., None]) -> dict[str, float]:
    """Median microseconds of each part."""
    random, all_seconds = Random(1), []
    for _ in range(REPEATS):
        all_seconds.append(round_seconds(make, calibrator, note, random))
    return {
        part: 1e6 * statistics.median(second for seconds in all_seconds for second in seconds[part]) for part in PARTS
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    args = parser.parse_args(argv)
    figures = {
        "Python": measure(PlainTree, PlainCalibrator(), plain),
        "compiled": measure(Tree, Calibrator(), compiled),
    }
    print(f"{'microseconds':16}" + "".join(f"{name:>12}" for name in figures))
    for part in PARTS:
        print(f"{part:16}" + "".join(f"{parts[part]:12.1f}" for parts in figures.values()))
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
