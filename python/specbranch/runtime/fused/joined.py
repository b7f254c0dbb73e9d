"""Weights of several layers over the same input that lie behind each other, so that one product reads them all.

A layer keeps its own weight, a part of the common memory. So nothing is held twice, and whoever looks at a model,
changes weights in place or saves them finds what was there before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specbranch.runtime.modes import no_grad
from specbranch.runtime.packed import PackedLinear
from specbranch.runtime.rows.functions import is_plain
from specbranch_ext import PackedWeight, pack_weight
from specbranch_ext.packed import group, rows_bytes


def joined(modules: Sequence[Any]) -> Tensor | None:
    """The weight of all layers together; None where theirs do not lie behind each other.

    All are nn.Linear over plain weights or all PackedLinear.
    """
    first = modules[0]
    parts: list[Tensor] = [_weight(module) for module in modules]
    same_memory = {(part.untyped_storage().data_ptr(), part.dtype) for part in parts}
    if len(same_memory) > 1 or not all(part.is_contiguous() for part in parts):
        return None
    if len({(getattr(module, "format", ""), getattr(module, "arithmetic", "")) for module in modules}) > 1:
        return None
    if len({_shape(module)[1] for module in modules}) > 1 or not _fit([_shape(module)[0] for module in modules], first):
        return None
    place = parts[0].storage_offset()
    for module, part in zip(modules, parts, strict=True):
        if part.storage_offset() != place:
            return None
        place += _length(module)
    if isinstance(first, PackedLinear):
        behind = parts[0].storage_offset() + len(parts[0]) if first.format == "lossless" else place
        return parts[0].as_strided((behind - parts[0].storage_offset(),), (1,))
    return parts[0].as_strided((sum(len(part) for part in parts), parts[0].shape[1]), (parts[0].shape[1], 1))


@no_grad
def join(modules: Sequence[Any]) -> None:
    """Lay the weights of layers behind each other in new memory, where they are of one kind; else they stay."""
    first = modules[0]
    kind = type(first)
    if kind not in (nn.Linear, PackedLinear) or not all(type(module) is kind for module in modules):
        return
    if kind is PackedLinear:
        _join_packed(modules)
        return
    weights = [module.weight for module in modules]
    alike = {(type(weight), weight.dtype, weight.device, weight.shape[1:]) for weight in weights}
    if len(alike) > 1 or not is_plain(weights[0]) or joined(modules) is not None:
        return
    whole = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
        weight.data = part


def _join_packed(modules: Sequence[PackedLinear]) -> None:
    first, sizes = modules[0], [module.shape[0] for module in modules]
    kinds = {(module.format, module.arithmetic, module.shape[1]) for module in modules}
    if len(kinds) > 1 or not _fit(sizes, first) or joined(modules) is not None:
        return
    if first.format == "lossless":  # their raw runs lie behind all of them
        whole = pack_weight(torch.cat([module.values() for module in modules]))
    else:
        data = torch.cat([module.packed for module in modules])
        whole = PackedWeight(data, (sum(sizes), first.shape[1]), first.format, first.arithmetic)
    for module, part in zip(modules, whole.split(sizes), strict=True):
        module.packed = part.data


def _fit(sizes: Sequence[int], module: Any) -> bool:
    """Whether weights of so many outputs can lie behind each other."""
    return not isinstance(module, PackedLinear) or not any(size % group(module.format) for size in sizes[:-1])


def _weight(module: Any) -> Tensor:
    weight: Tensor = module.packed if isinstance(module, PackedLinear) else module.weight.detach()
    return weight


def _shape(module: Any) -> tuple[int, int]:
    shape: tuple[int, int] = module.shape if isinstance(module, PackedLinear) else module.weight.shape
    return shape


def _length(module: Any) -> int:
    """Entries of its weight's memory up to the next layer's."""
    if isinstance(module, PackedLinear):
        return rows_bytes(*module.shape, module.format, module.arithmetic)
    return int(module.weight.numel())
