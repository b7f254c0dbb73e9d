"""`specbranch.generate`: transformers' `generate` with a draft, by one call."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StopStringCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specbranch.door import lists
from specbranch.engine import SpecBranch
from specbranch.text.stopping import stop_strings as checked


class _Kept:
    """The newest engine of a target, kept by the target itself: it goes when the target goes, and no copy has it."""

    def __init__(self) -> None:
        self.engine: SpecBranch | None = None

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


KEPT = "_specbranch"


def generate(
    target: PreTrainedModel,
    draft: PreTrainedModel | None = None,
    inputs: Tensor | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_strings: str | list[str] | None = None,
    stopping_criteria: Any = None,
    logits_processor: Any = None,
    **arguments: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """What `target.generate(inputs, **arguments)` returns, with a draft that makes it faster.

    The same as `target.generate(…, custom_generate=SpecBranch(target, draft))`, whose engine is kept for the next call
    with this pair; and, with a tokenizer, with stop strings and a constraint. arguments: of `generate`, and seed,
    constraint, method, overlap, draft_context and retrieval of `SpecBranch.__call__`. Without a draft it is
    autoregressive; with retrieval=True what followed the same tokens before is drafted, and under a constraint what
    must follow.

    Raises SpecBranchError for what cannot be honoured.
    """
    if draft is None and (arguments.get("retrieval") is True or arguments.get("constraint") is not None):
        arguments.setdefault("method", "specbranch")
    strings, name = stop_strings, "stop_strings"
    for config in (arguments.get("generation_config"), target.generation_config):
        strings = getattr(config, name, None) if strings is None else strings
    given = lists(logits_processor, stopping_criteria)
    if ends := checked(strings, tokenizer):
        given["stopping_criteria"].append(StopStringCriteria(tokenizer, list(ends)))  # type: ignore[arg-type]
        given["stop_strings"] = None  # or generate would look for the tokenizer, which a callable does not get
    engine = _engine(target, draft)
    if tokenizer is not None:
        engine.tokenizer = tokenizer
    call: Any = target.generate
    answer: Tensor | GenerateDecoderOnlyOutput = call(inputs, custom_generate=engine, **given, **arguments)
    return answer


def _engine(target: PreTrainedModel, draft: PreTrainedModel | None) -> SpecBranch:
    kept: _Kept = vars(target).setdefault(KEPT, _Kept())
    if kept.engine is None or kept.engine.draft is not draft:
        kept.engine = SpecBranch(target, draft, method="autoregressive" if draft is None else "specbranch")
    return kept.engine
