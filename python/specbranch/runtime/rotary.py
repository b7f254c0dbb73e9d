"""Rotary embeddings, and those that choose their frequencies by how long the text is (dynamic NTK, longrope).

transformers chooses by the farthest position of a forward, and a forward of its one-by-one decoding ends at the newest
token. Ours hold a part of a prompt or drafted tokens of several lengths of text. So every row gets the angles that it
has where the text ends at that row, or with the prompt for the rows of a prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel

from specbranch.runtime.attention import current
from specbranch.runtime.cache_argument import cache_argument
from specbranch.runtime.threads import set_threads

PREPARE = "prepare_inputs_for_generation"


def chooses_by_length(module: nn.Module) -> bool:
    """Whether a module is a rotary embedding whose angles depend on the farthest position of a forward."""
    return any(_by_length(module, layer_type) for layer_type in _kinds(module))


def kinds_by_length(model: nn.Module) -> list[str]:
    """The kinds (`rope_type`) of such embeddings in a model."""
    kinds = set[str]()
    for module in model.modules():
        kinds |= {kind for layer_type, kind in _kinds(module).items() if _by_length(module, layer_type)}
    return sorted(kinds)


def context_length(config: PreTrainedConfig) -> int | None:
    """The longest text that a model is made for; None where its configuration does not say.

    max_position_embeddings, but dynamic NTK scaling only begins there.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return int(limit * max(one.get("factor", 1.0) if "dynamic" in one.get("rope_type", "") else 1.0 for one in each))


def steady_forward(module: nn.Module, device: torch.device) -> Callable[..., Any] | None:
    """What to run instead of such an embedding's forward, so that it changes nothing there."""
    return partial(row_by_row, module) if chooses_by_length(module) else None


def rereads(model: PreTrainedModel) -> tuple[int, ...]:
    """The lengths of the text at which transformers' generate drops the cache and reads all of it anew: where longrope
    changes its frequencies, on some models. The model itself is asked, at the numbers of its configuration."""
    if getattr(type(model), PREPARE) is getattr(GenerationMixin, PREPARE):
        return ()
    config = model.config.get_text_config()
    numbers = {value for value in _numbers(config.to_dict()) if 1 < value <= (context_length(config) or value)}
    return tuple(length for length in sorted({n + more for n in numbers for more in (0, 1)}) if _drops(model, length))


def _drops(model: PreTrainedModel, length: int) -> bool:
    """Whether a cache of all but the last of `length` tokens is dropped."""
    ids = torch.zeros(1, length, dtype=torch.int64)
    prepare: Callable[..., dict[str, Any]] = getattr(model, PREPARE)
    name = cache_argument(type(model), PREPARE)
    filled = {name: _Filled(length - 1)}
    inputs = prepare(ids, attention_mask=torch.ones_like(ids), next_sequence_length=1, **filled)
    return inputs.get(name) is None


class _Filled(DynamicCache):
    """A cache that says how long it is, and holds nothing."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length

    def __len__(self) -> int:
        return 1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length


def _numbers(values: Any) -> Iterable[int]:
    """All integers in a configuration, however deep."""
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, dict | list | tuple):
            yield from _numbers(value)
        elif type(value) is int:
            yield value


# ---- Forwards


def on_one_thread(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """torch's sine and cosine, MKL's, wake all threads for as few as 128 numbers."""
    threads = torch.get_num_threads()
    try:
        set_threads(1)
        return type(module).forward(module, *args, **kwargs)
    finally:
        set_threads(threads)


def row_by_row(module: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Any:
    """The module's forward, each row with the angles of the text that ends there or with the prompt.

    The module itself stays as it is: what it would keep from call to call is kept by a copy, and dropped.
    """
    kwargs = {} if layer_type is None else {"layer_type": layer_type}
    if not _by_length(module, layer_type):
        return on_one_thread(module, x, position_ids, **kwargs)
    context = current()
    end = int(position_ids.max()) if context is None else context.prompt_end
    ends = position_ids.clamp(min=end).clamp(*_turns(module, layer_type)).flatten(0, -2)[0]
    result: Any = None
    for end in ends.unique().tolist():
        columns = (ends == end).nonzero()[:, 0]
        places = position_ids[..., columns]
        places = torch.cat(
            [places, torch.full_like(places[..., :1], end)], -1
        )  # the farthest, of which we drop the angle
        angles = on_one_thread(_fresh(module), x, places, **kwargs)
        result = _put(angles, columns, len(ends), result)
    return result


def _put(angles: Any, columns: Tensor, count: int, others: Any) -> Any:
    """Angles [..., rows + 1, D], one tensor or several, at their columns of [..., count, D], among the others."""
    if isinstance(angles, tuple):
        rest = [None] * len(angles) if others is None else others
        return tuple(_put(mine, columns, count, other) for mine, other in zip(angles, rest, strict=True))
    mine = angles[..., :-1, :]
    if len(columns) == count:
        return mine
    whole = mine.new_empty(*mine.shape[:-2], count, mine.shape[-1]) if others is None else others
    return whole.index_copy_(-2, columns, mine)


def _turns(module: nn.Module, layer_type: str | None) -> tuple[int, int | None]:
    """The positions below and above which it makes no difference where the text ends."""
    pretrained: int | None = _parameters(module, layer_type).get("original_max_position_embeddings")
    if pretrained is not None and "dynamic" not in _kinds(module)[layer_type]:
        return pretrained - 1, pretrained
    begin: int = vars(module)["original_max_seq_len"]
    return min(begin, pretrained or begin) - 1, None


def _fresh(module: nn.Module) -> nn.Module:
    """A copy of a module as it was before its first forward, sharing nothing that a forward changes."""
    twin = copy.copy(module)
    twin._buffers = dict(module._buffers)
    state = vars(twin)
    for layer_type in _kinds(module):
        prefix = "" if layer_type is None else f"{layer_type}_"
        if (original := getattr(module, f"{prefix}original_inv_freq", None)) is not None:
            twin._buffers[f"{prefix}inv_freq"] = original.clone()
        state.pop(f"{prefix}long_inv_freq", None)
        state.pop(f"{prefix}max_seq_len_cached", None)
    state["max_seq_len_cached"] = module.original_max_seq_len
    return twin


def _kinds(module: nn.Module) -> dict[str | None, str]:
    """The rope_type of a rotary embedding, by layer type where it has several; nothing for other modules."""
    kind = vars(module).get("rope_type")  # asked of every module, and getattr is slow where there is none
    if isinstance(kind, dict):
        return kind
    return {None: kind} if isinstance(kind, str) else {}


def _parameters(module: nn.Module, layer_type: str | None) -> dict[str, Any]:
    parameters: dict[str, Any] = vars(module)["config"].rope_parameters
    return parameters if layer_type is None else parameters[layer_type]


def _by_length(module: nn.Module, layer_type: str | None) -> bool:
    """As transformers decides it, in modeling_rope_utils.dynamic_rope_update, and in PhiMoE's rotary embedding."""
    kind = _kinds(module).get(layer_type, "default")
    if "dynamic" in kind or kind == "longrope":
        return True
    return kind != "default" and "long_mscale" in _parameters(module, layer_type)
