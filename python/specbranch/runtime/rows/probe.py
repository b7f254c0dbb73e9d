"""Whether a row of the target's forward depends on the rows beside it: tried once per model, before the first text.

The promise of equal texts rests on this independence: verifying n drafted tokens must be decoding them one by one, to
the bit. One row is run alone and then among others, and every module's results are compared. What depends on the other
rows is, on the CPU, run by exact functions (functions.py) or, if its weights are few, row by row; what mixes rows is
refused; what is left is said.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from specbranch.core.errors import SpecBranchError
from specbranch.runtime.attach import Attachment, Tap, alone_with
from specbranch.runtime.batch import Batch, Inputs
from specbranch.runtime.cache import BranchCache
from specbranch.runtime.device import Device
from specbranch.runtime.exact import known
from specbranch.runtime.model import CachedModel
from specbranch.runtime.rows.functions import ExactFunctions
from specbranch.runtime.rows.judge import error_among, is_small, loud, mixes, row_by_row
from specbranch.runtime.rows.routes import ROUTES, Route, exact_functions, own_forward
from specbranch.runtime.rows.trace import Comparison, Judged, Recording
from specbranch.runtime.support import trying

# Rows, and which of them are the one that was alone. A few, and more than 16, both odd: kernels change with the number,
# and vector loops end in a tail.
BATCHES: tuple[tuple[int, tuple[int, ...]], ...] = ((3, (0, 2)), (17, (0, 5, 16)))
POSITION = 37  # of all rows: at 0 every rotary angle is 0

T = TypeVar("T")
Culprits = dict[nn.Module, Judged]
State = tuple[Any, ...]

_tried: WeakKeyDictionary[nn.Module, tuple[State, str]] = WeakKeyDictionary()


def row_dependence(cached: CachedModel, fixed_rows: int | None = None, device: Device | None = None) -> str:
    """What of a model depends on the other rows of its forward and stays so, in one line; nothing if all is well.

    Whatever can be run so that it does not is from then on, wherever the model is attached. It is tried once, and again
    when modules or weights were replaced by others. fixed_rows: of every forward that samples, if they always have as
    many. device: where it runs; None for the CPU.

    Raises SpecBranchError for a model that mixes rows (a convolution over the tokens, statistics of the batch) or that
    cannot run over one.
    """
    model = cached.model
    if cached.device.type == "meta" or fixed_rows == 1:
        return ""

    def found() -> str:
        state: State = (fixed_rows, *((id(module), kind(module)) for module in model.modules()))
        tried = _tried.get(model)
        if tried is None or tried[0] != state:
            with nullcontext() if device is None else device.running():
                tried = _tried[model] = (state, Probe(cached, fixed_rows).run())
        return tried[1]

    return alone_with([model], found)  # else another thread's turn may be seen


def kind(module: nn.Module) -> tuple[Any, ...]:
    """Equal for modules that compute alike."""
    weights = [(type(w), w.dtype, w.device) for w in module._parameters.values() if w is not None]
    return (type(module), own_forward(module) is None, *weights)


class Probe:
    """Forwards over made-up rows, which see nothing but themselves."""

    def __init__(self, cached: CachedModel, fixed_rows: int | None) -> None:
        self.cached = copy.copy(cached)  # with a cache of its own
        self.model: nn.Module = cached.model
        self.on_cpu = cached.device.type == "cpu"
        self.rows = 1 if fixed_rows is None else fixed_rows
        self.batches = BATCHES
        if fixed_rows is not None:
            self.batches = ((fixed_rows, tuple(sorted({0, fixed_rows // 6, fixed_rows - 1}))),)

    def run(self) -> str:
        for module in self.model.modules():
            ROUTES.pop(module, None)
        culprits = self.compare(self.record())
        if culprits and self.on_cpu:
            culprits = self.try_functions(culprits)
        for module, judged in culprits.items():
            if self.attached(partial(mixes, module, judged)):
                raise SpecBranchError(
                    f"{self.cached.role} model {type(self.model).__name__}: {self.name(module)} mixes the tokens of "
                    "one forward: expected a model in which only attention reads other tokens"
                )
        if culprits and self.on_cpu:
            culprits = self.try_row_by_row(culprits)
        return self.said(culprits)

    # ---- Forwards

    def record(self) -> Recording:
        """The row alone. Modules that call products themselves get their route here: no bits need to differ for it."""
        recording = Recording(self.model, self.rows)
        callers: set[nn.Module] = set()

        def calls_itself() -> bool:
            if not recording.running or self.is_known(module := recording.running[-1]):
                return False
            callers.add(module)
            return ROUTES.get(module, exact_functions) is exact_functions

        def forward() -> None:
            with ExactFunctions(calls_itself) if self.on_cpu else nullcontext():
                self.forward(self.rows, (0,), 1)

        self.attached(forward, recording)
        self.route(callers, exact_functions)
        return recording

    def compare(self, recording: Recording) -> Culprits:
        """What depends on the rows beside it."""
        culprits: Culprits = {}
        for rows, copies in self.batches:
            comparison = Comparison(recording, rows, copies)
            self.attached(partial(self.forward, rows, copies, 2), comparison)
            for module, judged in comparison.culprits.items():
                first = culprits.setdefault(module, judged)
                first.error = max(first.error, judged.error)
        return {**self.attached(partial(self.shaken, comparison.judged)), **culprits}

    def attached(self, work: Callable[[], T], tap: Tap | None = None) -> T:
        """Do it with the model as it runs; tap: looks at it."""
        return Attachment([self.cached.model], tap).turn(work)

    def shaken(self, judged: dict[nn.Module, Judged]) -> Culprits:
        """What depends on outliers beside a row, which made-up rows may lack: of each kind and shape, one is tried."""
        culprits: Culprits = {}
        tried = set()
        for module, each in judged.items():
            shape = (kind(module), *(weight.shape for weight in module.parameters()))
            if shape in tried or any(module.children()) or self.is_known(module):
                continue
            tried.add(shape)
            if error_among(module, each, loud, max(3, self.rows)):
                culprits[module] = each
        return culprits

    def forward(self, rows: int, copies: Iterable[int], others: int) -> None:
        """others: which rows are beside the copies of the first one."""
        vocabulary, cached = self.cached.vocabulary, self.cached
        tokens = [(vocabulary // 3 + 7 * row + others) % vocabulary for row in range(rows)]
        for place in copies:
            tokens[place] = vocabulary // 3
        limit = getattr(cached.model.config.get_text_config(), "max_position_embeddings", None) or POSITION + 1
        positions = (min(POSITION, limit - 1),) * rows
        alone = tuple(1 << row for row in range(rows))
        batch = Batch(tuple(tokens), positions, tuple(range(rows)), alone, prefix=0, leaves=rows)
        cached.cache = BranchCache.alone(cached.layers, rows, cached.device)
        with trying(f"{cached.role} model {type(self.model).__name__}"):
            cached.forward(Inputs.of([batch], cached.device))

    # ---- Routes

    def route(self, modules: Iterable[nn.Module], route: Route) -> None:
        """For these modules and all of their kind."""
        for module in self.alike(modules):
            ROUTES.setdefault(module, route)

    def alike(self, modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
        """All modules of these kinds that are not known by their type."""
        kinds = {kind(module) for module in modules}
        for module in self.model.modules():
            if kind(module) in kinds and not self.is_known(module):
                yield module

    def is_known(self, module: nn.Module) -> bool:
        return known(module, self.cached.device) is not None

    def try_functions(self, culprits: Culprits) -> Culprits:
        """Keep the route of exact functions where it helps: what they replace may be called where it is not seen."""
        routed = [module for module in self.alike(culprits) if module not in ROUTES]
        self.route(routed, exact_functions)
        left = self.compare(self.record())
        kinds = {kind(module) for module in left}
        for module in routed:
            if kind(module) in kinds:
                del ROUTES[module]
        return left

    def try_row_by_row(self, culprits: Culprits) -> Culprits:
        """All of them, if that is cheap, else none: one is enough to lose the promise."""
        routes = {module: row_by_row(judged) for module, judged in culprits.items()}
        if None in routes.values() or not all(is_small(module) for module in self.alike(culprits)):
            return culprits
        for module, route in routes.items():
            assert route is not None
            ROUTES.update(dict.fromkeys(self.alike([module]), route))
        return self.compare(self.record())

    # ---- Words

    def name(self, module: nn.Module) -> str:
        path = next(path for path, each in self.model.named_modules() if each is module)
        return f"{type(module).__name__} {path}" if path else type(module).__name__

    def said(self, culprits: Culprits) -> str:
        """In one line, by class: how many, and which is the first."""
        if not culprits:
            return ""
        kinds = {kind(module) for module in culprits}
        groups: dict[str, list[nn.Module]] = {}
        for module in self.model.modules():
            if kind(module) in kinds:
                groups.setdefault(type(module).__name__, []).append(module)
        layers = ", ".join(f"{self.name(group[0])} (1 of {len(group)})" for group in groups.values())
        return (
            f"texts equal autoregressive decoding up to the rounding of what depends on the rows beside a row: {layers}"
        )
