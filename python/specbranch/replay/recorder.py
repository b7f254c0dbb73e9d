"""Making records: a pair decodes prompts once, and what a policy could ask of it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specbranch.core.errors import SpecBranchError
from specbranch.core.sampling import Sampling
from specbranch.core.tree import Choice, Proposals, Tree
from specbranch.drafters.model import ModelDrafter
from specbranch.replay.record import TAIL, Record, RecordedProposals, RecordedText
from specbranch.runtime.hrad.tap import FeatureTap
from specbranch.runtime.identity import identify
from specbranch.runtime.model import PREFILL_CHUNK
from specbranch.runtime.pair import Pair
from specbranch.runtime.runner import Runner
from specbranch.text.encoding import encode
from specbranch.text.prompts import Prompt

if TYPE_CHECKING:
    from specbranch.engine import SpecBranch

WINDOW = 16  # positions whose tails are drafted together


def collect(
    engine: SpecBranch,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    max_new_tokens: int,
    path: Path,
    features: bool,
    before: Callable[[str], None],
) -> Record:
    """Decode and record every prompt that the file at `path` does not hold yet; it is written after each.

    before: told each prompt's id when its turn comes. Raises SpecBranchError when the file there is of another pair
    or other settings.
    """
    assert engine.draft is not None
    settings: dict[str, float] = {**asdict(sampling), "max_new_tokens": max_new_tokens}
    record = Record(identify(engine.target), identify(engine.draft), settings, [])
    if path.exists():
        found = Record.load(path)
        check_continues(found, record, features, path)
        record = found
    outside: list[float] = []
    done = {(text.task, text.id) for text in record.texts}
    for prompt in prompts:
        before(prompt.id)
        if (prompt.task, prompt.id) in done:
            continue
        ids = encode(engine.tokenizer, prompt.text, chat=prompt.chat)
        made = engine.generate(ids, max_new_tokens=max_new_tokens, method="specbranch", **asdict(sampling))
        if not made.tokens:
            continue
        outside += [round.outside_seconds for round in made.stats.log]
        text = record_text(
            engine.pair, ids, made.tokens, id=prompt.id, task=prompt.task, sampling=sampling, features=features
        )
        record = replace(record, texts=[*record.texts, text], round_seconds=median(outside))
        record.save(path)
    return record


def check_continues(found: Record, wanted: Record, features: bool, path: Path) -> None:
    """That a record at `path` may be continued with these settings."""
    for name, here, there in (
        ("target", wanted.target, found.target),
        ("draft", wanted.draft, found.draft),
        *((name, value, found.sampling.get(name)) for name, value in wanted.sampling.items()),
        *(("choice of features", features, text.features is not None) for text in found.texts[:1]),
    ):
        if here != there:
            raise SpecBranchError(f"{path}: a record with another {name} ({there}, here {here}); choose another file")


def record_text(
    pair: Pair,
    prompt: Sequence[int],
    tokens: Sequence[int],
    *,
    id: str,
    task: str,
    k: int = 8,
    sampling: Sampling | None = None,
    features: bool = False,
) -> RecordedText:
    """What the draft proposes along a text that the target generated from `prompt`, and a little way down each of its
    wrong turns.

    tokens: the new ids. k: candidates kept at each position. sampling: as the text was sampled. features: also keep the
    target's, for a learned predictor; this takes a target forward over the text.
    """
    seen = None
    if features:
        with pair.running(features=True) as slot:
            seen = read_features(slot.target, slot.tap, prompt, tokens)
    with pair.running() as slot:
        draft = slot.need_draft("a record")
        draft.reset(len(prompt) + len(tokens))
        drafter = ModelDrafter(draft, sampling or Sampling(), k, slot.vocabulary)
        along, tails = follow(drafter, prompt, tokens)
    width = len(along[0].tokens)
    target_tokens = torch.tensor(list(tokens))
    return RecordedText(id, task, len(prompt), target_tokens, _stack(along, width), _stack(tails, width), seen)


def follow(
    drafter: ModelDrafter, prompt: Sequence[int], tokens: Sequence[int]
) -> tuple[list[Proposals], list[Proposals | None]]:
    """Proposals at every token of a text, and TAIL of them behind each; None where the draft is right."""
    drafter.prefill(prompt)
    text = [*prompt, *tokens]
    along: list[Proposals] = []
    tails: list[list[Proposals | None]] = []
    for start in range(0, len(tokens), WINDOW):
        position = len(prompt) - 1 + start
        window = text[position + 1 : position + 1 + min(WINDOW, len(tokens) - start)]
        tree = Tree(text[position], position)
        propose(drafter, tree, [0])
        for depth, token in enumerate(window):
            tree.add(depth, token, 1.0)
        if len(window) > 1:
            propose(drafter, tree, range(1, len(window)))
        here = [_proposals(tree, node) for node in range(len(window))]
        wrong = [node for node, proposals in enumerate(here) if proposals.tokens[0] != window[node]]
        ends = {node: tree.take(Choice(node, 0)) for node in wrong}
        found: list[list[Proposals | None]] = [[None] * TAIL for _ in window]
        for step in range(TAIL if ends else 0):
            propose(drafter, tree, list(ends.values()))
            for node, end in ends.items():
                found[node][step] = _proposals(tree, end)
                ends[node] = tree.take(Choice(end, 0))
        along += here
        tails += found
        drafter.commit(range(len(window)), {}, window)
    return along, [proposals for tail in tails for proposals in tail]


def propose(drafter: ModelDrafter, tree: Tree, nodes: Sequence[int]) -> None:
    """One draft step over some nodes, noted in the tree."""
    tree.descend(nodes, drafter.propose(tree, nodes).proposals)


def read_features(target: Runner, tap: FeatureTap, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """The target's features before each of `tokens`, [len(tokens), F]: those that its verdicts would have given.

    target: attached, and so is its tap.
    """
    text = [*prompt, *tokens]
    target.reset(len(text))
    found = []
    first = max(len(prompt) - 2, 0)
    target.prefill(text[:first])
    for start in range(first, len(text) - 2, PREFILL_CHUNK):
        chunk = text[start : min(start + PREFILL_CHUNK, len(text) - 2)]
        target.prefill(chunk)
        with target.device.running():
            found.append(tap.rows(slice(None), text[start + 1 : start + 1 + len(chunk)]))
    features = torch.cat(found)
    if len(prompt) == 1:  # nothing was verified before the first token
        features = torch.cat([torch.zeros_like(features[:1]), features])
    return features


def _proposals(tree: Tree, node: int) -> Proposals:
    proposals = tree.proposals[node]
    assert proposals is not None
    return proposals


def _stack(all_proposals: Sequence[Proposals | None], k: int) -> RecordedProposals:
    """As tensors; what is missing is -1 and NaN."""

    def rows() -> Iterator[tuple[list[int], list[float], float, float]]:
        for proposals in all_proposals:
            if proposals is None or proposals.signals is None:
                yield [-1] * k, [torch.nan] * k, torch.nan, torch.nan
                continue
            missing = k - len(proposals.tokens)
            yield (
                [*proposals.tokens, *[-1] * missing],
                [*proposals.confidence, *[0.0] * missing],
                proposals.signals.entropy,
                min(proposals.signals.margin, 100.0),
            )

    tokens, agreement, entropy, margin = zip(*rows(), strict=True)
    return RecordedProposals(torch.tensor(tokens), torch.tensor(agreement), torch.tensor(entropy), torch.tensor(margin))
