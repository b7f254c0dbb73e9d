"""Several texts in one forward of a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from specbranch.core.messages import Drafted, Trunk
from specbranch.drafters.model import ModelDrafter
from specbranch.runtime.runner import Runner
from specbranch.runtime.verifier import ModelVerifier
from specbranch.stages import Drafter, Failed, Nodes, Pending, ShouldContinue, Verifier

T = TypeVar("T")


class Together:
    """The texts whose rows lie in the same buffers share a step, where the model lets them; see stages.Forwards."""

    def verify(self, texts: Sequence[tuple[Verifier, Trunk]]) -> Sequence[Pending]:
        found: dict[int, Pending] = {}
        for group in groups(texts, lambda text: _model_verifier(text[0]).runner):
            verifiers = [_model_verifier(texts[place][0]) for place in group]
            placed = [verifier.place(texts[place][1]) for verifier, place in zip(verifiers, group, strict=True)]
            try:
                pending = verifiers[0].runner.verify(placed)
            except ValueError as error:  # logits that cannot be sampled, of the only text
                if len(group) > 1:
                    raise
                found[group[0]] = Failed(error)
                continue
            for place, verifier, each in zip(group, verifiers, pending, strict=True):
                found[place] = verifier.pending(each)
        return [found[place] for place in range(len(texts))]

    def propose(self, texts: Sequence[Nodes], steps: int, should_continue: ShouldContinue) -> list[Drafted | Exception]:
        found: dict[int, Drafted | Exception] = {}
        for group in groups(texts, lambda text: _model_drafter(text[0]).runner):
            drafters = [_model_drafter(texts[place][0]) for place in group]
            leaves = [drafter.place(*texts[place][1:]) for drafter, place in zip(drafters, group, strict=True)]
            candidates = max(drafter.candidates for drafter in drafters)
            try:
                samples = drafters[0].runner.draft(leaves, candidates, drafters[0].vocabulary, steps, should_continue)
            except ValueError as error:
                if len(group) > 1:
                    raise
                found[group[0]] = error
                continue
            for place, drafter, each in zip(group, drafters, samples, strict=True):
                try:
                    found[place] = drafter.drafted(*texts[place][1:], each)
                except ValueError as error:
                    found[place] = error
        return [found[place] for place in range(len(texts))]


def groups(texts: Sequence[T], runner_of: Callable[[T], Runner]) -> Iterable[list[int]]:
    """Which places of `texts` share a step."""
    by_key: dict[Hashable, list[int]] = {}
    for place, text in enumerate(texts):
        model = runner_of(text).model
        key = id(model.cache.buffers) if model.joins else (id(model.cache.buffers), place)
        by_key.setdefault(key, []).append(place)
    return by_key.values()


def _model_verifier(verifier: Verifier) -> ModelVerifier:
    assert isinstance(verifier, ModelVerifier)
    return verifier


def _model_drafter(drafter: Drafter) -> ModelDrafter:
    assert isinstance(drafter, ModelDrafter)
    return drafter
