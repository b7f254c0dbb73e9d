"""One model's steps with nothing else on the device: for what times and profiles them."""

from __future__ import annotations

from collections.abc import Callable

from specbranch.core.messages import Step
from specbranch.core.sampling import Sampling
from specbranch.core.tree import Tree
from specbranch.drafters.model import always
from specbranch.runtime.runner import Runner

CANDIDATES = 6
BURST = 8
PREFIX = 256  # tokens behind which they are


def step_alone(runner: Runner, rows: int) -> Callable[[], list[Step]]:
    """A function that runs one verification over `rows` nodes, or a burst of draft steps over `rows` leaves, and gives
    its steps. The runner's model must be attached, here and there."""
    model = runner.model
    runner.reset(PREFIX + 1)
    runner.prefill([1] * PREFIX)
    tree = Tree.rooted(1, PREFIX)
    for _ in range(rows):
        tree = tree.hang(0, 1)

    def verify() -> list[Step]:
        model.cache.rollback(PREFIX)
        batch = model.place(tree, range(rows))
        return [runner.verify(batch, [-1] + [0] * (rows - 1), Sampling()).result().step]

    def draft() -> list[Step]:
        model.cache.rollback(PREFIX)
        runner.draft(model.place(tree, [0]), CANDIDATES, model.vocabulary, Sampling(), 1, always)
        batch = model.place(tree, range(1, rows + 1))
        burst = runner.draft(batch, CANDIDATES, model.vocabulary, Sampling(), BURST, always)
        return [guess.step for guess in burst]

    return draft if model.role == "draft" else verify
