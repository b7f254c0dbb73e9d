"""torch's products and activations, whoever calls them, with rows that do not depend on each other (CPU)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from specbranch_ext import linear

LINEAR_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VECTOR = 64  # elements: whole iterations of torch's vector loops, in every dtype
PIECE = 16384  # elements: below what torch shares among threads, whose parts end anywhere
SHARED = 32768  # elements, at least, for each thread (at::internal::GRAIN_SIZE)

aten = torch.ops.aten


def is_plain(tensor: object) -> bool:
    """Whether it is a tensor of torch's own class, so that its values are where they seem to be."""
    return type(tensor) in (Tensor, nn.Parameter)


def fits_linear(*tensors: object) -> bool:
    """Whether `linear` takes them: plain, on the CPU, of one dtype that it knows; None stands for no bias."""
    dtypes = set()
    for tensor in tensors:
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or not is_plain(tensor) or not tensor.is_cpu:
            return False
        dtypes.add(tensor.dtype)
    return len(dtypes) == 1 and dtypes.pop() in LINEAR_DTYPES


def in_whole_vectors(input: Tensor) -> bool:
    """Whether torch's loop over a contiguous tensor's elements, and over each of its rows alone, has no tail: rows and
    what each thread gets are whole iterations."""
    row, all_rows = input.shape[-1], input.numel()
    return row % VECTOR == 0 and _part(row) % VECTOR == 0 and _part(all_rows) % VECTOR == 0


