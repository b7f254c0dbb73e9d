"""A model's weights in fewer bytes: its linear layers over packed weights (specbranch_ext.PackedWeight).

A step of a few rows is as fast as its weights come from memory. A model that was loaded for us may keep them packed:
its modules are replaced once, at load. What they compute does not change by a bit ("lossless"), or the weights are
rounded first ("int8", "int4"), which a draft may be without changing a text. A model that somebody hands over stays as
it is.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specbranch.core.checks import choice
from specbranch.core.errors import SpecBranchError
from specbranch.runtime.choices import ARITHMETIC_OF, ARITHMETICS, WEIGHTS
from specbranch.runtime.masks import probe
from specbranch.runtime.rows.functions import is_plain
from specbranch.runtime.support import meta_twin
from specbranch_ext import PackedWeight, build_info, linear, pack_blocks, pack_weight, packed_linear, quantize_weight
from specbranch_ext.packed import BLOCKS

SAMPLE = 512 << 20  # bytes of weights that are measured: more than caches hold
SAMPLE_ROWS = (1, 4)  # of a draft's step and of a verification
ROUNDS = 3
WORTH_IT = 0.97  # of the time over the weights as they were
LEAST = 64 << 20  # bytes: what is smaller may stay in the caches
BFLOAT16_LEVELS = ("bf16", "amx")
FORMAT_OF = {"int8": "q8_0", "int4": "q4_0"}
AUTO_DRAFT = "int4"
BLOCK = 32  # weights

_multiply = torch.ops.specbranch.packed_linear.default
_rows = torch.ops.specbranch.unpack_rows.default


class _Packed(nn.Module):
    """A module whose weight [out, in] is packed. bias: [out] or None."""

    packed: Tensor

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.register_buffer("packed", weight.data)
        self.format, self.arithmetic, self.shape = weight.format, weight.arithmetic, weight.shape
        self.bias = bias

    def extra_repr(self) -> str:
        return (
            f"shape={self.shape}, format={self.format!r}, arithmetic={self.arithmetic!r}, bias={self.bias is not None}"
        )


class PackedLinear(_Packed):
    """nn.Linear over a packed weight."""

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = _multiply(input, self.packed, self.format, self.arithmetic, self.shape[0], self.bias)
        return output


class PackedEmbedding(_Packed):
    """nn.Embedding over a packed weight: its own, or that of the output layer."""

    def forward(self, input: Tensor) -> Tensor:
        rows: Tensor = _rows(self.packed, self.format, self.arithmetic, *self.shape, input.flatten())
        return rows.view(*input.shape, self.shape[1])


@dataclass(frozen=True, slots=True)
class Place:
    """A module that holds a weight: where in the model, and of which name there."""

    parent: nn.Module
    name: str
    module: nn.Module


def weight_format(model: nn.Module) -> str:
    """The format of a model's packed weights, "" for a model without; several as in q4_k+q6_k."""
    return "+".join(sorted({module.format for module in model.modules() if isinstance(module, _Packed)}))


def pack_loaded(
    source: object,
    model: PreTrainedModel,
    role: str,
    wanted: object,
    arithmetic: str | None = None,
    threads: int | None = None,
) -> None:
    """Pack the weights of what was loaded from `source`; see pack_model. A source that is a model keeps its own, and so
    does a file whose weights are packed.

    Raises SpecBranchError as pack_model does, where weights are kept that shall be packed, and for the fast arithmetic
    where no weights are in blocks.
    """
    if arithmetic is not None:
        arithmetic = choice(f"{role}_arithmetic", arithmetic, ARITHMETICS)
    kept = f"{role} is a loaded model, which stays as it is" if isinstance(source, nn.Module) else ""
    if not kept and (format := weight_format(model)):
        kept = f"weights of {source} stay in its blocks ({format})"
    if not kept:
        pack_model(model, role, wanted, arithmetic, threads)
    elif (word := choice(f"{role}_weights", wanted, WEIGHTS)) not in ("auto", "keep"):
        raise SpecBranchError(f"{role}_weights is {word!r}, but {kept}")
    if arithmetic == "fast" and not any(is_in_blocks(module) for module in model.modules()):
        reason = f"the weights of {f'the loaded {role}' if isinstance(source, nn.Module) else source}"
        raise SpecBranchError(
            f"{role}_arithmetic is 'fast', but {reason} are not in blocks (int8, int4, of a GGUF file)"
        )


def is_quick(weight: PackedWeight) -> bool:
    """Whether products over it are no slower here than over its values in bfloat16."""
    if weight.format == "lossless" or weight.arithmetic == "fast":
        return True
    return bool(build_info()["exact_blocks"])


