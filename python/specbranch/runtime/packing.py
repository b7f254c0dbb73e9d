"""A model's weights in fewer bytes: its linear layers over packed weights.

A step of a few rows is as fast as its weights come from memory. A model that was loaded for us may keep them packed:
its modules are replaced once, at load. What they compute does not change by a bit ("lossless"), or the weights are
rounded first ("int8", "int4"), which a draft may be without changing a text. A model that somebody hands over stays as
it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor, nn
from transformers import PreTrainedModel

from specbranch.core.checks import choice
from specbranch.core.errors import SpecBranchError
from specbranch.runtime.choices import ARITHMETIC_OF, ARITHMETICS, WEIGHTS
from specbranch.runtime.fused.join import groups, join_model
from specbranch.runtime.masks import probe
from specbranch.runtime.packed import PackedLinear, Place, holders_of, is_in_blocks, places_of, put, weight_format
from specbranch.runtime.quicker import LEAST, expand_slow, packed_sample
from specbranch.runtime.rows.functions import is_plain
from specbranch.runtime.support import meta_twin
from specbranch_ext import PackedWeight, build_info, pack_blocks, pack_weight, quantize_weight

BFLOAT16_LEVELS = ("bf16", "amx")
FORMAT_OF = {"int8": "q8_0", "int4": "q4_0"}
AUTO_DRAFT = "int4"
BLOCK = 32  # weights
JOINT = 16  # outputs: layers of multiples of them can be packed behind each other, whatever the format
ROWS_AT_ONCE = 4096  # whole groups of outputs in any layout


def pack_loaded(
    source: object,
    model: PreTrainedModel,
    role: str,
    wanted: object,
    arithmetic: str | None = None,
    threads: int | None = None,
) -> None:
    """Pack the weights of what was loaded from `source`; see pack_model. A source that is a model keeps its own. A
    file's that are in blocks stay there, but a draft's may be rounded on, to fewer bits ("auto": as of a checkpoint),
    and with "auto" what is faster here as bfloat16 values becomes such.

    Raises SpecBranchError as pack_model does, where weights are kept that shall be packed, and for the fast arithmetic
    where no weights are in blocks.
    """
    word = choice(f"{role}_weights", wanted, WEIGHTS)
    if arithmetic is not None:
        arithmetic = choice(f"{role}_arithmetic", arithmetic, ARITHMETICS)
    given, format = isinstance(source, nn.Module), weight_format(model)
    meant = _automatic(role, arithmetic) if word == "auto" else word
    if given:
        if word not in ("auto", "keep"):
            raise SpecBranchError(f"{role}_weights is {word!r}, but {role} is a loaded model, which stays as it is")
    elif not format:
        pack_model(model, role, word, arithmetic, threads)
    elif role == "draft" and meant in FORMAT_OF:
        if not _round_blocks(model, meant, arithmetic or ARITHMETIC_OF[role], word == "auto") and word != "auto":
            raise SpecBranchError(f"{role}_weights is {word!r}, but weights of {source} have no more bits ({format})")
    elif word == "auto":
        expand_slow(model, threads)
    elif word != "keep":
        raise SpecBranchError(f"{role}_weights is {word!r}, but weights of {source} stay in its blocks ({format})")
    if not given:
        join_model(model)
    if arithmetic == "fast" and not any(is_in_blocks(module) for module in model.modules()):
        reason = f"the weights of {f'the loaded {role}' if given else source}"
        raise SpecBranchError(
            f"{role}_arithmetic is 'fast', but {reason} are not in blocks (int8, int4, of a GGUF file)"
        )


def _automatic(role: str, arithmetic: str | None) -> str:
    """The word that "auto" stands for: of a draft, whose weights change no text, AUTO_DRAFT where the processor has
    instructions for it, of a target "lossless" where it has those for bfloat16; else "keep"."""
    isa = build_info()["isa"]
    if role == "draft" and arithmetic != "exact":
        return "keep" if isa == "baseline" else AUTO_DRAFT
    return "lossless" if isa in BFLOAT16_LEVELS else "keep"


def _round_blocks(model: nn.Module, word: str, arithmetic: str, automatic: bool) -> bool:
    """Round weights in blocks of more bits; returns whether there are any. automatic: only a model's that is too large
    for caches."""
    places = [
        place for place in places_of(model) if isinstance(place.module, PackedLinear) and is_in_blocks(place.module)
    ]
    if automatic and sum(2 * out * size for out, size in (place.module.shape for place in places)) < LEAST:
        return False
    larger = [place for place in places if _bits(place.module.format) > _bits(FORMAT_OF[word])]
    del places
    found = bool(larger)
    while larger:  # one by one, so that never much of both is held
        place = larger.pop()
        put([place], _rounded(place.module, word, arithmetic))
    return found


def _rounded(module: PackedLinear, word: str, arithmetic: str) -> PackedWeight:
    """Its weight in blocks of fewer bits: some rows at a time, whose bytes lie one behind the other."""
    pieces = [
        _pack(module.values(begin, begin + ROWS_AT_ONCE), word, arithmetic).data
        for begin in range(0, module.shape[0], ROWS_AT_ONCE)
    ]
    return PackedWeight(torch.cat(pieces), module.shape, FORMAT_OF[word], arithmetic)


def _bits(format: str) -> float:
    """Of a weight in blocks."""
    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[format.upper()]]
    return 8 * size / weights


def pack_model(
    model: PreTrainedModel, role: str, wanted: object, arithmetic: str | None = None, threads: int | None = None
) -> str:
    """Pack the weights of a model that nobody else holds; returns their format, "" if they stay as they are.

    wanted: "keep"; "lossless"; "int8" and "int4", which round to blocks of 8 and 4 bits; "auto": see _automatic; a
    small draft stays as it is, and a target is packed where a measurement shows that it pays. arithmetic: of products
    over blocks, None for the role's usual one. threads: that the model will run with.

    Raises SpecBranchError for another word, and when the model has no weights for what is asked for.
    """
    option = f"{role}_weights"
    wanted = choice(option, wanted, WEIGHTS)
    automatic = wanted == "auto"
    if automatic:
        wanted = _automatic(role, arithmetic)
    if wanted == "keep":
        return ""
    places, reason = _packable(model, wanted)
    if reason:
        if automatic:
            return ""
        raise SpecBranchError(f"{option} is {wanted!r}, but {reason}")
    sample: dict[int, PackedWeight] = {}
    if automatic:
        if sum(weight.nbytes for weight, _ in places) < LEAST:
            return ""
        if wanted == "lossless":
            sample = packed_sample([weight for weight, _ in places], threads)
            if not sample:
                return ""
    _replace(model, places, sample, wanted, arithmetic or ARITHMETIC_OF[role])
    return weight_format(model)


def _pack(weight: Tensor, word: str, arithmetic: str) -> PackedWeight:
    if word == "lossless":
        return pack_weight(weight)
    format = FORMAT_OF[word]
    packed: PackedWeight = pack_blocks(quantize_weight(weight, format), format, arithmetic)
    return packed


def _packable(model: PreTrainedModel, word: str) -> tuple[list[tuple[Tensor, list[Place]]], str]:
    """Each weight that can be packed, with the modules that hold it, and why none can ("": some can)."""
    if model.device.type != "cpu":
        return [], f"packed weights run on the CPU, not on {model.device}"
    if model.dtype != torch.bfloat16:
        return [], f"expected weights of bfloat16, found {str(model.dtype).removeprefix('torch.')}"
    places = [(weight, where) for weight, where in holders_of(model) if _fits(weight, where, word)]
    if not places:
        return [], f"{type(model).__name__} has no linear layer with a weight of its own that can be packed"
    if problem := _dry_run(model, {id(weight) for weight, _ in places}):
        return [], f"{type(model).__name__} does not run with packed weights: {problem}"
    return places, ""


def _fits(weight: Tensor, places: Sequence[Place], word: str) -> bool:
    """Whether a linear layer multiplies by it, and nothing but linear layers and embeddings holds it."""
    kinds = [type(place.module) for place in places]
    return (
        is_plain(weight)
        and weight.dtype == torch.bfloat16
        and weight.dim() == 2
        and weight.stride(1) == 1
        and (word == "lossless" or weight.shape[1] % BLOCK == 0)
        and nn.Linear in kinds
        and all(_is_simple(place) and place.module.weight is weight for place in places)
    )


def _is_simple(place: Place) -> bool:
    module = place.module
    if not place.name or "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return False
    return type(module) is nn.Linear or (type(module) is nn.Embedding and module.max_norm is None)


def _dry_run(model: PreTrainedModel, packed: set[int]) -> str:
    """What a model without values raises once its weights are packed, in one line; "" for nothing."""
    names = {name for name, weight in model.named_parameters(remove_duplicate=False) if id(weight) in packed}
    twin = meta_twin(model, torch.bfloat16)
    twin.tie_weights()
    try:
        probe(twin)
    except Exception:
        return ""  # it asks for values, packed or not
    by_name = dict(twin.named_parameters(remove_duplicate=False))
    fitting = {id(by_name[name]) for name in names if name in by_name}
    for weight, places in holders_of(twin):
        if id(weight) in fitting:
            data = torch.empty(0, dtype=torch.uint8, device="meta")
            put(places, PackedWeight(data, (weight.shape[0], weight.shape[1]), "lossless"))
    try:
        probe(twin)
    except Exception as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ""


def _replace(
    model: nn.Module,
    places: Sequence[tuple[Tensor, list[Place]]],
    packed: dict[int, PackedWeight],
    word: str,
    arithmetic: str,
) -> None:
    """Put packed weights in place of the others, few at a time, so that never much of both is held. packed: some of
    them.

    An embedding that shares a weight keeps it as it was before rounding: its rows are only looked up.
    """
    for group in _joint(model, places):
        weights = [weight for weight, _ in group]
        for (weight, holders), new in zip(group, _packed(weights, packed, word, arithmetic), strict=True):
            where = [place for place in holders if word == "lossless" or isinstance(place.module, nn.Linear)]
            put(where, new)
            for place in where:
                place.module._parameters.clear()
            packed.pop(id(weight), None)


def _joint(
    model: nn.Module, places: Sequence[tuple[Tensor, list[Place]]]
) -> Iterator[Sequence[tuple[Tensor, list[Place]]]]:
    """The places in groups, those of layers that are to be joined together."""
    of_module = {id(holders[0].module): i for i, (_, holders) in enumerate(places) if len(holders) == 1}
    left = dict.fromkeys(range(len(places)))
    for layers in groups(model):
        found = [of_module.get(id(layer), -1) for layer in layers]
        if min(found) >= 0:
            yield [places[i] for i in found]
            for i in found:
                del left[i]
    for i in left:
        yield [places[i]]


def _packed(
    weights: Sequence[Tensor], packed: dict[int, PackedWeight], word: str, arithmetic: str
) -> Sequence[PackedWeight]:
    """Packed in one memory where that can be. packed: some of them, that a single one may be."""
    if len(weights) == 1:
        return [packed.get(id(weights[0])) or _pack(weights[0].detach(), word, arithmetic)]
    sizes = [len(weight) for weight in weights]
    if len({weight.shape[1] for weight in weights}) > 1 or any(size % JOINT for size in sizes):
        return [_packed([weight], packed, word, arithmetic)[0] for weight in weights]
    return _pack(torch.cat([weight.detach() for weight in weights]), word, arithmetic).split(sizes)
