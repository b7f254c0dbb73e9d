"""What steps of a loaded pair cost here, by rows: alone, and while the other model runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from specbranch.core.sampling import Sampling
from specbranch.core.tree import Tree
from specbranch.drafters.model import Drafter
from specbranch.runtime.runner import Runner
from specbranch.runtime.verifier import Verifier
from specbranch.runtime.workers import Streams, Threads

ROWS = (1, 2, 4, 6, 8, 12, 16)
REPEATS = 5
CANDIDATES = 6

Points = list[tuple[int, float]]


def forward(model: Runner, run: Callable[[Tree, range], object], rows: int) -> Callable[[], float]:
    """A function that makes one step over a chain of `rows` tree nodes and returns its seconds."""
    cache = model.model.cache
    length = cache.length
    tree = Tree.rooted(1, length)
    for node in range(rows - 1):
        tree = tree.hang(node, 1)

    def step() -> float:
        begin = time.perf_counter()
        run(tree, range(rows))
        seconds = time.perf_counter() - begin
        cache.rollback(length)
        return seconds

    return step


def measure_costs(
    target: Runner, draft: Runner, workers: Threads | Streams, prefix: int = 256
) -> dict[str, dict[str, Points]]:
    """Median seconds of steps by mode ("serial", "overlapped") and model ("target", "draft"), as [rows, seconds].

    A step is the forward and what is done with its logits: `verify`, or `draft_sample`. Both models must be
    attached. prefix: committed tokens behind which they run.
    """
    verifier = Verifier(target, Sampling())
    drafter = Drafter(draft, Sampling(), CANDIDATES, target.model.vocabulary)
    steps: dict[str, Callable[[Tree, range], object]] = {
        "target": verifier.verify,
        "draft": lambda tree, nodes: drafter.propose(tree, nodes, [1] * tree.position),
    }
    for model in (target, draft):
        limit = getattr(model.model.model.config.get_text_config(), "max_position_embeddings", prefix + 1)
        model.reset(min(prefix, limit - 1))
        model.prefill([1] * min(prefix, limit - 1))
    costs: dict[str, dict[str, Points]] = {"serial": {}, "overlapped": {}}
    for name, model in (("target", target), ("draft", draft)):
        costs["serial"][name] = [(rows, _median(forward(model, steps[name], rows))) for rows in ROWS]
    for name, model, other, model_beside in (("target", target, "draft", draft), ("draft", draft, "target", target)):
        costs["overlapped"][name] = [
            (
                rows,
                _median_beside(
                    forward(model, steps[name], rows),
                    forward(model_beside, steps[other], 4),
                    workers,
                    measured_is_target=name == "target",
                ),
            )
            for rows in ROWS
        ]
    return costs


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

    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(beside,)) as pool:
        repeating = pool.submit(repeat)
        torch.set_num_threads(mine)
        try:
            return _median(run)
        finally:
            going = False
            torch.set_num_threads(threads)
            repeating.result()
