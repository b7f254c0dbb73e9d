"""Several texts in one forward of a model."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

from specbranch.core.messages import Drafted, Trunk
from specbranch.drafters.model import ModelDrafter
from specbranch.runtime.runner import Judged, Leaves
from specbranch.runtime.verifier import ModelVerifier
from specbranch.stages import Drafter, Failed, Nodes, Pending, ShouldContinue, Verifier


class Together:
    """The texts whose rows lie in the same buffers share a step, where the model lets them; see stages.Forwards."""

    def verify(self, texts: Sequence[tuple[Verifier, Trunk]]) -> Sequence[Pending]:
        found: dict[int, Pending] = {}
        placed: dict[int, Judged] = {}
        for place, (verifier, trunk) in enumerate(texts):
            try:
                placed[place] = _model_verifier(verifier).place(trunk)
            except Exception as error:  # of this text alone
                found[place] = Failed(error)
        for group in groups(placed):
            verifiers = [_model_verifier(texts[place][0]) for place in group]
            try:
                pending = verifiers[0].runner.verify([placed[place] for place in group])
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
        placed: dict[int, Leaves] = {}
        for place, (drafter, tree, nodes) in enumerate(texts):
            try:
                placed[place] = _model_drafter(drafter).place(tree, nodes)
            except Exception as error:
                found[place] = error
        for group in groups(placed):
            drafters = [_model_drafter(texts[place][0]) for place in group]
            leaves, vocabulary = [placed[place] for place in group], drafters[0].vocabulary
            candidates = max(drafter.candidates for drafter in drafters)
            try:
                samples = drafters[0].runner.draft(leaves, candidates, vocabulary, steps, should_continue)
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


def groups(placed: Mapping[int, Judged] | Mapping[int, Leaves]) -> Iterable[list[int]]:
    """Which texts share a step, by their places."""
    by_key: dict[Hashable, list[int]] = {}
    for place, text in placed.items():
        buffers = id(text.model.cache.buffers)
        by_key.setdefault(buffers if text.model.joins else (buffers, place), []).append(place)
    return by_key.values()


def _model_verifier(verifier: Verifier) -> ModelVerifier:
    assert isinstance(verifier, ModelVerifier)
    return verifier


def _model_drafter(drafter: Drafter) -> ModelDrafter:
    assert isinstance(drafter, ModelDrafter)
    return drafter
