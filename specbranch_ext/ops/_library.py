"""How an op is registered with torch and run by the core, and the conversions that the typed functions share."""

import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .. import _C
from . import _checks
from ._checks import describe

core: Any = _C
"""The compiled module that every op runs on. The tests put the emulated CUDA kernels here."""

# One fragment for all ops.
_LIBRARY = torch.library.Library("specbranch", "FRAGMENT")


def register(
    schema: str,
    outputs: Callable[..., Tensor | tuple[Tensor, ...]] | None = None,
    *,
    workspace: Callable[..., tuple[Any, ...]] | None = None,
    tickets: Callable[[Tensor], Tensor | None] | None = None,
    run: Callable[..., None] | None = None,
    device_of: int = 0,
) -> Callable[..., Any]:
    """Define `torch.ops.specbranch.<op>` by what makes its outputs; returns the overload.

    Its kernel, one for the CPU and CUDA, calls the core's function of the same name with the arguments of the schema,
    the outputs, `launch_handle`, and then the workspace and the tickets of an op that has them. The fake implementation
    refuses tensors of several devices, as the core does.

    Args:
        schema: the op's name, arguments and results.
        outputs: from the arguments to the tensors that the core writes. None where the op writes its arguments.
        workspace: from the arguments to those of the core's `<op>_workspace`.
        tickets: `_tickets.tickets`.
        run: called with the arguments and the outputs in place of the core's function.
        device_of: the argument whose device the op runs on.
    """
    # `Library` rather than `custom_op`: its calls cost a few microseconds less.
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = schema.split("(", 1)[0]
    overload = getattr(torch.ops.specbranch, op).default
    declared = overload._schema.arguments
    parameters = ", ".join(f"{a.name}={a.default_value}" if a.has_default_value() else a.name for a in declared)
    arguments, where = ", ".join(a.name for a in declared), declared[device_of].name
    results = ", ".join(f"output_{i}" for i in range(len(overload._schema.returns)))
    call = [arguments, *([results] if results else []), f"library.launch_handle({where})"]
    if workspace:
        call.append(f"library.allocate({where}, {op!r}, workspace, {arguments})")
    if tickets:
        call.append(f"tickets({where})")
    named = f"checks.named({[a.name for a in declared]}, [{arguments}])"
    make = [f"    {results} = outputs({arguments})"] if results else []
    done = [f"    return {results or None}"]
    core = f"run({', '.join(call[:-1])})" if run else f"library.core.{op}({', '.join(call)})"
    # Written out, because a function that passes on any arguments takes 0.3 us more.
    kernel = [f"def kernel({parameters}):", *make, f"    {core}", *done]
    fake = [f"def fake({parameters}):", f"    checks.check_devices({named})", *make, *done]
    scope: dict[str, Any] = {"library": sys.modules[__name__], "checks": _checks}
    scope |= {"outputs": outputs, "workspace": workspace, "tickets": tickets, "run": run}
    exec("\n".join([*kernel, *fake]), scope)
    _LIBRARY.impl(op, scope["kernel"], "CPU")
    _LIBRARY.impl(op, scope["kernel"], "CUDA")
    torch.library.register_fake(f"specbranch::{op}", scope["fake"], lib=_LIBRARY)
    return cast("Callable[..., Any]", overload)


def launch_handle(tensor: Tensor) -> int:
    """What the core needs to start an op where `tensor` is: torch's threads on the CPU, its current stream on CUDA."""
    if tensor.is_cpu:
        return torch.get_num_threads()
    return torch.cuda.current_stream(tensor.device).cuda_stream


def allocate(tensor: Tensor, op: str, sizes: Callable[..., tuple[Any, ...]], *arguments: Any) -> Tensor | None:
    """A workspace: uninitialised memory for a CUDA kernel, of `<op>_workspace(*sizes(*arguments))` bytes; None on the
    CPU."""
    if tensor.is_cpu and not core.emulated:
        return None
    if not core.emulated and not hasattr(core, f"{op}_workspace"):
        raise ValueError(f"{op}: this build has no CUDA kernels: {core.build_info()['cuda_reason']}")
    size = getattr(core, f"{op}_workspace")(*sizes(*arguments))
    return torch.empty(size, dtype=torch.uint8, device=tensor.device)


def check_matrix(tensor: Tensor, name: str) -> None:
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected shape [n, V], got {describe(tensor)}")


def int64_scalar(value: int | Tensor, name: str, device: torch.device) -> Tensor:
    """An int as an int64 tensor of shape [] on `device`; a tensor is checked and passed through."""
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.dim() != 0:
            raise ValueError(f"{name}: expected an int or an int64 tensor of shape [], got {describe(value)}")
        return value
    return torch.scalar_tensor(value, dtype=torch.int64, device=device)  # half the time of torch.tensor


def seeds(value: int | Tensor, positions: Tensor) -> Tensor:
    """An int as an int64 tensor of shape [] on the device of `positions`; a tensor, [] or one for each position, is
    checked and passed through."""
    if not isinstance(value, Tensor):
        return int64_scalar(value, "seed", positions.device)
    if value.dtype != torch.int64 or (value.dim() != 0 and value.shape != positions.shape):
        raise ValueError(
            f"seed: expected an int or an int64 tensor of shape [] or {list(positions.shape)}, as positions has, "
            f"got {describe(value)}"
        )
    return value