def _part(elements: int) -> int:
    """Elements of each thread but the last, as at::parallel_for shares them."""
    threads = max(1, min(torch.get_num_threads(), -(-elements // SHARED)))
    return -(-elements // threads)


class ExactFunctions(TorchDispatchMode):
    """While it is entered, the functions of EXACT do every row alike, wherever their arguments allow that: also within
    other functions, tensor subclasses and custom ops.

    wanted: asked each time whether it shall be so.
    """

    def __init__(self, wanted: Callable[[], bool] = lambda: True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._wanted = wanted
        self._inside: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        exact = EXACT.get(func)
        if exact is not None:
            result = exact(*args, **kwargs)
            if result is not NotImplemented and self._wanted():
                return result
        if func not in self._inside:
            inner = self._inner(func, types)
            if inner is not None:
                self._inside.append(func)
                try:
                    with self:
                        return inner(*args, **kwargs)
                finally:
                    self._inside.pop()
        return func(*args, **kwargs)

    def _inner(self, func: Any, types: Sequence[type]) -> Callable[..., Any] | None:
        """What a function runs itself, so that this mode sees it too."""
        if func in COMPOSED:
            decompose: Callable[..., Any] = func.decompose
            return decompose
        kind: Any = next((kind for kind in types if kind not in (Tensor, nn.Parameter)), None)
        if kind is not None:
            return lambda *args, **kwargs: kind.__torch_dispatch__(func, types, args, kwargs)
        if func.namespace not in ("aten", "prims", "specbranch") and any(
            map(func.has_kernel_for_dispatch_key, KERNELS)
        ):
            return lambda *args, **kwargs: func.redispatch(CPU, *args, **kwargs)
        return None


CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
KERNELS = ("CPU", "CompositeExplicitAutograd")
COMPOSED = {aten.matmul.default, aten.einsum.default, aten.softmax.int, aten.log_softmax.int}


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not fits_linear(input, weight, bias) or weight.dim() != 2 or weight.shape[1] < 2:
        return NotImplemented  # one factor makes no sum
    return linear(input, weight if weight.stride(1) == 1 else weight.contiguous(), bias)


def _mm(input: Tensor, other: Tensor) -> Any:
    return _linear(input, other.mT) if is_plain(other) else NotImplemented


def _addmm(bias: Tensor, input: Tensor, other: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1:
        return NotImplemented
    product = _mm(input, other)
    return product if product is NotImplemented else product + bias


def _bmm(input: Tensor, other: Tensor) -> Any:
    if not fits_linear(input, other) or not len(input) or input.shape[2] < 2:
        return NotImplemented
    if other.shape[2] == 1:  # weights on the left, as in batched experts
        return torch.stack([_linear(column.mT, weight).mT for weight, column in zip(input, other, strict=True)])
    return torch.stack([_mm(rows, weight) for rows, weight in zip(input, other, strict=True)])


def _baddbmm(bias: Tensor, input: Tensor, other: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1:
        return NotImplemented
    product = _bmm(input, other)
    return product if product is NotImplemented else product + bias


def _grouped_mm(
    input: Tensor, weight: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: Any = None
) -> Any:
    """Rows [S, in], sorted by expert; weight [experts, in, out]; offs: where each expert's rows end."""
    if offs is None or bias is not None or out_dtype is not None:
        return NotImplemented
    if not fits_linear(input, weight) or weight.dim() != 3 or weight.shape[1] < 2:
        return NotImplemented
    output = input.new_zeros(len(input), weight.shape[2])
    begin = 0
    for expert, end in enumerate(offs.tolist()):
        if end > begin:
            output[begin:end] = _mm(input[begin:end], weight[expert])
        begin = end
    return output


def _elementwise(func: Callable[..., Tensor]) -> Callable[..., Any]:
    """Every element in the body of torch's vector loop: its tail has another exponential, off in the last bit."""

    def exact(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not is_plain(input) or input.device.type != "cpu" or not input.is_floating_point():
            return NotImplemented
        flat = input.reshape(-1)
        padded = functional.pad(flat, (0, -len(flat) % VECTOR))
        pieces = [func(piece, *args, **kwargs) for piece in padded.split(PIECE)]
        return torch.cat(pieces)[: len(flat)].view(input.shape)

    return exact


def _by_row(func: Callable[..., Tensor]) -> Callable[..., Any]:
    """Over the last dimension: torch goes another way where there are few rows, or short ones."""

    def exact(input: Tensor, dim: int, *args: Any) -> Any:
        if not is_plain(input) or input.device.type != "cpu" or dim not in (-1, input.dim() - 1) or not input.numel():
            return NotImplemented
        rows = input.reshape(-1, 1, input.shape[-1])
        return torch.cat([func(row, -1, *args) for row in rows]).view(input.shape)

    return exact


def _into_first(exact: Callable[..., Any]) -> Callable[..., Any]:
    def in_place(input: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = exact(input, *args, **kwargs)
        return result if result is NotImplemented else input.copy_(result)

    return in_place


def _into_out(exact: Callable[..., Any]) -> Callable[..., Any]:
    def into(*args: Any, out: Tensor, **kwargs: Any) -> Any:
        result = exact(*args, **kwargs)
        return result if result is NotImplemented else out.copy_(result)

    return into


def _table() -> dict[Any, Callable[..., Any]]:
    products: dict[str, Callable[..., Any]] = {
        "linear": _linear,
        "mm": _mm,
        "addmm": _addmm,
        "bmm": _bmm,
        "baddbmm": _baddbmm,
    }
    elementwise = ("silu", "gelu", "mish", "elu", "softplus", "sigmoid", "tanh", "exp", "erf", "log1p", "expm1")
    exact: dict[str, Callable[..., Any]] = {
        **products,
        **{name: _elementwise(getattr(aten, name).default) for name in elementwise},
        **{name: _by_row(getattr(aten, name).default) for name in ("_softmax", "_log_softmax")},
        "_grouped_mm": _grouped_mm,
    }
    table: dict[Any, Callable[..., Any]] = {}
    for name, function in exact.items():
        if hasattr(aten, name):  # _grouped_mm: from some version on
            table[getattr(aten, name).default] = function
        if hasattr(getattr(aten, name, None), "out"):
            table[getattr(aten, name).out] = _into_out(function)
        if name not in products and hasattr(aten, f"{name}_"):
            table[getattr(aten, f"{name}_").default] = _into_first(function)
    return table


EXACT = _table()
