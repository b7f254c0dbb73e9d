"""Trees of tokens through transformers models: TreeModel.

Any causal language model can be run that honours transformers' AttentionInterface, whose layers keep a row of keys and
values per token, and whose masks are causality and at most a sliding window. Everything else is refused by name.
"""

from __future__ import annotations

import inspect
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain, groupby, repeat
from typing import Any
from weakref import WeakKeyDictionary, proxy

import torch
from torch import Tensor, nn

try:
    from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
    from transformers.cache_utils import CacheLayerMixin
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError(
        "specbranch_ext.integrations.transformers needs transformers 5.17 or newer: "
        f"pip install 'specbranch[transformers]' (the cause: {error})"
    ) from error

from ..ops import ancestor_mask, kv_commit, tree_attention
from ..ops._checks import describe

__all__ = ["TreeModel"]

ATTENTION = "specbranch_ext"  # in transformers' registries
IMPLEMENTATION = "_attn_implementation_internal"  # transformers' name for what its set_attn_implementation() sets

# Layers whose state is a row of keys and values per token, seen by causality and at most a window.
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}

# Arguments of an attention function that change nothing here: windows are taken from the masks.
HARMLESS = {
    *("sliding_window", "dropout", "is_causal", "position_ids", "use_cache"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
}


class TreeModel:
    """A transformers model that runs over trees of tokens, with key and value buffers of its own.

    A cache of `capacity` rows holds one sequence: `length` committed rows, then a row for each node of the *pending*
    tree. A forward adds nodes to that tree, a commit makes a path of it part of the sequence and drops the rest:

        model = TreeModel(AutoModelForCausalLM.from_pretrained(...), capacity=512)
        model.forward(prompt)                             # a chain: nodes 0 to len(prompt) - 1
        model.commit(range(len(prompt)))
        model.forward([a, b, c], parents=[-1, 0, 0])      # nodes 0, 1, 2: b and c both below a
        model.forward([d], parents=[2])                   # node 3, below c
        model.commit([0, 2, 3])                           # a, c, d; b is dropped

    The model is its owner's between two forwards: only while one runs are its attention implementation and its
    training mode other ones. Several TreeModels may share a model, from several threads too; other forwards of it must
    not run in another thread meanwhile.

    Logits are those of the model over each node's path, up to rounding: with most matrix products a row's last bits
    depend on how many rows are computed together.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        """
        Args:
            model: a causal language model on the CPU or on CUDA devices. Nothing is kept in it.
            capacity: rows of the buffers, for committed tokens and pending nodes together. A layer's keys and values,
                [1, kv_heads, capacity, head_dim] each in the model's dtype, are allocated in its first forward.

        Raises:
            TypeError: a model that is none of transformers', a capacity that is no int.
            ValueError: a model that cannot be run over trees; a capacity below 1, or beyond the length of text from
                which the model's rotary embeddings (dynamic, longrope) choose other frequencies for all of it.
        """
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
        if isinstance(capacity, bool) or not isinstance(capacity, int):
            raise TypeError(f"capacity: expected an int, got {describe(capacity)}")
        if capacity < 1:
            raise ValueError(f"capacity: expected at least 1, got {capacity}")
        name = type(model).__name__
        config = model.config.get_text_config()
        if model.config.is_encoder_decoder or not model.can_generate():
            raise ValueError(f"model: expected a decoder-only causal language model, got {name}")
        if not model._can_set_attn_implementation():
            raise ValueError(f"model: {name} does not honour transformers' AttentionInterface")
        if others := set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS:
            raise ValueError(
                f"model: expected layers of {' and '.join(sorted(ATTENTION_LAYERS))}, and {name} has "
                f"{', '.join(sorted(others))}"
            )
        arguments = inspect.signature(model.forward).parameters
        self._cache_argument = "cache" if "cache" in arguments else "past_key_values"  # its name up to 5.23
        for argument in ("position_ids", self._cache_argument):
            if argument not in arguments:
                raise ValueError(f"model: {name}.forward takes no {argument}, which a tree of tokens needs")
        self._keeps = "logits_to_keep" in arguments
        self._modules = list(model.modules())
        for module in self._modules:
            if (turn := _frequencies_change_at(module)) is not None and capacity > turn:
                raise ValueError(
                    f"capacity: expected at most {turn} rows, because from there on the rotary embeddings of {name} "
                    f"choose their frequencies by the length of the text; got {capacity}"
                )
        self._configs = list(attention_configs(model, self._modules))
        self.model, self.capacity = model, capacity
        self._expected, self._vocabulary = int(config.num_hidden_layers), int(config.vocab_size)
        self._length = 0
        self._parents = torch.empty(0, dtype=torch.int64)  # of the pending nodes
        self._layers = [_Layer(self) for _ in range(self._expected)]
        self._cache = Cache(layers=list(self._layers))
        self._known_masks: dict[tuple[int, int | None], str] = {}

    @property
    def length(self) -> int:
        """Committed rows."""
        return self._length

    @property
    def nodes(self) -> int:
        """Nodes of the pending tree, whose rows lie behind the committed ones: node j in row length + j."""
        return len(self._parents)

    @torch.inference_mode()
    def forward(
        self,
        tokens: Sequence[int] | Tensor,
        parents: Sequence[int] | Tensor | None = None,
        *,
        logits_to_keep: int | None = None,
    ) -> Tensor:
        """Run over n tokens, which become the next nodes of the pending tree.

        Args:
            tokens: n >= 1 ids, int64 [n] where it is a tensor.
            parents: the node above each, int64 [n]: a node of the pending tree, or one earlier in this call (whose
                first is node `nodes`), or -1 for a root, directly behind the committed rows. None: a chain below the
                newest pending node, or behind the committed rows where there is none.
            logits_to_keep: compute logits of the last so many tokens only, at least 1. None: of all.

        Returns:
            The logits after each token, [n, V], or [logits_to_keep, V], in the model's dtype and on the device of its
            head; an inference tensor.

        Raises:
            TypeError, ValueError: tokens that are no single sequence of ids of the vocabulary, or have no free rows;
                parents of another number, or that are no earlier nodes; a model that ignores the registered attention,
                or asks it for what it cannot do. No node is added then.
        """
        ids = _ints(tokens, "tokens")
        n, first = len(ids), self.nodes
        if not n:
            raise ValueError("tokens: expected at least one, got none")
        if n > self.capacity - self._length - first:
            raise ValueError(
                f"tokens: expected at most {self.capacity - self._length - first}, which is how many rows are free "
                f"(capacity {self.capacity}, {self._length} committed, {first} pending), got {n}"
            )
        for place in ((ids < 0) | (ids >= self._vocabulary)).nonzero()[:1, 0].tolist():
            raise ValueError(
                f"tokens: expected ids from 0 to {self._vocabulary - 1}, the vocabulary of "
                f"{type(self.model).__name__}, got {int(ids[place])} at place {place}"
            )
        if parents is None:
            above = torch.arange(first - 1, first + n - 1)
        elif len(above := _ints(parents, "parents")) != n:
            raise ValueError(f"parents: expected one for each of {n} tokens, got {len(above)}")
        if logits_to_keep is not None and not 1 <= logits_to_keep <= n:
            raise ValueError(f"logits_to_keep: expected None or 1 to {n}, the number of tokens, got {logits_to_keep}")

        tree = torch.cat([self._parents, above])
        if torch.equal(tree, torch.arange(-1, len(tree) - 1)):  # one chain needs no bits, however long it is
            running = _Forward(self, self._length + first)
            positions = self._length + torch.arange(first, first + n)
        else:
            mask = ancestor_mask(tree)
            running = _Forward(self, self._length, mask.ancestors[first:])
            positions = self._length + mask.depths[first:]
        keep = slice(None) if logits_to_keep is None else slice(-logits_to_keep, None)
        device = self.model.device
        inputs = {
            "input_ids": ids.to(device)[None],
            "position_ids": positions.to(device)[None],
            "use_cache": True,
            self._cache_argument: self._cache,
            **({"logits_to_keep": keep} if self._keeps else {}),
        }
        with _lock_of(self.model):
            attach, detach = self._swaps(running)
            try:
                deque(attach, maxlen=0)
                output = self.model(**inputs)
            finally:
                deque(detach, maxlen=0)
        if running.calls != self._expected:
            raise ValueError(
                f"model: {type(self.model).__name__} called the registered attention in {running.calls} of "
                f"{self._expected} layers: it cannot be run over trees"
            )
        self._parents = tree
        logits: Tensor = output.logits[0]
        return logits if self._keeps else logits[keep]

    @torch.inference_mode()
    def commit(self, path: Sequence[int] | Tensor) -> None:
        """Make a path of the pending tree part of the sequence, and drop all other nodes.

        Args:
            path: nodes, int64 [m] where it is a tensor: a root, then a child of the one before each. Empty: all are
                dropped.

        Raises:
            TypeError, ValueError: nodes that are no path of the pending tree. Nothing has changed then.
        """
        nodes = _ints(path, "path")
        before = -1
        for node in nodes.tolist():
            if not 0 <= node < self.nodes:
                raise ValueError(f"path: expected nodes of the pending tree, which has {self.nodes}, got {node}")
            if (parent := int(self._parents[node])) != before:
                where = "a root" if before < 0 else f"a child of node {before}"
                raise ValueError(f"path: expected {where}, got node {node}, whose parent is {parent}")
            before = node
        if not torch.equal(nodes, torch.arange(len(nodes))):  # else they are in place
            buffers = [kept[0] for layer in self._layers for kept in (layer.keys, layer.values) if kept is not None]
            for device, there in groupby(sorted(buffers, key=_place), key=lambda buffer: buffer.device):
                kv_commit(list(there), (self._length + nodes).to(device), self._length)
        self._length += len(nodes)
        self._parents = self._parents[:0]

    def rollback(self, length: int) -> None:
        """Drop the pending tree and the committed rows from `length` on; nothing is moved.

        Raises:
            TypeError, ValueError: no number of rows from 0 to `length`.
        """
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"length: expected an int, got {describe(length)}")
        if not 0 <= length <= self._length:
            raise ValueError(f"length: expected 0 to {self._length}, the committed rows, got {length}")
        self._length = length
        self._parents = self._parents[:0]

    def _swaps(self, running: _Forward) -> tuple[Iterator[object], Iterator[object]]:
        """Two iterators that do their work while they are run out: our attention and no dropout, and what was before.

        Run out by one call into C, which an interrupt cannot leave half done.
        """
        configs = [vars(config) for config in self._configs]
        found = [config[IMPLEMENTATION] for config in configs]
        training = [vars(module) for module in self._modules if module.training]
        attach = chain(
            map(dict.__setitem__, configs, repeat(IMPLEMENTATION), repeat(ATTENTION)),
            map(dict.__setitem__, training, repeat("training"), repeat(False)),
            map(_running.set, [running]),
        )
        detach = chain(
            map(dict.__setitem__, configs, repeat(IMPLEMENTATION), found),
            map(dict.__setitem__, training, repeat("training"), repeat(True)),
            map(_running.set, [_running.get()]),
        )
        return attach, detach


def attention_configs(model: PreTrainedModel, modules: Sequence[nn.Module]) -> Iterator[Any]:
    """The configs that a model's modules may ask for their attention's implementation."""
    found = [model.config, *(vars(module).get("config") for module in modules)]
    waiting = list({id(config): config for config in found if config is not None}.values())
    for config in waiting:
        if IMPLEMENTATION in getattr(config, "__dict__", ()):
            yield config
        waiting += [inner for name in getattr(config, "sub_configs", ()) if (inner := getattr(config, name, None))]


# ---- Checks


def _ints(values: Sequence[int] | Tensor, name: str) -> Tensor:
    """int64 [n] on the CPU."""
    try:
        tensor = values if isinstance(values, Tensor) else torch.tensor(list(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected a sequence of ints, got {type(values).__name__}: {error}") from None
    if tensor.dim() == 1 and not len(tensor):
        return torch.empty(0, dtype=torch.int64)
    if tensor.dim() != 1 or tensor.dtype != torch.int64:
        batch = "; a TreeModel holds one sequence, not a batch" if tensor.dim() == 2 else ""
        raise ValueError(f"{name}: expected ints of shape [n], got {describe(tensor)}{batch}")
    return tensor.cpu()


def _place(buffer: Tensor) -> str:
    return str(buffer.device)


def _frequencies_change_at(module: nn.Module) -> int | None:
    """The length of text from which on a rotary embedding chooses other frequencies for all of it; None for never."""
    kinds = vars(module).get("rope_type")
    if not isinstance(kinds, str | dict):
        return None
    parameters = vars(module)["config"].rope_parameters
    each = [(kinds, parameters)] if isinstance(kinds, str) else [(kind, parameters[key]) for key, kind in kinds.items()]
    limits: list[int | None] = []
    for kind, given in each:
        if kind == "longrope" or "dynamic" in kind or (kind != "default" and "long_mscale" in given):
            limits += [given.get("original_max_position_embeddings"), vars(module).get("original_max_seq_len")]
    return min((limit for limit in limits if limit is not None), default=None)


# ---- What a forward's layers ask for


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, [1, kv_heads, capacity, head_dim]. Sliding-window layers keep all rows too: the
    window is the attention's business, and so a rollback is exact."""

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, owner: TreeModel) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owner: TreeModel = proxy(owner)  # no cycle: the buffers are freed with their owner, not some time later

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        values = key_states if value_states is None else value_states
        self.dtype, self.device = key_states.dtype, key_states.device
        rows = self.owner.capacity
        self.keys = key_states.new_empty(*key_states.shape[:2], rows, key_states.shape[3])
        self.values = values.new_empty(*values.shape[:2], rows, values.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        begin = self.get_seq_length()
        rows = slice(begin, begin + key_states.shape[2])
        self.keys[:, :, rows] = key_states
        self.values[:, :, rows] = value_states
        return self.keys, self.values  # all rows: the attention knows which of them a query sees

    def get_seq_length(self) -> int:
        return self.owner.length + self.owner.nodes

    def get_max_length(self) -> int:
        return self.owner.capacity

    get_max_cache_shape = get_max_length  # its name in older versions of transformers

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def reset(self) -> None:
        self.owner.rollback(0)


@dataclass
class _Forward:
    """The forward that runs. prefix_length: rows that all its queries see. ancestors: int64 [n, words], None for a
    chain. masks: what was handed out in place of masks, each with its window and what else it does, in words. calls:
    the layers that have asked for their attention."""

    owner: TreeModel
    prefix_length: int
    ancestors: Tensor | None = None
    masks: list[tuple[Tensor, int | None, str]] = field(default_factory=list)
    calls: int = 0
    _on: dict[torch.device, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """prefix_length, int64 [], and ancestors on a layer's device: a model may be spread over several."""
        if device not in self._on:
            ancestors = None if self.ancestors is None else self.ancestors.to(device)
            self._on[device] = torch.tensor(self.prefix_length, device=device), ancestors
        return self._on[device]

    def window(self, mask: Tensor | None, where: str) -> int | None:
        """The sliding window of the mask that a layer was given."""
        for known, window, differs in self.masks:
            # One that was moved to a layer's device is another tensor.
            if mask is known or (mask is not None and mask.device != known.device and mask.shape == known.shape):
                if differs:
                    raise ValueError(f"{where}: expected a mask of causality and at most a sliding window; {differs}")
                return window
        raise ValueError(f"{where}: expected a mask that transformers makes, got one that the model makes or changes")


_running: ContextVar[_Forward | None] = ContextVar("specbranch_ext_running", default=None)


def _this_forward() -> _Forward:
    running = _running.get()
    if running is None:
        raise RuntimeError(f'the attention "{ATTENTION}" is for TreeModel.forward only, which is not running here')
    return running


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """Tree attention for transformers' AttentionInterface: query [1, Hq, n, D], key and value the whole buffers of a
    layer, to [1, n, Hq, D] and no weights."""
    running = _this_forward()
    where = f"model: {type(running.owner.model).__name__}, layer {running.calls} ({type(module).__name__})"
    running.calls += 1
    set_to = {name for name, argument in given.items() if argument is not None and argument is not False}
    if odd := sorted(set_to - HARMLESS):
        raise ValueError(f"{where} hands {', '.join(odd)} to the attention, which tree_attention does not know")
    prefix_length, ancestors = running.on(query.device)
    out = tree_attention(
        query[0].transpose(0, 1),
        key[0],
        value[0],
        prefix_length,
        ancestors,
        scale=scaling,
        sliding_window=running.window(attention_mask, where),
        softcap=softcap,
    )
    return out[None], None


def _mask(
    *, mask_function: Any, device: torch.device | str, config: Any = None, local_size: int | None = None, **given: Any
) -> Tensor:
    """In place of a mask, an empty tensor, [1, 1, 0, its number], by which the attention knows which it would be."""
    running = _this_forward()
    number = len(running.masks)
    known = running.owner._known_masks
    if (number, local_size) not in known:
        use_vmap = given.get("use_vmap", False)
        known[number, local_size] = _difference(
            mask_function, local_size, config, running.owner.capacity, use_vmap, device
        )
    mask = torch.empty(1, 1, 0, number + 1, dtype=torch.bool, device=device)
    running.masks.append((mask, local_size, known[number, local_size]))
    return mask


def _difference(
    mask_function: Any,
    window: int | None,
    config: Any,
    capacity: int,
    use_vmap: bool,
    device: torch.device | str,
) -> str:
    """What a mask's function of positions does besides causality and a window, in words; empty for nothing.

    It is asked about the positions where a mask could turn: around the numbers of the configuration and powers of two.
    """
    numbers = {value for value in vars(config).values() if isinstance(value, int)} if config is not None else set()
    around = {multiple * number for number in numbers | {window or 0} for multiple in (1, 2)}
    around |= {2**i for i in range(capacity.bit_length())} | {capacity - (window or 0)}
    turns = {turn + beside for turn in around for beside in (-1, 0, 1)} | set(range(17))
    places = torch.tensor(sorted(place for place in turns if 0 <= place < capacity), device=device)
    seen = sdpa_mask(
        1,
        len(places),
        len(places),
        mask_function=lambda batch, head, query, key: mask_function(batch, head, places[query], places[key]),
        allow_is_causal_skip=False,
        use_vmap=use_vmap,
        device=places.device,
    )
    assert seen is not None
    back = places[:, None] - places
    expected = (back >= 0) & (back < (capacity if window is None else window))
    for query, key in (seen[0, 0] != expected).nonzero()[:1].tolist():
        does = "does not see" if bool(expected[query, key]) else "sees"
        return f"position {int(places[query])} {does} position {int(places[key])}"
    return ""


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)

_locks: WeakKeyDictionary[PreTrainedModel, threading.RLock] = WeakKeyDictionary()


def _lock_of(model: PreTrainedModel) -> Any:
    """Held while a forward of ours runs: two that changed the same model would put back what they found of each
    other's."""
    return _locks.get(model) or _locks.setdefault(model, threading.RLock())
