"""Packed or not: whichever form of a model's weights a measurement on this machine shows to be faster."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import sqrt
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from specbranch.runtime.modes import inference, no_grad
from specbranch.runtime.packed import PackedLinear, Place, is_in_blocks, places_of
from specbranch.runtime.threads import set_threads
from specbranch_ext import PackedWeight, build_info, linear, pack_weight, packed_linear

SAMPLE = 512 << 20  # bytes of weights that are measured: more than caches hold
BLOCKS_SAMPLE = 192 << 20  # of bfloat16 values that are held beside their blocks
SAMPLE_ROWS = (1, 4)  # of a draft's step and of a verification
ROUNDS = 3
WORTH_IT = 0.97  # of the time over the weights as they were
LEAST = 64 << 20  # bytes: what is smaller may stay in the caches


@inference
def packed_sample(weights: Sequence[Tensor], threads: int | None) -> dict[int, PackedWeight]:
    """Some of the weights, packed losslessly, by their id; nothing if products over them are not faster so."""
    sample: list[Tensor] = []
    for weight in weights:
        if sum(each.nbytes for each in sample) < SAMPLE:
            sample.append(weight.detach())
    packed = [pack_weight(weight) for weight in sample]
    if _time_over_dense(sample, packed, threads) > WORTH_IT:
        return {}
    return {id(weight): each for weight, each in zip(weights, packed, strict=False)}


@no_grad
def expand_slow(model: nn.Module, threads: int | None) -> None:
    """Replace weights in blocks, for exact products, by their values in bfloat16 where these are faster.

    So only where the processor has no instructions for such products. A sample of each format's weights tells. What is
    only looked up stays as it is, and so do weights that fit in caches.
    """
    if build_info()["exact_blocks"]:
        return
    by_format: defaultdict[str, list[Place]] = defaultdict(list)
    for place in places_of(model):
        module = place.module
        if isinstance(module, PackedLinear) and is_in_blocks(module) and module.arithmetic == "exact":
            by_format[module.format].append(place)
    for places in by_format.values():
        if not _is_slow([place.module for place in places], threads):
            continue
        while places:  # one by one, so that never much of both is held
            _expand(places.pop())


def _is_slow(modules: Sequence[Any], threads: int | None) -> bool:
    """Whether products over a sample of packed layers' weights take longer than over their values."""
    dense: list[Tensor] = []
    for module in modules:
        if sum(each.nbytes for each in dense) < BLOCKS_SAMPLE:
            dense.append(module.values())
    if sum(each.nbytes for each in dense) < LEAST:
        return False
    packed = [module.packed_weight for module in modules[: len(dense)]]
    return _time_over_dense(dense, packed, threads) > 1


def _expand(place: Place) -> None:
    module: Any = place.module
    expanded = nn.Linear(module.shape[1], module.shape[0], bias=False, device="meta")
    expanded.weight, expanded.bias = nn.Parameter(module.values()), module.bias
    setattr(place.parent, place.name, expanded.train(module.training))


def _time_over_dense(dense: Sequence[Tensor], packed: Sequence[PackedWeight], threads: int | None) -> float:
    """The time of products over packed weights, of that over the same ones as they were."""
    before = torch.get_num_threads()
    try:
        set_threads(threads or before)
        ratios = [_ratio(dense, packed, rows) for rows in SAMPLE_ROWS]
    finally:
        set_threads(before)
    return sqrt(ratios[0] * ratios[1])


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
