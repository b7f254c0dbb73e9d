"""The door from transformers' `generate`, which hands over what it has prepared to a callable, `custom_generate`.

Everything that is handed over is honoured or refused by name.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import logits_process as processors
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specbranch.core.checks import shown
from specbranch.core.errors import SpecBranchError
from specbranch.core.sampling import Sampling
from specbranch.request import Drafting, Request
from specbranch.runtime.rules import Rules, Said, is_stateless
from specbranch.text.generation_config import LEAST_TOP_P, lacking
from specbranch.text.prompt_ids import prompt_ids
from specbranch.text.vocabulary import ids_of

MODES = ("greedy_search", "sample", "assisted_generation")
CACHES = ("past_key_values", "cache")  # transformers 5.24 renames it
# Of a model's forward: what says nothing that a text depends on, or is looked at here.
UNDERSTOOD = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "return_dict", *CACHES}
FUSED = (
    (processors.TemperatureLogitsWarper, "temperature"),
    (processors.TopKLogitsWarper, "top_k"),
    (processors.TopPLogitsWarper, "top_p"),
    (processors.MinPLogitsWarper, "min_p"),
)
OF_EACH_ROW = (  # which hold what belongs to one text of a batch
    processors.EncoderRepetitionPenaltyLogitsProcessor,
    processors.EncoderNoRepeatNGramLogitsProcessor,
)
OWN_CRITERIA = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria)


@dataclass(frozen=True, eq=False)
class HandedOver:
    """What `generate` has prepared. asked: the arguments of its caller that it does not hand over."""

    ids: Tensor
    processors: Sequence[Any]
    criteria: Sequence[Any]
    config: GenerationConfig
    model_arguments: Mapping[str, Any]
    asked: Mapping[str, Any] = field(default_factory=dict)

    @property
    def streamer(self) -> Any:
        return self.asked.get("streamer")

    @property
    def eos(self) -> frozenset[int]:
        return ids_of(self.config.eos_token_id, "eos_token_id")


def prepared(model: PreTrainedModel, ids: Tensor, settings: Mapping[str, Any]) -> HandedOver:
    """What `generate` prepares for a prompt [1, n] and some of its arguments."""

    def take(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Sequence[Any],
        stopping_criteria: Sequence[Any],
        generation_config: GenerationConfig,
        **rest: Any,
    ) -> HandedOver:
        return HandedOver(input_ids, logits_processor, stopping_criteria, generation_config, rest)

    generate: Callable[..., HandedOver] = model.generate  # type: ignore[assignment]
    return generate(ids, custom_generate=take, **settings)


def asked_of_generate() -> dict[str, Any]:
    """The arguments of the `generate` that is calling us. A streamer, for one, it uses and does not hand over."""
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is code:
            asked = dict(frame.f_locals)
            kwargs = asked.pop("kwargs", {})
            names = ("streamer", "assistant_model", "synced_gpus")
            return {**kwargs, **{name: asked.get(name) for name in names}}
        if frame.f_back is None:
            break
        frame = frame.f_back
    return {}


def requests(handed: HandedOver, seed: int | None, drafting: Drafting, vocabulary: int) -> list[Request]:
    """One for each text of the batch, with seeds from `seed` on, or from torch's generator. vocabulary: the target's.

    Raises SpecBranchError for what cannot be honoured.
    """
    check(handed)
    rows = len(handed.ids)
    keep_scores = bool(handed.config.return_dict_in_generate and handed.config.output_scores)
    keep_logits = bool(handed.config.return_dict_in_generate and handed.config.output_logits)
    if rows > 1 and (keep_scores or keep_logits):
        raise _refused("output_scores and output_logits", "for one text at a time", f"a batch of {rows}")
    made = []
    for row, text in enumerate(handed.ids.tolist()):
        start = padding_before(handed.model_arguments.get("attention_mask"), row, len(text))
        own = [_of_row(processor, row, rows) for processor in handed.processors]
        filters, rest, warpers = fused(own, bool(handed.config.do_sample))
        criteria = beside_ours(handed)
        if rows > 1:
            check_shared({"stopping_criteria": criteria})
        sampled = filters["temperature"] > 0
        chosen = (_drawn() if seed is None else seed + row) if sampled else 0
        made.append(
            Request(
                ids=prompt_ids(None, text[start:], vocabulary),
                new_tokens=int(handed.config.max_length) - len(text),
                sampling=Sampling(**filters, seed=chosen),
                eos=handed.eos,
                padding=text[:start],
                rules=Rules(rest, warpers, criteria, keep_logits, keep_scores),
                drafting=drafting,
            )
        )
    return made


def fused(own: Sequence[Any], sampled: bool) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """What temperature, top_k, top_p and min_p at the end of the processors ask for; the processors before them; and
    they themselves."""
    if not sampled:
        return {"temperature": 0.0}, list(own), []
    rest = list(own)
    if rest and type(rest[-1]) is processors.LogitNormalization:
        rest.pop()  # it moves all scores alike
    found: dict[str, Any] = {"temperature": 1.0}
    for kind, name in reversed(FUSED):
        last = rest[-1] if rest else None
        if type(last) is kind and _is_plain(last):
            found[name] = getattr(last, name)
            rest.pop()
    if "top_p" in found:
        found["top_p"] = max(found["top_p"], LEAST_TOP_P)
    return found, rest, list(own[len(rest) :])


def _is_plain(warper: Any) -> bool:
    """Whether it does what the op does."""
    masked = getattr(warper, "filter_value", -torch.inf) == -torch.inf
    return masked and (type(warper) is processors.TopKLogitsWarper or getattr(warper, "min_tokens_to_keep", 1) == 1)


def check(handed: HandedOver) -> None:
    """Raises SpecBranchError for what cannot be honoured."""
    config, given = handed.config, handed.asked
    mode = str(getattr(mode := config.get_generation_mode(), "value", mode))
    if mode not in MODES:
        raise _refused(f"{mode} ({', '.join(lacking(config)) or 'generation_config'})", "greedy decoding and sampling")
    for name, value in lacking(config).items():
        if name != "token_healing":  # which generate has done before it hands over
            raise _refused(f"{name} {shown(value)}", "one text, decoded greedily or sampled")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, None):
            raise _refused(name, "sequences, scores and logits")
    for name in ("assistant_model", "synced_gpus"):
        if given.get(name):
            raise _refused(name, "the draft that SpecBranch was made with")
    for name in CACHES:
        if given.get(name) is not None:
            raise _refused(name, "no cache: it keeps its own")
    if handed.ids.dim() != 2 or handed.ids.shape[1] == 0 or handed.model_arguments.get("inputs_embeds") is not None:
        raise _refused("inputs_embeds", "input_ids")
    for name, value in handed.model_arguments.items():
        silent = value is None or (name.endswith("token_type_ids") and not bool(value.any()))
        if name not in UNDERSTOOD and not silent:
            raise _refused(f"{name} {shown(value)}", "input_ids and attention_mask")
    positions, mask = given.get("position_ids"), handed.model_arguments.get("attention_mask")
    if positions is not None:
        seen = torch.ones_like(handed.ids) if mask is None else mask
        expected = (seen.cumsum(-1) - 1).clamp(min=0)
        if positions.shape != expected.shape or not bool(((positions == expected) | (seen == 0)).all()):
            raise _refused(f"position_ids {shown(positions.tolist())}", "those that count the attention_mask")


def padding_before(mask: Tensor | None, row: int, length: int) -> int:
    """How many ids of a row are padding. Raises SpecBranchError for a mask of another kind."""
    if mask is None:
        return 0
    seen = mask[row].int().tolist()
    start = seen.index(1) if 1 in seen else len(seen)
    if len(seen) != length or seen != [0] * start + [1] * (length - start) or start == length:
        raise _refused(f"attention_mask {shown(seen)}", "ones, with zeros (padding) on the left only")
    return start


def _of_row(processor: Any, row: int, rows: int) -> Any:
    """A processor for one text of a batch alone."""
    if rows == 1:
        return processor
    if type(processor) in OF_EACH_ROW or not is_stateless(processor):
        name = type(processor).__name__
        raise _refused(f"logits_processor: {name}", "for one text at a time", f"a batch of {rows}")
    lengths = getattr(processor, "prompt_ignore_length", None)
    if isinstance(lengths, Tensor):
        processor = copy.copy(processor)
        processor.prompt_ignore_length = lengths[row : row + 1]
    return processor


def check_shared(given: Mapping[str, Sequence[Any]]) -> None:
    """Raises SpecBranchError for rules that may have a state, and so cannot be of several texts."""
    for processor in given.get("logits_processor", ()):
        if not is_stateless(processor):
            raise _refused(f"logits_processor: {type(processor).__name__}", "for one text at a time", "several")
    for criterion in given.get("stopping_criteria", ()):
        if type(criterion) not in OWN_CRITERIA:
            raise _refused(f"stopping_criteria: {type(criterion).__name__}", "for one text at a time", "several")


def beside_ours(handed: HandedOver) -> list[Any]:
    """The stopping criteria but those by which decoding ends anyway."""

    def is_ours(criterion: Any) -> bool:
        if type(criterion) is MaxLengthCriteria:
            return bool(criterion.max_length == handed.config.max_length)
        if type(criterion) is EosTokenCriteria:
            return {int(token) for token in criterion.eos_token_id} == handed.eos
        return False

    return [criterion for criterion in handed.criteria if not is_ours(criterion)]


def _drawn() -> int:
    """A seed, so that `set_seed` decides."""
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64))


def _refused(what: str, expected: str, came: str = "") -> SpecBranchError:
    behind = f", found {came}" if came else ""
    return SpecBranchError(f"generate asks for {what}, which specbranch does not do: expected {expected}{behind}")


def answer(handed: HandedOver, texts: Sequence[Sequence[int]], said: Said) -> Tensor | GenerateDecoderOnlyOutput:
    """As `generate` returns it: prompts and new tokens, padded at the end. said: of the last text, with the scores and
    logits that are wanted."""
    width = max(map(len, texts))
    filler = handed.config.pad_token_id
    if filler is None:
        filler = min(handed.eos, default=0)
    new = torch.tensor([[*text, *[filler] * (width - len(text))] for text in texts], dtype=handed.ids.dtype)
    sequences = torch.cat([handed.ids, new.to(handed.ids.device)], dim=1)
    if not handed.config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences,  # type: ignore[arg-type]
        scores=tuple(said.scores) if handed.config.output_scores else None,  # type: ignore[arg-type]
        logits=tuple(said.logits) if handed.config.output_logits else None,  # type: ignore[arg-type]
    )


def as_settings(sampling: Sampling, new_tokens: int, eos: frozenset[int]) -> dict[str, Any]:
    """What is settled already, as arguments of `generate`, for `prepared`."""
    settings: dict[str, Any] = {
        "do_sample": sampling.temperature > 0,
        "max_new_tokens": new_tokens,
        "eos_token_id": sorted(eos) or None,
        "stop_strings": None,
        "num_beams": 1,
        "num_return_sequences": 1,
    }
    if sampling.temperature > 0:
        settings |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        settings["min_p"] = sampling.min_p or None
    return settings


def lists(logits_processor: Any, stopping_criteria: Any) -> dict[str, Any]:
    """As `generate` takes them, where one alone may have been given."""
    given: dict[str, Any] = {}
    for name, kind, value in (
        ("logits_processor", LogitsProcessorList, logits_processor),
        ("stopping_criteria", StoppingCriteriaList, stopping_criteria),
    ):
        each: Any = () if value is None else value if isinstance(value, (list, tuple)) else [value]
        for place, one in enumerate(each):
            if not callable(one):
                raise SpecBranchError(f"{name}[{place}] is {shown(one)}; expected a callable of ids and scores")
        given[name] = kind(each)
    return given