def is_in_blocks(module: nn.Module) -> bool:
    """Whether it holds a weight that is packed in blocks."""
    return isinstance(module, _Packed) and module.format in BLOCKS


def pack_model(
    model: PreTrainedModel, role: str, wanted: object, arithmetic: str | None = None, threads: int | None = None
) -> str:
    """Pack the weights of a model that nobody else holds; returns their format, "" if they stay as they are.

    wanted: "keep"; "lossless"; "int8" and "int4", which round to blocks of 8 and 4 bits; "auto": of a draft, whose
    weights change no text, AUTO_DRAFT where the processor has instructions for it, of a target lossless where it has
    those for bfloat16 and a measurement shows that it pays. arithmetic: of products over blocks, None for the role's
    usual one. threads: that the model will run with.

    Raises SpecBranchError for another word, and when the model has no weights for what is asked for.
    """
    option = f"{role}_weights"
    wanted = choice(option, wanted, WEIGHTS)
    automatic = wanted == "auto"
    if automatic:
        wanted = AUTO_DRAFT if role == "draft" and arithmetic != "exact" else "lossless"
        isa = build_info()["isa"]
        if isa not in BFLOAT16_LEVELS and (wanted == "lossless" or isa == "baseline"):
            return ""
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
            sample = _measured(places, threads)
            if not sample:
                return ""
    _replace(places, sample, wanted, arithmetic or ARITHMETIC_OF[role])
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


def holders_of(model: nn.Module) -> list[tuple[Tensor, list[Place]]]:
    """Every parameter with all modules that hold it, in the order of the model."""
    found: defaultdict[int, list[Place]] = defaultdict(list)
    weights: dict[int, Tensor] = {}
    parents = {id(child): (module, name) for module in model.modules() for name, child in module.named_children()}
    for module in model.modules():
        parent, name = parents.get(id(module), (module, ""))
        for weight in module.parameters(recurse=False):
            weights[id(weight)] = weight
            found[id(weight)].append(Place(parent, name, module))
    return [(weights[key], places) for key, places in found.items()]


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


def put(places: Sequence[Place], packed: PackedWeight) -> None:
    """Replace the modules that hold a weight by such that hold it packed, with the biases that they have by now."""
    for place in places:
        kind = PackedLinear if isinstance(place.module, nn.Linear) else PackedEmbedding
        module = kind(packed, getattr(place.module, "bias", None))
        module.train(place.module.training)
        setattr(place.parent, place.name, module)


def _replace(
    places: Sequence[tuple[Tensor, list[Place]]], packed: dict[int, PackedWeight], word: str, arithmetic: str
) -> None:
    """Put packed weights in place of the others, one by one, so that never much of both is held.

    An embedding that shares a weight keeps it as it was before rounding: its rows are only looked up.
    """
    for weight, holders in places:
        where = [place for place in holders if word == "lossless" or isinstance(place.module, nn.Linear)]
        put(where, packed.get(id(weight)) or _pack(weight.detach(), word, arithmetic))
        for place in where:
            place.module._parameters.clear()


@torch.inference_mode()
def _measured(places: Sequence[tuple[Tensor, list[Place]]], threads: int | None) -> dict[int, PackedWeight]:
    """A sample of the weights, packed, if products over them are faster so; else nothing."""
    sample: list[Tensor] = []
    for weight, _ in places:
        if sum(each.nbytes for each in sample) < SAMPLE:
            sample.append(weight.detach())
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        packed = [pack_weight(weight) for weight in sample]
        ratios = [_ratio(sample, packed, rows) for rows in SAMPLE_ROWS]
    finally:
        torch.set_num_threads(before)
    if sqrt(ratios[0] * ratios[1]) > WORTH_IT:
        return {}
    return {id(weight): each for (weight, _), each in zip(places, packed, strict=False)}


def _ratio(weights: Sequence[Tensor], packed: Sequence[PackedWeight], rows: int) -> float:
    """The time of products over packed weights, of that over the weights as they are."""
    inputs = {weight.shape[1]: torch.ones(rows, weight.shape[1], dtype=torch.bfloat16) for weight in weights}

    def seconds(pairs: Iterator[tuple[Any, Any, Tensor]]) -> float:
        begin = time.perf_counter()
        for multiply, weight, input in pairs:
            multiply(input, weight)
        return time.perf_counter() - begin

    ratios = []
    for _ in range(ROUNDS):
        dense = seconds((linear, weight, inputs[weight.shape[1]]) for weight in weights)
        ratios.append(seconds((packed_linear, each, inputs[each.shape[1]]) for each in packed) / dense)
    return median(ratios)
