"""What may come for the arguments of an op, read from the annotations of its typed function.

A good call pays for a look at its numbers: torch would take True, 2.5 and one-element tensors for them. Everything else
that is wrong makes the call fail, and then it is said in one line what for: see `refuse`.
"""

import inspect
import numbers
import operator
from collections.abc import Callable, Iterable, Sequence
from functools import update_wrapper
from typing import Any, NamedTuple, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad

from ..packed import PackedWeight

P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R], has_gradient: Callable[P, bool] | None = None) -> Callable[P, R]:
    """The typed function of an op, with its arguments checked.

    Numbers of numpy become Python's. Whatever is of another type than the annotation raises a TypeError, and tensors
    that the op cannot take (of mixed devices, sparse, with a gradient that would get lost) a ValueError, both in one
    line that names the argument, what was expected and what came.

    Args:
        has_gradient: from the arguments, whatever they are, to whether the result has its gradient.
    """
    parameters = inspect.signature(function, eval_str=True).parameters
    kinds = {name: _KINDS[parameter.annotation] for name, parameter in parameters.items()}
    tensors = [name for name, kind in kinds.items() if kind.tensors]
    declared, passed, lines = [], [], []
    keywords_only = False
    for name, parameter in parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and not keywords_only:
            keywords_only = True
            declared.append("*")
        declared.append(name if parameter.default is parameter.empty else f"{name}=defaults[{name!r}]")
        passed.append(f"{name}={name}" if keywords_only else name)
        if kinds[name].convert:
            lines.append(f"    if not ({kinds[name].is_plain.format(name)}):")
            lines.append(f"        {name} = kinds[{name!r}].convert({name}, {name!r})")
    # Written out, because a function that passes on any arguments takes longer; a closure in this module, because
    # torch.compile looks names up there.
    op = function.__name__
    source = "\n".join(
        [
            "def make(function, kinds, defaults, has_gradient):",
            f"  def {op}({', '.join(declared)}):",
            *lines,
            f"    if is_grad_enabled() and requires_grad({', '.join(tensors)}) or forward_ad._current_level >= 0:",
            f"        if has_gradient is None or not has_gradient({', '.join(passed)}):",
            f"            check_no_gradients({op!r}, named({tensors}, [{', '.join(tensors)}]))",
            "    try:",
            f"        return function({', '.join(passed)})",
            "    except Exception as error:",
            f"        refuse(error, {op!r}, kinds, {{{', '.join(f'{name!r}: {name}' for name in parameters)}}})",
            f"  return {op}",
        ]
    )
    scope: dict[str, Any] = {}
    exec(compile(source, f"<checks of {op}>", "exec"), globals(), scope)
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    return update_wrapper(scope["make"](function, kinds, defaults, has_gradient), function)


def refuse(error: Exception, op: str, kinds: "dict[str, Kind]", arguments: dict[str, Any]) -> NoReturn:
    """Raise what is wrong with the arguments of a call that failed; if nothing is, the error itself."""
    tensors: list[tuple[str, Tensor]] = []
    for name, value in arguments.items():
        if isinstance(value, int):
            _check_int64(value, name)
        if list_tensors := kinds[name].tensors:
            tensors += list_tensors(value, name)
    for name, tensor in tensors:
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
            what = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else str(tensor.layout)
            raise ValueError(f"{name}: expected a dense tensor, got a {what.removeprefix('torch.')} one") from None
        if tensor.device.type not in ("cpu", "cuda", "meta"):
            raise ValueError(
                f"{name}: expected a tensor on the CPU or a CUDA device, got one on {tensor.device}"
            ) from None
    check_devices(tensors)
    if type(error) in (RuntimeError, NotImplementedError) and "\n" in str(error):
        raise RuntimeError(f"{op}: {str(error).splitlines()[0]}") from None
    raise error


