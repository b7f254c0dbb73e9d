"""Records of a pair's decoding: the target's tokens and what the draft would have proposed, position by position.

A record is all that a policy's speed depends on besides the costs of forwards, so any policy can be replayed over it
without the models (replayer.py).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specbranch.core.errors import SpecBranchError
from specbranch.core.identity import ModelIdentity

FORMAT = "specbranch-record-1"
TAIL = 7  # tokens drafted behind a wrong one


@dataclass(frozen=True)
class RecordedProposals:
    """What the draft proposed at N positions: its k best candidates.

    tokens: int64 [N, k]. agreement: float32 [N, k], its own confidence in each. entropy, margin: float32 [N].
    """

    tokens: Tensor
    agreement: Tensor
    entropy: Tensor
    margin: Tensor


@dataclass(frozen=True)
class RecordedText:
    """One generated text of N tokens.

    tokens: int64 [N], the target's. proposals: at each position, after the tokens before it. tails: the same for the
    TAIL tokens that the draft goes on with after its own first candidate, where that is wrong: `[N * TAIL]` rows, NaN
    where it is right. features: bfloat16 [N, F], the target's before each token, where they were asked for.
    """

    id: str
    task: str
    prompt_tokens: int
    tokens: Tensor
    proposals: RecordedProposals
    tails: RecordedProposals
    features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Record:
    """Texts of one pair under one sampling, and what forwards cost where they were made.

    sampling: the parameters, with max_new_tokens. costs: seconds by mode ("serial", "overlapped") and model
    ("target", "draft") as [rows, seconds] pairs. round_seconds: of a round outside the models (0: not measured).
    """

    target: ModelIdentity
    draft: ModelIdentity
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
            for name, rows in (("said", text.proposals), ("tails", text.tails)):
                for part, values in vars(rows).items():
                    kept = values.to(torch.int32) if part == "tokens" else values.to(torch.float16)
                    tensors[f"{i}.{name}.{part}"] = kept.contiguous()
            if text.features is not None:
                tensors[f"{i}.features"] = text.features.to(torch.bfloat16).contiguous()
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
                        proposals=_read(file, f"{i}.said"),
                        tails=_read(file, f"{i}.tails"),
                        features=file.get_tensor(f"{i}.features") if f"{i}.features" in names else None,
                    )
                    for i, entry in enumerate(json.loads(metadata["texts"]))
                ]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise SpecBranchError(f"{path}: not a readable record: {error}") from error
        target, draft = ModelIdentity(**head.pop("target")), ModelIdentity(**head.pop("draft"))
        return Record(target, draft, texts=texts, **head)


def _without_texts(items: list[tuple[str, object]]) -> dict[str, object]:
    return {key: value for key, value in items if key != "texts"}


def _read(file: Any, name: str) -> RecordedProposals:
    tokens = file.get_tensor(f"{name}.tokens").long()
    return RecordedProposals(
        tokens, *(file.get_tensor(f"{name}.{part}").float() for part in ("agreement", "entropy", "margin"))
    )
