"""Making records: a pair decodes prompts once, and what a policy could ask of it is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specbranch.constrained import Constrained
from specbranch.core.errors import SpecBranchError
from specbranch.core.excerpt import ALL, Excerpt
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
from specbranch.text.grammar import Constraint
from specbranch.text.kinds import constraint_of
from specbranch.text.prompts import Prompt, check_distinct

if TYPE_CHECKING:
    from specbranch.engine import SpecBranch

WINDOW = 16  # positions whose tails are drafted together
# What of a machine a text may depend on in its last bits, and what of a run the draft's words do.
DECIDES = ("draft_context", "dtype", "device", "isa", "core_isa", "specbranch", "torch", "transformers", "tokenizers")


def collect(
    engine: SpecBranch,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    max_new_tokens: int,
    path: Path,
    features: bool,
    before: Callable[[str], None],
    failed: Callable[[Prompt, SpecBranchError], None] | None = None,
    machine: Mapping[str, object] | None = None,
    prompt_ids: bool = False,
    whitespace: bool = False,
    forced: bool = True,
) -> Record:
    """Decode and record every prompt that the file at `path` does not hold yet; it is written after each. What comes
    out is the same whether or not it was interrupted, but for times.

    before: told each prompt's id when its turn comes. failed: told of a prompt that cannot be used, instead of an error
    that ends the run. machine: what it is made on and with; a file made with other versions is not continued.
    prompt_ids: also keep the prompts' tokens, for replays with retrieval. whitespace, forced: of the prompts'
    constraints.
    Raises SpecBranchError when the file there is of another pair, other settings or other prompts.
    """
    assert engine.draft is not None
    check_distinct(prompts)
    settings: dict[str, float] = {**asdict(sampling), "max_new_tokens": max_new_tokens}
    if any(prompt.constraint is not None for prompt in prompts):
        settings |= {"json_whitespace": whitespace, "forced_tokens": forced}
    record = Record(identify(engine.target), identify(engine.draft), settings, [], machine=dict(machine or {}))
    if path.exists() and path.stat().st_size:
        found = Record.load(path)
        check_continues(found, record, features, prompt_ids, path)
        check_prompts(found, prompts, path)
        record = found
    done = {(text.task, text.id): text for text in record.texts}
    for prompt in prompts:
        before(prompt.id)
        if (prompt.task, prompt.id) in done:
            continue
        try:
            constraint = None
            if prompt.constraint is not None:
                constraint = constraint_of(*prompt.constraint, whitespace=whitespace, forced=forced)
            text = _decoded(engine, prompt, constraint, sampling, max_new_tokens, features, prompt_ids)
        except SpecBranchError as error:
            if failed is None:
                raise
            failed(prompt, error)
            continue
        done[prompt.task, prompt.id] = text
        texts = [done[each.task, each.id] for each in prompts if (each.task, each.id) in done]
        measured = [text.round_seconds for text in texts if text.round_seconds]
        record = replace(record, texts=texts, round_seconds=median(measured) if measured else record.round_seconds)
        record.save(path)
    return record


def _decoded(
    engine: SpecBranch,
    prompt: Prompt,
    constraint: Constraint | None,
    sampling: Sampling,
    max_new_tokens: int,
    features: bool,
    prompt_ids: bool,
) -> RecordedText:
    ids = encode(engine.tokenizer, prompt.text, chat=prompt.chat)
    options = {"max_new_tokens": max_new_tokens, "constraint": constraint, **asdict(sampling)}
    made = engine.generate(ids, method="specbranch", **options)
    request = engine.request(ids, **options)
    text = record_text(
        engine.pair,
        ids,
        made.tokens,
        id=prompt.id,
        task=prompt.task,
        sampling=sampling,
        features=features,
        excerpt=engine.draft_excerpt,
        constraint=request.constrained(engine.pair.vocabulary),
    )
    outside = median(round.outside_seconds for round in made.stats.log)
    kept = torch.tensor(ids) if prompt_ids else None
    return replace(text, prompt=fingerprint(prompt), round_seconds=outside, prompt_ids=kept).rounded()


def fingerprint(prompt: Prompt) -> str:
    """Of what a prompt's text is continued from, and has to follow."""
    said = [prompt.text, prompt.chat, *(() if prompt.constraint is None else prompt.constraint)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def check_continues(found: Record, wanted: Record, features: bool, prompt_ids: bool, path: Path) -> None:
    """That a record at `path` may be continued with these settings. Raises SpecBranchError."""
    shared = wanted.machine.keys() & found.machine.keys()
    for name, here, there in (
        ("target", wanted.target, found.target),
        ("draft", wanted.draft, found.draft),
        *((name, value, found.sampling.get(name)) for name, value in wanted.sampling.items()),
        *(("choice of features", features, text.features is not None) for text in found.texts[:1]),
        *(("choice of prompt ids", prompt_ids, text.prompt_ids is not None) for text in found.texts[:1]),
        *((name, wanted.machine[name], found.machine[name]) for name in DECIDES if name in shared),
    ):
        if here != there:
            raise SpecBranchError(f"{path}: a record with another {name} ({there}, here {here}); choose another file")


def check_prompts(found: Record, prompts: Sequence[Prompt], path: Path) -> None:
    """That what a record at `path` holds is of these prompts. Raises SpecBranchError."""
    wanted = {(prompt.task, prompt.id): fingerprint(prompt) for prompt in prompts}
    for text in found.texts:
        expected = wanted.get((text.task, text.id))
        if expected is None:
            raise SpecBranchError(
                f"{path}: holds {text.id} of {text.task}, which is not among these prompts; choose another file"
            )
        if text.prompt not in ("", expected):
            raise SpecBranchError(f"{path}: {text.id} of {text.task} was another prompt; choose another file")


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
    excerpt: Excerpt = ALL,
    constraint: Constrained | None = None,
) -> RecordedText:
    """What the draft proposes along a text that the target generated from `prompt`, and a little way down each of its
    wrong turns.

    tokens: the new ids. k: candidates kept at each position. sampling: as the text was sampled. features: also keep the
    target's, for a learned predictor; this takes a target forward over the text. excerpt: what of the prompt the draft
    reads. constraint: what the text was under, at its beginning.
    """
    seen = None
    if features:
        with pair.running(features=True) as slot:
            seen = read_features(slot.target, slot.tap, prompt, tokens)
    with pair.running() as slot:
        draft = slot.need_draft("a record")
        draft.model.check(len(prompt) + len(tokens))
        drafter = ModelDrafter(draft, sampling or Sampling(), k, slot.vocabulary, constraint=constraint)
        along, tails, forced = follow(drafter, prompt, tokens, excerpt)
    width = max(len(proposals.tokens) for proposals in along)  # fewer where fewer may stand
    target_tokens = torch.tensor(list(tokens))
    said, behind = _stack(along, width), _stack(tails, width)
    kept = torch.tensor(forced) if constraint is not None and constraint.forces else None
    return RecordedText(id, task, len(prompt), target_tokens, said, behind, seen, forced=kept)


def follow(
    drafter: ModelDrafter, prompt: Sequence[int], tokens: Sequence[int], excerpt: Excerpt = ALL
) -> tuple[list[Proposals], list[Proposals | None], list[bool]]:
    """Proposals at every token of a text, and TAIL of them behind each, None where the draft is right; and whether the
    drafter's constraint let nothing else stand there."""
    text = [*prompt, *tokens]
    drafter.begin(prompt)
    drafter.read(excerpt, len(text))
    along: list[Proposals] = []
    tails: list[list[Proposals | None]] = []
    forced: list[bool] = []
    constraint = drafter.constraint
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
        if constraint is not None:
            forced += [bool(constraint.forced(window[:place])) for place in range(len(window))]
            constraint.accept(window)
    return along, [proposals for tail in tails for proposals in tail], forced


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
