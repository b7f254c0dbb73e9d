"""Attaching specbranch to transformers models: tree attention, modules whose rows are independent, evaluation mode.

Models are attached for one turn at a time, such as a round of the decoding loop, and in between they are as their owner
left them. So nothing is left behind by a stream that is put aside, and a model can be shared: with transformers' own
generate(), with other generations, with other engines. Whoever wants a model that is in use waits.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, compress, repeat
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from specbranch.runtime.attention import ATTENTION
from specbranch.runtime.forwards import forwards_of
from specbranch.runtime.locks import Lock, locked, run_out
from specbranch.runtime.rows.routes import Forward, replacement
from specbranch.runtime.threads import set_threads
from specbranch.runtime.weights import execution_device
from specbranch_ext.integrations.transformers import IMPLEMENTATION, attention_configs

T = TypeVar("T")
# Objects' attributes, the name of one of each, and a value for each.
Columns = tuple[tuple[dict[str, Any], ...], tuple[str, ...], tuple[Any, ...]]
Restore = tuple[Columns, Columns]

MISSING = object()


class Tap(Protocol):
    """Something that looks at what modules do."""

    def keepers(self) -> Iterator[tuple[nn.Module, Callable[[Forward], Forward]]]:
        """Modules, each with what makes of a forward one that does as much and is looked at."""


class Attachment:
    """What changes in some models for the time of a turn: their attention, forwards and training flags.

    Where a row's result would change with the number of rows in its forward, another forward is put in place: verifying
    drafted tokens together then gives bit for bit what decoding one by one gives. Prepared once, for modules as they
    are then; each turn puts back what it found.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        tap: Tap | None = None,
        threads: int | None = None,
        attention: str | None = ATTENTION,
        forward_of: Callable[[nn.Module, torch.device], Forward | None] | None = None,
    ) -> None:
        """tap: looks at modules of one of the models. threads: torch's intra-op threads during a turn. attention: a
        registered one, None for each model's own. forward_of: what to run instead of a module's forward; None:
        see forwards_of."""
        models = list({id(model): model for model in models}.values())
        forwards: dict[nn.Module, Forward] = {}
        configs: dict[int, Any] = {}
        modules: dict[nn.Module, None] = {}
        for model in models:
            own = list(model.modules())
            modules.update(dict.fromkeys(own))
            configs.update((id(config), config) for config in attention_configs(model, own))
            device = execution_device(model)
            forwards.update(forwards_of(own, device) if forward_of is None else _each(own, device, forward_of))
        for module, keep in () if tap is None else tap.keepers():
            forwards[module] = replacement(module, keep(forwards.get(module, module.forward)))
        places = [
            *[(vars(config), IMPLEMENTATION, attention) for config in configs.values() if attention is not None],
            *[(vars(module), "forward", forward) for module, forward in forwards.items()],
        ]
        self._objects, self._names, self._values = columns(places)
        self._modules = [vars(module) for module in modules]
        self._found: list[Any] = []  # in the places, when it was asked last
        self._restore: Restore = ((), (), ()), ((), (), ())
        self._threads = threads
        models.sort(key=id)  # in one order everywhere, so that nobody waits in a circle
        self._first, self._last = models[0], models[-1]

    @property
    def wanted(self) -> bool:
        """Whether another thread waits for one of the models, or has it."""
        asking = (*_use_of(self._first).asking, *_use_of(self._last).asking)
        return any(thread != threading.get_ident() for thread in asking)

    def turn(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises, called with the models attached; waits while they are in use.

        An interrupt may arrive between any two bytecodes, but not within a call into C. So attaching is one such
        call, and detaching another, which is the first thing that happens however the work ends.
        """

        def attached() -> T:
            attach, detach = self._swaps()
            try:
                run_out(attach)
                return work()
            finally:
                run_out(detach)

        return alone_with((self._first, self._last), attached)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """A turn as a context; an interrupt at its very end may find the models attached until it has been handled."""
        with _asking((self._first, self._last)) as (first, last), first, last:
            attach, detach = self._swaps()
            try:
                run_out(attach)
                yield
            finally:
                run_out(detach)

    def _swaps(self) -> tuple[Iterator[object], Iterator[object]]:
        """Two iterators that do their work while they are run out, all of it in C: attach, and detach."""
        found = list(map(dict.get, self._objects, self._names, repeat(MISSING)))
        if found != self._found:
            self._found, self._restore = found, self._restoring(found)
        training = list(compress(self._modules, map(dict.get, self._modules, repeat("training"))))
        threads, key = torch.get_num_threads(), object()
        note = threading.get_ident(), self._restore, training
        attach = chain(
            map(_attached.__setitem__, [key], [note]),
            map(dict.__setitem__, self._objects, self._names, self._values),
            map(dict.__setitem__, training, repeat("training"), repeat(False)),
            map(set_threads, [1 if _forked else self._threads or threads]),
        )
        detach = chain(
            restoring(self._restore, training),
            map(set_threads, [threads]),
            map(_attached.pop, [key], [None]),
        )
        return attach, detach

    def _restoring(self, found: Sequence[object]) -> Restore:
        """What to put back where there was something, and what to take away where there was not."""
        places = list(zip(self._objects, self._names, found, strict=True))
        there = [place for place in places if place[2] is not MISSING]
        missing = [(values, name, None) for values, name, before in places if before is MISSING]
        return columns(there), columns(missing)


def _each(
    modules: Sequence[nn.Module], device: torch.device, forward_of: Callable[[nn.Module, torch.device], Forward | None]
) -> Iterator[tuple[nn.Module, Forward]]:
    for module in modules:
        if (forward := forward_of(module, device)) is not None:
            yield module, forward


def columns(places: Sequence[tuple[dict[str, Any], str, Any]]) -> Columns:
    first, second, third = zip(*places, strict=True) if places else ((), (), ())
    return first, second, third


def restoring(restore: Restore, training: Sequence[dict[str, Any]]) -> Iterator[object]:
    """Puts everything back while it is run out."""
    there, missing = restore
    return chain(
        map(dict.__setitem__, *there),
        map(dict.pop, *missing),
        map(dict.__setitem__, training, repeat("training"), repeat(True)),
    )


# ---- Turns: which models are in use, in this process


class Use:
    """Of one model. lock: held by the thread that has it. asking: that thread, and those that wait."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.asking: set[int] = set()


_attached: dict[object, tuple[int, Restore, list[dict[str, Any]]]] = {}  # by turn: its thread, and what to put back
_uses: WeakKeyDictionary[PreTrainedModel, Use] = WeakKeyDictionary()
_forked = False


def forked() -> bool:
    """Whether this process is a forked child. OpenMP's team is not there then, and torch would wait for it: work is
    done on one thread."""
    return _forked


def alone_with(models: Sequence[PreTrainedModel], work: Callable[[], T]) -> T:
    """What `work` returns or raises, called when no other thread has the models."""
    with _asking(models) as locks:
        return locked(locks, work)


@contextmanager
def _asking(models: Sequence[PreTrainedModel]) -> Iterator[list[Any]]:
    """The context in which this thread waits for models, or has them; their locks."""
    uses, thread = [_use_of(model) for model in models], threading.get_ident()
    try:
        for use in uses:
            use.asking.add(thread)
        yield [use.lock for use in uses]
    finally:
        for use in uses:
            use.asking.discard(thread)


def _use_of(model: PreTrainedModel) -> Use:
    return _uses.get(model) or _uses.setdefault(model, Use())


def _forget_other_threads() -> None:
    """In a forked child no other thread goes on: end their turns."""
    global _forked
    _forked = True
    _uses.clear()
    for thread, restore, training in _attached.values():
        if thread != threading.get_ident():
            run_out(restoring(restore, training))


os.register_at_fork(after_in_child=_forget_other_threads)
