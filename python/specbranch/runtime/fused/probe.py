"""Whether fused forwards give what the modules' own do: tried once per model, before the first text.

One forward over a tree of made-up tokens is run with the modules' own forwards, and every fused one beside, on what its
module was given. Where the two differ by more than rounding, the module is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from specbranch.runtime.agreement import over_a_tree
from specbranch.runtime.attach import Attachment, alone_with
from specbranch.runtime.attention import current
from specbranch.runtime.exact import exact_forward
from specbranch.runtime.fused.forward import DIFFERENT, fused_forward, fused_of
from specbranch.runtime.fused.layer import Layer
from specbranch.runtime.rows.routes import Forward

if TYPE_CHECKING:
    from specbranch.runtime.model import CachedModel

# How far a result may be off the module's own, over its norm: above what rounding does in one layer.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}

_tried: WeakKeyDictionary[nn.Module, tuple[Any, ...]] = WeakKeyDictionary()


def leave_different(cached: CachedModel) -> None:
    """Take note of modules whose fused forward does not give what their own does: they are run as they are."""
    model: nn.Module = cached.model
    if cached.device.type == "meta":
        return

    def tried() -> None:
        state = tuple((id(module), type(module)) for module in model.modules())
        while _tried.get(model) != state:
            beside = Beside(model)
            over_a_tree(cached, Attachment([cached.model], beside, forward_of=exact_forward))
            if not beside.different:  # else what is within them is next
                _tried[model] = state

    alone_with([cached.model], tried)


class Beside:
    """Runs the fused forwards beside the modules' own, and compares."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.different = self._trying = False

    def keepers(self) -> Iterator[tuple[nn.Module, Callable[[Forward], Forward]]]:
        """See attach.Tap. Of modules within a fused one only it is looked at."""
        within: set[nn.Module] = set()
        for module in self.model.modules():
            fused = None if module in within else fused_of(module)
            if fused is None:
                continue
            if isinstance(fused, Layer):
                within.update(fused.inner)
            yield module, partial(partial, self._run, module, fused_forward(module, fused))

    def _run(self, module: nn.Module, fused: Forward, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        if self._trying:  # within another one
            return forward(*args, **kwargs)
        context = current()
        assert context is not None
        calls = context.calls
        result = forward(*args, **kwargs)
        after, context.calls = context.calls, calls
        difference = self._difference(fused, result, args, kwargs)
        context.calls = after
        if difference:
            DIFFERENT[module], self.different = difference, True
        return result

    def _difference(self, fused: Forward, own: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """How the fused forward differs, in words; nothing if it does not."""
        self._trying = True
        try:
            result = fused(*args, **kwargs)
        except Exception as error:  # whatever a shape that nobody thought of raises
            return f"its fused forward raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        finally:
            self._trying = False
        expected, got = (each if isinstance(each, Tensor) else each[0] for each in (own, result))
        if got.shape != expected.shape or got.dtype != expected.dtype:
            return f"its fused forward gives {got.dtype} of shape {list(got.shape)}"
        apart = float((got.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
        return "" if apart <= TOLERANCE.get(expected.dtype, 0.0) else f"its fused forward is {apart:.2%} off"
