"""Tickets: counters by which a kernel finds out which of its blocks ends last, so that this one can finish the work.

They are zero when a kernel starts, and it leaves them zero, so that no launch is needed to clear them. Kernels that may
run at the same time must not share any. Work of one stream runs in order, and so does a captured stream's part of a
graph, which never runs beside itself: each stream has a set, and each capture has one of its own for good, because
graphs of one stream may be replayed on several.
"""

import torch
from torch import Tensor

from . import _library

COUNT = 256  # int32 counters in a set: what one launch may need
RESERVE = 256  # sets that are made at once; 1 KB each

_streams: dict[tuple[int, int], Tensor] = {}
_captures: dict[tuple[int, int], tuple[int, Tensor]] = {}
_spare: dict[int, list[Tensor]] = {}
_host = torch.zeros(COUNT, dtype=torch.int32)


def tickets(tensor: Tensor) -> Tensor | None:
    """int32 [COUNT], all zero, for one launch on the current stream of `tensor`'s device; None on the CPU."""
    if tensor.is_cpu:
        return _host if _library.core.emulated else None
    device, stream = tensor.device.index, _library.launch_handle(tensor)
    capture = _library.core.capture_id(stream)
    return _of_stream(device, stream) if capture == 0 else _of_capture(device, stream, capture)


def _of_stream(device: int, stream: int) -> Tensor:
    if (device, stream) not in _streams:
        _streams[device, stream] = _zeros(1, device)[0]
    if not _spare.get(device):
        _spare[device] = list(_zeros(RESERVE, device))
        torch.cuda.current_stream(device).synchronize()  # graphs that use them may be replayed on any stream
    return _streams[device, stream]


def _of_capture(device: int, stream: int, capture: int) -> Tensor:
    """The newest capture's set; a stream captures one graph at a time."""
    known, own = _captures.get((device, stream), (0, _host))
    if known != capture:
        spare = _spare.get(device)
        own = spare.pop() if spare else _zeros(1, device)[0]  # the graph then clears it whenever it is replayed
        _captures[device, stream] = capture, own
    return own


def _zeros(sets: int, device: int) -> Tensor:
    return torch.zeros(sets, COUNT, dtype=torch.int32, device=torch.device("cuda", device))
