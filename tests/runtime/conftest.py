"""Shared by the tests of generations that share something."""

from collections.abc import Callable, Iterator

import pytest
from jobs import JOBS, NEW, state

from specbranch import SpecBranch


@pytest.fixture(scope="session")
def texts(bundled_pair: SpecBranch) -> list[list[int]]:
    """Of every job, alone and without a draft."""
    found = []
    for prompt, settings in JOBS:
        sampling = {name: settings[name] for name in ("temperature", "top_k", "seed") if name in settings}
        found.append(bundled_pair.generate(prompt, max_new_tokens=NEW, method="autoregressive", **sampling).tokens)
    return found


@pytest.fixture
def untouched(bundled_pair: SpecBranch) -> Iterator[Callable[[], bool]]:
    """Whether both models are as they were when the test began; asked once more when it is over."""
    assert bundled_pair.draft is not None
    models = bundled_pair.target, bundled_pair.draft
    before = [state(model) for model in models]

    def same() -> bool:
        return [state(model) for model in models] == before

    yield same
    assert same()
