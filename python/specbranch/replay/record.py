"""Records of a pair's decoding: the target's tokens and what the draft would have proposed, position by position.

A record is all that a policy's speed depends on besides the costs of forwards, so any policy can be replayed over it
without the models (replayer.py).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from specbranch.core.errors import SpecBranchError
from specbranch.core.files import write_tensors
from specbranch.core.identity import ModelIdentity

FORMAT = "specbranch-record-1"
ENTRY = ("id", "task", "prompt_tokens", "prompt", "round_seconds")  # what of a text is no tensor
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

    def rounded(self) -> RecordedProposals:
        """As a file gives it back."""
        said = (values.half().float() for values in (self.agreement, self.entropy, self.margin))
        return RecordedProposals(self.tokens, *said)


@dataclass(frozen=True)
class RecordedText:
    """One generated text of N tokens.

    tokens: int64 [N], the target's. proposals: at each position, after the tokens before it. tails: the same for the
    TAIL tokens that the draft goes on with after its own first candidate, where that is wrong: `[N * TAIL]` rows, NaN
    where it is right. features: bfloat16 [N, F], the target's before each token, where they were asked for. prompt: a
    fingerprint of what was continued ("": not known). round_seconds: of a round outside the models (0: not measured).
    prompt_ids: int64 [prompt_tokens], where they were asked for: a prompt can be read from them. forced: bool [N],
    where nothing else could stand, under a constraint whose forced tokens are drafted; the proposals are under it too.
    """

    id: str
    task: str
    prompt_tokens: int
    tokens: Tensor
    proposals: RecordedProposals
    tails: RecordedProposals
    features: Tensor | None = None
    prompt: str = ""
    round_seconds: float = 0.0
    prompt_ids: Tensor | None = None
    forced: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def rounded(self) -> RecordedText:
        """As a file gives it back, so that it makes no difference whether a run was resumed."""
        features = None if self.features is None else self.features.to(torch.bfloat16)
        return replace(self, proposals=self.proposals.rounded(), tails=self.tails.rounded(), features=features)


@dataclass(frozen=True)
class Record:
    """Texts of one pair under one sampling, and what forwards cost where they were made.

    sampling: the parameters, with max_new_tokens, and how constraints were kept where there are some. costs: seconds by
    mode ("serial", "overlapped") and model ("target", "draft") as [rows, seconds] pairs. round_seconds: of a round
    outside the models (0: not measured). machine: what it was made on and with.
    """

    target: ModelIdentity
    draft: ModelIdentity
    sampling: dict[str, float]
    texts: list[RecordedText]
    costs: dict[str, dict[str, list[tuple[int, float]]]] = field(default_factory=dict)
    round_seconds: float = 0.0
    machine: dict[str, object] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write to a safetensors file, whole or not at all; a record there is replaced.

        Raises SpecBranchError for a file of something else, and OSError where nothing can be written.
        """
        if path.exists() and path.stat().st_size and not is_record(path):
            raise SpecBranchError(f"{path} is not a record: it stays as it is; choose another file")
        tensors = {}
        entries = []
        for i, text in enumerate(self.texts):
            entries.append({name: getattr(text, name) for name in ENTRY})
            tensors[f"{i}.tokens"] = text.tokens.to(torch.int32)
            for name, rows in (("said", text.proposals), ("tails", text.tails)):
                for part, values in vars(rows).items():
                    kept = values.to(torch.int32) if part == "tokens" else values.to(torch.float16)
                    tensors[f"{i}.{name}.{part}"] = kept.contiguous()
            if text.features is not None:
                tensors[f"{i}.features"] = text.features.to(torch.bfloat16).contiguous()
            if text.prompt_ids is not None:
                tensors[f"{i}.prompt_ids"] = text.prompt_ids.to(torch.int32)
            if text.forced is not None:
                tensors[f"{i}.forced"] = text.forced
        head = asdict(replace(self, texts=[]))
        del head["texts"]
        metadata = {"format": FORMAT, "head": json.dumps(head), "texts": json.dumps(entries)}
        write_tensors(path, save(tensors, metadata))

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
                        prompt_ids=file.get_tensor(f"{i}.prompt_ids").long() if f"{i}.prompt_ids" in names else None,
                        forced=file.get_tensor(f"{i}.forced") if f"{i}.forced" in names else None,
                    )
                    for i, entry in enumerate(json.loads(metadata["texts"]))
                ]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise SpecBranchError(f"{path}: not a readable record: {error}") from error
        target, draft = ModelIdentity(**head.pop("target")), ModelIdentity(**head.pop("draft"))
        return Record(target, draft, texts=texts, **head)


def is_record(path: Path) -> bool:
    """Whether a file is one, by its head."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def _read(file: Any, name: str) -> RecordedProposals:
    tokens = file.get_tensor(f"{name}.tokens").long()
    return RecordedProposals(
        tokens, *(file.get_tensor(f"{name}.{part}").float() for part in ("agreement", "entropy", "margin"))
    )
