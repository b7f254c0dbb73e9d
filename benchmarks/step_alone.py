"""One model's steps with nothing else on the device: for what times and profiles them."""

from __future__ import annotations

from collections.abc import Callable

from specbranch.core.messages import Step
from specbranch.core.sampling import Sampling
from specbranch.runtime.runner import Judged, Leaves, Runner

CANDIDATES = 6
BURST = 8
PREFIX = 256  # tokens behind which they are


def step_alone(runner: Runner, rows: int) -> Callable[[], list[Step]]:
    """A function that runs one verification over `rows` nodes, or a burst of draft steps over `rows` leaves, and gives
    its steps. The runner's model must be attached, here and there."""
    model = runner.model
    runner.reset(PREFIX + 1)
    runner.prefill([1] * PREFIX)

    def verify() -> list[Step]:
        model.cache.rollback(PREFIX)
        parents = [-1] + [0] * (rows - 1)
        batch = model.place(range(rows), parents, [1] * rows, [PREFIX + (parent >= 0) for parent in parents])
        (pending,) = runner.verify([Judged(model, batch, parents, Sampling())])
        return [pending.result().step]

    def draft() -> list[Step]:
        model.cache.rollback(PREFIX)
        root = Leaves(model, model.place([0], [-1], [1], [PREFIX]), Sampling())
        runner.draft([root], CANDIDATES, model.vocabulary, 1, always)
        batch = model.place(range(1, rows + 1), [0] * rows, [1] * rows, [PREFIX + 1] * rows)
        leaves = Leaves(model, batch, Sampling())
        (burst,) = runner.draft([leaves], CANDIDATES, model.vocabulary, BURST, always)
        return [samples.step for samples in burst]

    return draft if model.role == "draft" else verify


def always(under_way: int) -> bool:
    return True
