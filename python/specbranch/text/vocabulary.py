"""Whether two models, or a model and a corpus, have the same tokens, and which of them end a text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specbranch.core.checks import whole
from specbranch.core.errors import SpecBranchError
from specbranch.core.identity import ModelIdentity
from specbranch.text.generation_config import OWNER


def check_vocabularies(target: PreTrainedTokenizerBase | None, draft: PreTrainedTokenizerBase | None) -> None:
    """Refuse a draft whose tokens are not the target's; a vocabulary padded at the end is fine.

    Raises SpecBranchError naming the first ids that differ.
    """
    if target is None or draft is None:
        return
    ours, theirs = target.get_vocab(), draft.get_vocab()
    if ours == theirs:
        return
    words = {index: word for word, index in ours.items()}
    other = {index: word for word, index in theirs.items()}
    differ = [index for index in sorted(words.keys() & other.keys()) if words[index] != other[index]]
    if not differ and abs(len(words) - len(other)) <= _added(target, draft):
        return
    if not differ:
        differ = sorted(words.keys() ^ other.keys())
    examples = ", ".join(f"{i} ({words.get(i)!r} / {other.get(i)!r})" for i in differ[:5])
    raise SpecBranchError(
        f"the draft has another vocabulary than the target: {len(differ)} ids differ, "
        f"the first (target / draft): {examples}"
    )


def _added(target: PreTrainedTokenizerBase, draft: PreTrainedTokenizerBase) -> int:
    """How many ids one of the two may have beyond the other's end: its added special tokens."""
    return max(len(target.added_tokens_decoder), len(draft.added_tokens_decoder))


def identify_vocabulary(tokenizer: PreTrainedTokenizerBase) -> ModelIdentity:
    """The tokenizer's name, which is its checkpoint's, and a fingerprint of all tokens with their ids."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda word: (word[1], word[0]))
    digest = hashlib.sha256(json.dumps(words).encode())
    name = Path(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__).name
    return ModelIdentity(name, digest.hexdigest()[:16])


def end_of_sequence(model: PreTrainedModel) -> frozenset[int]:
    """The ids that end a text: those of the generation config alone, as for transformers' `generate`.

    Raises SpecBranchError for what is no id.
    """
    return ids_of(getattr(model.generation_config, "eos_token_id", None), f"{OWNER}: eos_token_id")


def ids_of(value: Any, name: str) -> frozenset[int]:
    """Of one id, several or none. Raises SpecBranchError for what is no id."""
    if isinstance(value, Tensor):
        value = value.tolist()
    ids = [] if value is None else value if isinstance(value, (list, tuple)) else [value]
    return frozenset(whole(name, token) for token in ids)