def check_devices(tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Raise for one that is not where the first one is."""
    for name, tensor in tensors:
        where, first = tensors[0]
        if tensor.device != first.device:
            raise ValueError(
                f"{name}: expected a tensor on {first.device}, as {where} is, got one on {tensor.device}"
            ) from None


def check_no_gradients(op: str, tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Raise where a gradient would get lost."""
    for name, tensor in tensors:
        if tensor.requires_grad and is_grad_enabled():
            raise ValueError(
                f"{name}: expected a tensor that requires no grad, because {op} has no backward: "
                f"call it under torch.no_grad() or torch.inference_mode(), or with {name}.detach()"
            )
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(f"{name}: expected a tensor without a tangent, because {op} has no derivative")


def requires_grad(*values: Any) -> bool:
    """Whether one of them, or of a sequence among them, is a tensor that does."""
    for value in values:
        if getattr(value, "requires_grad", False):
            return True
        if isinstance(value, (list, tuple)) and requires_grad(*value):
            return True
    return False


def named(names: Sequence[str], values: Sequence[Any]) -> list[tuple[str, Tensor]]:
    """The tensors among an op's arguments, those of lists too."""
    found = []
    for name, value in zip(names, values, strict=True):
        if isinstance(value, Tensor):
            found.append((name, value))
        elif isinstance(value, (list, tuple)):
            found += [(f"{name}[{i}]", item) for i, item in enumerate(value) if isinstance(item, Tensor)]
    return found


def describe(value: Any) -> str:
    """What came: a tensor's dtype and shape, another object's value and type."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
    text = repr(value) if isinstance(value, (bool, numbers.Number, str)) else ""
    return (
        "None" if value is None else f"{text} ({type(value).__name__})" if 0 < len(text) < 40 else type(value).__name__
    )


# ---- The kinds of arguments


class Kind(NamedTuple):
    """is_plain: an expression that is true for what needs no look; convert: of what does, to what the op takes, or
    raises. tensors: checks an argument of tensors and lists them by their names."""

    is_plain: str = ""
    convert: Callable[[Any, str], Any] | None = None
    tensors: Callable[[Any, str], list[tuple[str, Tensor]]] | None = None


def _unexpected(name: str, expected: str, value: Any) -> TypeError:
    came = "a tensor, " + describe(value) if isinstance(value, Tensor) else describe(value)
    return TypeError(f"{name}: expected {expected}, got {came}")


def _float(value: Any, name: str, expected: str = "a number") -> Any:
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _unexpected(name, expected, value)
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number that fits a float, got {value}") from None


def _int(value: Any, name: str, expected: str = "an int") -> Any:
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise _unexpected(name, expected, value)
    return _check_int64(operator.index(value), name)


def _check_int64(value: int, name: str) -> int:
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an int of 64 bits, got {value}") from None
    return value


def _bool(value: Any, name: str) -> Any:
    raise _unexpected(name, "a bool", value)


def _or_none(convert: Callable[..., Any], expected: str) -> Callable[[Any, str], Any]:
    return lambda value, name: convert(value, name, expected)


def _tensor(value: Any, name: str) -> list[tuple[str, Tensor]]:
    if not isinstance(value, Tensor):
        raise _unexpected(name, "a tensor", value) from None
    return [(name, value)]


def _tensor_or_none(value: Any, name: str) -> list[tuple[str, Tensor]]:
    if value is not None and not isinstance(value, Tensor):
        raise _unexpected(name, "a tensor or None", value) from None
    return [] if value is None else [(name, value)]


def _tensor_or_int(value: Any, name: str) -> list[tuple[str, Tensor]]:
    return [(name, value)] if isinstance(value, Tensor) else []


def _packed(value: Any, name: str) -> list[tuple[str, Tensor]]:
    if not isinstance(value, PackedWeight):
        raise _unexpected(name, "a PackedWeight", value) from None
    return [(name, value.data)]


def _str(value: Any, name: str) -> Any:
    raise _unexpected(name, "a str", value)


def _dtype(value: Any, name: str) -> Any:
    raise _unexpected(name, "a torch.dtype", value)


def _tensors(value: Any, name: str) -> list[tuple[str, Tensor]]:
    if isinstance(value, (Tensor, str, bytes)) or not isinstance(value, Iterable):
        raise _unexpected(name, "a sequence of tensors", value) from None
    for i, item in enumerate(value):
        if not isinstance(item, Tensor):
            raise _unexpected(f"{name}[{i}]", "a tensor", item) from None
    return named([name], [value])


_KINDS: dict[Any, Kind] = {
    float: Kind("type({0}) is float", _float),
    float | None: Kind("{0} is None or type({0}) is float", _or_none(_float, "a number or None")),
    int: Kind("type({0}) is int", _int),
    int | None: Kind("{0} is None or type({0}) is int", _or_none(_int, "an int or None")),
    int | Tensor: Kind(
        "type({0}) is int or isinstance({0}, Tensor)", _or_none(_int, "an int or a tensor"), _tensor_or_int
    ),
    bool: Kind("type({0}) is bool", _bool),
    Tensor: Kind(tensors=_tensor),
    Tensor | None: Kind(tensors=_tensor_or_none),
    Sequence[Tensor]: Kind(tensors=_tensors),
    PackedWeight: Kind(tensors=_packed),
    str: Kind("type({0}) is str", _str),
    torch.dtype: Kind("isinstance({0}, torch.dtype)", _dtype),
}
