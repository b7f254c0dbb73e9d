"""Which runner a model gets, and which workers a pair."""

from __future__ import annotations

from specbranch.core.errors import SpecBranchError
from specbranch.runtime.choices import PRIORITIES
from specbranch.runtime.cuda import Cuda
from specbranch.runtime.device import Host
from specbranch.runtime.graphs.probe import why_not_captured
from specbranch.runtime.graphs.runner import CapturedRunner
from specbranch.runtime.model import CachedModel
from specbranch.runtime.runner import EagerRunner, Runner
from specbranch.runtime.workers import Streams, Threads


def make_runner(model: CachedModel, cuda_graphs: bool, priority: str = "target") -> Runner:
    """The runner for a model where its weights are. cuda_graphs: capture its steps, on a GPU and if they can be.
    priority: the model whose work goes first where both share a GPU.

    Raises SpecBranchError for a priority that is none of PRIORITIES.
    """
    if priority not in PRIORITIES:
        raise SpecBranchError(f"priority is {priority!r}; expected one of {', '.join(PRIORITIES)}")
    if model.device.type != "cuda":
        return EagerRunner(model, Host())
    device = Cuda(model.device, urgent=model.role == priority)
    if not cuda_graphs:
        return EagerRunner(model, device, "CUDA graphs are switched off")
    reason = why_not_captured(model.model)
    return CapturedRunner(model, device) if reason is None else EagerRunner(model, device, reason)


def make_workers(target: Runner, draft: Runner | None, threads: int, target_threads: int | None) -> Threads | Streams:
    """How the two models run at once: on streams if both are on GPUs, else on threads."""
    runners = [target] if draft is None else [target, draft]
    if all(runner.model.device.type == "cuda" for runner in runners):
        return Streams([runner.device for runner in runners])
    return Threads(threads, target_threads)
