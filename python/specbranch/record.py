"""Records of a pair's decoding: what the target said and what the draft would have said, position by position.

A record is all that a policy's speed depends on besides the costs of forwards, so any policy can be replayed over it
without the models (replay.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specbranch.drafter import Drafter
from specbranch.errors import SpecBranchError
from specbranch.tree import Proposals, Tree

FORMAT = "specbranch-record-1"
WINDOW = 16  # positions whose tails are drafted together
TAIL = 7  # tokens drafted behind a wrong one


@dataclass(frozen=True)
class Said:
    """What the draft said at N positions, for its k best candidates.

    tokens: int64 [N, k]. agreement: float32 [N, k], its own word on each. entropy, margin: float32 [N].
    """

    tokens: Tensor
    agreement: Tensor
    entropy: Tensor
    margin: Tensor


@dataclass(frozen=True)
class RecordedText:
    """One generated text of N tokens.

    tokens: int64 [N], the target's. said: at each position, after the tokens before it. tails: the same for the TAIL
    tokens that the draft goes on with after its own first candidate, where that is wrong: `[N * TAIL]` rows, NaN
    where it is right. features: float16 [N, F], the target's, where they were asked for.
    """

    id: str
    task: str
    prompt_tokens: int
    tokens: Tensor
    said: Said
    tails: Said
    features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Record:
    """Texts of one pair under one sampling, and what forwards cost when they were made.

    costs: seconds by mode ("serial", "overlapped") and model ("target", "draft") as [rows, seconds] pairs, plus
    "round": seconds of a round outside the models.
    """

    target: str
    draft: str
    sampling: dict[str, float]
    texts: list[RecordedText]
    costs: dict[str, dict[str, list[tuple[int, float]]]] = field(default_factory=dict)
    round_seconds: float = 0.0
    machine: dict[str, object] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write to a safetensors file; the file is complete or not there."""
        tensors = {}
        entries = []
        for i, text in enumerate(self.texts):
            entries.append({"id": text.id, "task": text.task, "prompt_tokens": text.prompt_tokens})
            tensors[f"{i}.tokens"] = text.tokens.to(torch.int32)
            for name, said in (("said", text.said), ("tails", text.tails)):
                for part, values in vars(said).items():
                    kept = values.to(torch.int32) if part == "tokens" else values.to(torch.float16)
                    tensors[f"{i}.{name}.{part}"] = kept.contiguous()
            if text.features is not None:
                tensors[f"{i}.features"] = text.features.to(torch.float16).contiguous()
        head = {key: value for key, value in asdict(self, dict_factory=_without_texts).items() if key != "texts"}
        metadata = {"format": FORMAT, "head": json.dumps(head), "texts": json.dumps(entries)}
        partial = path.with_name(path.name + ".part")
        save_file(tensors, partial, metadata)
        partial.replace(path)

    @staticmethod
    def load(path: Path) -> Record:
        """Read a record. Raises SpecBranchError for a file that is not one."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise SpecBranchError(f"{path}: expected a record of the format {FORMAT}")
                head = json.loads(metadata["head"])
                names = set(file.keys())
                texts = [
                    RecordedText(
                        **entry,
                        tokens=file.get_tensor(f"{i}.tokens").long(),
                        said=_said(file, f"{i}.said"),
                        tails=_said(file, f"{i}.tails"),
                        features=file.get_tensor(f"{i}.features") if f"{i}.features" in names else None,
                    )
                    for i, entry in enumerate(json.loads(metadata["texts"]))
                ]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise SpecBranchError(f"{path}: not a readable record: {error}") from error
        return Record(texts=texts, **head)


def _without_texts(items: list[tuple[str, object]]) -> dict[str, object]:
    return {key: value for key, value in items if key != "texts"}


def _said(file: Any, name: str) -> Said:
    tokens = file.get_tensor(f"{name}.tokens").long()
    return Said(tokens, *(file.get_tensor(f"{name}.{part}").float() for part in ("agreement", "entropy", "margin")))


def record_text(
    drafter: Drafter, prompt: Sequence[int], tokens: Sequence[int], *, id: str, task: str, features: Tensor | None
) -> RecordedText:
    """Run the draft along a text that the target has generated, and a little way down each of its wrong turns.

    drafter: with an attached draft model, reset for the whole text, and without a calibrator.
    """
    drafter.prefill(prompt[:-1])
    text = [*prompt, *tokens]
    said: list[Proposals] = []
    tails: list[list[Proposals | None]] = []
    for start in range(0, len(tokens), WINDOW):
        position = len(prompt) - 1 + start
        window = text[position + 1 : position + 1 + min(WINDOW, len(tokens) - start)]
        tree = Tree.rooted(text[position], position)
        tree = drafter.propose(tree, [0], text)
        for depth, token in enumerate(window):
            tree = tree.hang(depth, token)
        chain = list(range(1, len(window)))
        if chain:
            tree = drafter.propose(tree, chain, text)
        here = [_proposals(tree, node) for node in range(len(window))]
        ends = {}
        for node, proposals in enumerate(here):
            if proposals.tokens[0] != window[node]:
                tree = tree.adopt(node, 0)
                ends[node] = len(tree) - 1
        found: list[list[Proposals | None]] = [[None] * TAIL for _ in window]
        for step in range(TAIL if ends else 0):
            tree = drafter.propose(tree, list(ends.values()), text)
            for node, end in ends.items():
                found[node][step] = _proposals(tree, end)
                tree = tree.adopt(end, 0)
                ends[node] = len(tree) - 1
        said += here
        tails += found
        drafter.commit(range(len(window)), {})
    flat = [proposals for tail in tails for proposals in tail]
    k = len(said[0].tokens)
    return RecordedText(id, task, len(prompt), torch.tensor(list(tokens)), _stack(said, k), _stack(flat, k), features)


def _proposals(tree: Tree, node: int) -> Proposals:
    proposals = tree.nodes[node].proposals
    assert proposals is not None
    return proposals


def _stack(all_proposals: Sequence[Proposals | None], k: int) -> Said:
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
    return Said(torch.tensor(tokens), torch.tensor(agreement), torch.tensor(entropy), torch.tensor(margin))
