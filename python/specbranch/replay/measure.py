"""What steps of a loaded pair cost here, by rows: alone, and while the other model runs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch

from specbranch.core.excerpt import ALL
from specbranch.core.messages import Trunk
from specbranch.core.sampling import Sampling
from specbranch.core.tree import Tree
from specbranch.decoding import LONGEST_RUN
from specbranch.drafters.model import ModelDrafter
from specbranch.runtime.pair import Pair
from specbranch.runtime.runner import Runner
from specbranch.runtime.verifier import ModelVerifier
from specbranch.runtime.workers import Streams, Threads, Worker

ROWS = (1, 2, 4, 6, 8, 12, 16)
LONG_TRUNKS = (LONGEST_RUN // 2, LONGEST_RUN)
REPEATS = 5
CANDIDATES = 6

Points = list[tuple[int, float]]


def timed(model: Runner, run: Callable[[], object]) -> Callable[[], float]:
    """A function that makes one step, forgets it, and returns its seconds."""
    cache = model.model.cache
    length = cache.length

    def step() -> float:
        begin = time.perf_counter()
        run()
        seconds = time.perf_counter() - begin
        cache.rollback(length)
        return seconds

    return step


def chain(rows: int, position: int) -> Tree:
    """A tree of one path."""
    tree = Tree(1, position)
    for node in range(rows - 1):
        tree.add(node, 1, 1.0)
    return tree


def measure_costs(pair: Pair, prefix: int = 256) -> dict[str, dict[str, Points]]:
    """Median seconds of steps by mode ("serial", "overlapped") and model ("target", "draft"), as [rows, seconds].

    A step is the forward and what is done with its logits: `verify`, or `draft_sample`. prefix: committed tokens
    behind which they run. Raises SpecBranchError without a draft.
    """
    with pair.running() as slot:
        return _measure(slot.target, slot.need_draft("measuring costs"), pair.workers, prefix)


def _measure(target: Runner, draft: Runner, workers: Threads | Streams, prefix: int) -> dict[str, dict[str, Points]]:
    """The same, where both models are attached."""
    verifier = ModelVerifier(target, Sampling())
    drafter = ModelDrafter(draft, Sampling(), CANDIDATES, target.model.vocabulary)
    lengths = {}
    for name, model in (("target", target), ("draft", draft)):
        limit = getattr(model.model.model.config.get_text_config(), "max_position_embeddings", prefix + 1)
        lengths[name] = min(prefix, limit - 1)
    target.reset(lengths["target"])
    verifier.begin([1] * (lengths["target"] + 1))
    verifier.read(math.inf)
    drafter.begin([1] * (lengths["draft"] + 1))
    drafter.read(ALL, lengths["draft"])

    def verify(rows: int) -> Callable[[], float]:
        trunk = Trunk.of(chain(rows, lengths["target"]), tuple(range(rows)))
        return timed(target, lambda: verifier.verify(trunk).result())

    def propose(rows: int) -> Callable[[], float]:
        tree = chain(rows, lengths["draft"])
        return timed(draft, lambda: drafter.propose(tree, range(rows)))

    trunks = [rows for rows in (*ROWS, *LONG_TRUNKS) if rows <= verifier.most_rows]
    return {
        "serial": {
            "target": [(rows, _median(verify(rows))) for rows in trunks],
            "draft": [(rows, _median(propose(rows))) for rows in ROWS],
        },
        "overlapped": {
            "target": [(rows, _median_beside(verify(rows), propose(4), workers, True)) for rows in trunks],
            "draft": [(rows, _median_beside(propose(rows), verify(4), workers, False)) for rows in ROWS],
        },
    }


def _median(run: Callable[[], float]) -> float:
    run()
    return statistics.median(run() for _ in range(REPEATS))


def _median_beside(
    run: Callable[[], float], other: Callable[[], float], workers: Threads | Streams, measured_is_target: bool
) -> float:
    """While `other` runs over and over on a thread of its own; each side with its share of the threads."""
    threads = torch.get_num_threads()
    mine = beside = threads
    if isinstance(workers, Threads):
        mine, beside = workers.target, workers.draft
        if not measured_is_target:
            mine, beside = beside, mine
    going = True

    def repeat() -> None:
        while going:
            other()

    repeating = Worker(beside).submit(repeat)
    torch.set_num_threads(mine)
    try:
        return _median(run)
    finally:
        going = False
        torch.set_num_threads(threads)
        repeating.result()
