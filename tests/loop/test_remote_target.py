"""A target in another process, behind a pipe: trunks and verdicts are all that passes between it and the loop."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import pytest
from tiny import tiny_model

from specbranch import METHODS, SpecBranch
from specbranch.core.messages import Trunk
from specbranch.core.sampling import Sampling
from specbranch.decoding import Decoding
from specbranch.drafters.model import ModelDrafter
from specbranch.loop import DecodingLoop
from specbranch.policies.costs import Costs
from specbranch.policies.methods import make_policy
from specbranch.runtime.model import CachedModel
from specbranch.runtime.runner import EagerRunner
from specbranch.runtime.verifier import ModelVerifier
from specbranch.runtime.workers import Threads
from specbranch.stages import Ready

SAMPLING = Sampling(temperature=0.7, seed=3)
PROMPT = [5, 9, 2, 17]


def serve(pipe: Connection) -> None:
    """The other process."""
    runner = EagerRunner(CachedModel(tiny_model(seed=1), "target"))
    verifier = ModelVerifier(runner, SAMPLING)
    while (request := pipe.recv()) is not None:
        name, argument = request
        if name == "begin":
            runner.reset(100)
        with runner.model.attached():
            answer = getattr(verifier, name)(argument)
            pipe.send(answer.result() if name == "verify" else answer)


class RemoteVerifier:
    most_rows = 64

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def _ask(self, name: str, argument: object) -> Any:
        self.pipe.send((name, argument))
        return self.pipe.recv()

    def most_tokens(self, position: int) -> int:
        answer: int = self._ask("most_tokens", position)
        return answer

    def begin(self, prompt: Sequence[int]) -> int:
        unread: int = self._ask("begin", list(prompt))
        return unread

    def read(self, most: float) -> int:
        count: int = self._ask("read", most)
        return count

    def verify(self, trunk: Trunk) -> Ready:
        return Ready(self._ask("verify", trunk))

    def commit(self, path: Sequence[int]) -> None:
        self._ask("commit", tuple(path))


@pytest.fixture(scope="module")
def pipe() -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there,), daemon=True)
    process.start()
    yield here
    here.send(None)
    process.join(60)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_target_behind_a_pipe_gives_the_same_text(pipe: Connection, method: str, overlap: bool) -> None:
    draft = EagerRunner(CachedModel(tiny_model(seed=1, num_hidden_layers=1), "draft"))
    draft.reset(100)
    policy = make_policy(method, {})
    drafter = ModelDrafter(draft, SAMPLING, policy.candidates, 32) if policy.candidates else None
    workers = Threads(1)
    decoding = Decoding(RemoteVerifier(pipe), drafter, policy, Costs(), workers, overlap)
    with draft.model.attached():
        rounds = DecodingLoop(workers).rounds(decoding, PROMPT, 40)
        text = [token for committed in rounds for token in committed]
    alone = SpecBranch(tiny_model(seed=1))
    assert text == alone.generate(PROMPT, max_new_tokens=40, method="autoregressive", temperature=0.7, seed=3).tokens
