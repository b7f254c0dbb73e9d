"""From whatever a caller gives as a prompt to token ids."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from specbranch.core.checks import shown
from specbranch.core.errors import SpecBranchError
from specbranch.text.encoding import Message, encode, is_chat

PromptInput = str | Iterable[int] | Tensor | Mapping[str, Any] | Sequence[Message]

EXPECTED = "expected text, token ids, a tokenizer's output or chat messages"
NO_IDS = (str, bytes, bytearray, memoryview, Mapping, set, frozenset)
PLAIN = {"input_ids", "special_tokens_mask", "offset_mapping", "length"}  # what a model does not see, or only as ids


def prompt_ids(tokenizer: PreTrainedTokenizerBase | None, prompt: PromptInput, vocabulary: int) -> list[int]:
    """The token ids of a prompt, all below `vocabulary`.

    prompt: text; ids in any integer form, [n] or, in a tensor or an array, [1, n]; a tokenizer's output, whose padding
    is left out as its attention_mask says; or chat messages. Raises SpecBranchError for anything else.
    """
    if isinstance(prompt, str) or is_chat(prompt):
        ids = encode(tokenizer, prompt)  # type: ignore[arg-type]
    elif isinstance(prompt, Mapping):
        ids = _tokenized(prompt)
    else:
        ids = _integers(prompt, "the prompt")
    if not ids:
        raise SpecBranchError("the prompt is empty: expected at least one token")
    if bad := [token for token in ids if not 0 <= token < vocabulary]:
        raise SpecBranchError(f"token id {bad[0]} is outside the target's vocabulary of {vocabulary}")
    return ids


def _tokenized(output: Mapping[str, Any]) -> list[int]:
    """The ids of a tokenizer's output, without its padding."""
    if output.get("input_ids") is None:
        raise SpecBranchError(f"the prompt has {', '.join(map(str, output)) or 'nothing'}; expected input_ids")
    ids = _integers(output["input_ids"], "input_ids", batch=True)
    mask: list[Any] = [1] * len(ids)
    for name, values in output.items():
        if name == "attention_mask" and values is not None:
            mask = _row(values, name, batch=True)
        elif name.endswith("token_type_ids") and not any(_row(values, name, batch=True)):
            continue
        elif name not in PLAIN and values is not None:
            raise SpecBranchError(f"the prompt has {name}; expected input_ids and attention_mask only")
    if len(mask) != len(ids):
        raise SpecBranchError(f"attention_mask has {len(mask)} elements; expected one for each of {len(ids)} input_ids")
    if any(seen not in (0, 1) for seen in mask):
        raise SpecBranchError("attention_mask has values other than 0 and 1, which specbranch cannot honour")
    kept = [place for place, seen in enumerate(mask) if seen]
    if kept and kept[-1] - kept[0] + 1 != len(kept):
        raise SpecBranchError("attention_mask hides tokens inside the prompt; expected zeros at its ends only")
    return [ids[place] for place in kept]


def _integers(values: Any, name: str, batch: bool = False) -> list[int]:
    kind = str(getattr(values, "dtype", "int")).removeprefix("torch.")  # an array may be empty: its type counts
    if not kind.lower().startswith(("int", "uint")):
        raise SpecBranchError(f"{name} is of {kind}; expected integers")
    row = _row(values, name, batch)
    return [value if type(value) is int else _integer(value, f"{name}[{place}]") for place, value in enumerate(row)]


def _row(values: Any, name: str, batch: bool = False) -> list[Any]:
    """The elements of a list, range, array or tensor. batch: a list of one list is one text too."""
    if hasattr(values, "tolist") and hasattr(values, "shape"):  # of torch, numpy and their like
        shape, batch = tuple(values.shape), True
        if len(shape) not in (1, 2):
            raise SpecBranchError(f"{name} has the shape {list(shape)}; expected [n] or [1, n]")
        try:
            values = values.tolist()
        except (RuntimeError, NotImplementedError) as error:  # of a tensor without data, on the meta device
            raise SpecBranchError(f"{name} cannot be read: {error}") from error
    if not isinstance(values, Iterable) or isinstance(values, NO_IDS):
        raise SpecBranchError(f"{name} is {shown(values)}; {EXPECTED}")
    row = list(values)
    if batch and row and isinstance(row[0], (list, tuple)):
        if len(row) != 1:
            raise SpecBranchError(f"{name} is a batch of {len(row)}; expected one text at a time")
        return list(row[0])
    return row


def _integer(value: Any, name: str) -> int:
    if not isinstance(value, bool) and not str(getattr(value, "dtype", "")).endswith("bool"):
        try:
            return operator.index(value)
        except (TypeError, ValueError, RuntimeError):
            pass
    kind = "a list" if isinstance(value, (list, tuple)) else shown(value)
    raise SpecBranchError(f"{name} is {kind}; expected an integer token id")
