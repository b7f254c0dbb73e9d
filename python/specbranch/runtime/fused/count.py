"""Counts the kernels that a GPU would run, on the meta device: no GPU, no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
FREE = {
    # Views
    *(aten.view, aten._unsafe_view, aten.transpose, aten.t, aten.permute, aten.slice, aten.select, aten.unsqueeze),
    *(aten.squeeze, aten.expand, aten.split, aten.split_with_sizes, aten.unbind, aten.as_strided, aten.detach),
    *(aten.alias, aten.unflatten, aten.unfold, aten.diagonal, aten.movedim, aten._reshape_alias),
    # Memory that nobody fills
    *(aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided),
}


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # In inference mode what consists of other operations comes whole: a reshape may be a view or a copy.
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if func.overloadpacket not in FREE:
            self.found[str(func.overloadpacket)] += 1
        return func(*args, **kwargs)


def count_kernels(run: Callable[[], object]) -> Counter[str]:
    """Operations that are kernels, by name ("aten.mul", "specbranch.verify"). Each counts one, whatever it launches;
    views and allocations count nothing.

    run: works on tensors of the meta device, in inference mode or not.
    """
    counting = _Counting()
    with counting:
        run()
    return counting.found
