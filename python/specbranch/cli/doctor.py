"""`specbranch doctor`: what is installed, what can run here, and why something cannot."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from specbranch.cli.arguments import MODEL, add_trust, device
from specbranch.cli.machine import describe_machine, describe_versions
from specbranch.cli.messages import FAILURE, one_line
from specbranch.cli.models import configured, fused, loaded
from specbranch.cli.terminal import output_console
from specbranch.runtime.choices import draft_of

HELP = "report what is installed and what can run here"
OUTPUTS = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target",
        metavar=MODEL,
        help="the model to examine (default: the bundled pair); without --load by its configuration alone",
    )
    parser.add_argument("--draft", metavar=MODEL, help="a draft to examine")
    parser.add_argument(
        "--load",
        nargs="?",
        type=device,
        const="cpu",
        metavar="cpu|cuda",
        help="load them there (default: cpu) as generate does, and decode a few tokens",
    )
    add_trust(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the findings; status 1 when SpecBranch cannot generate here.

    Raises ValueError for a draft without its target.
    """
    if args.draft is not None and args.target is None:
        raise ValueError("--draft needs --target")
    draft, _ = draft_of(args.target, args.draft, "auto")
    findings = examine(args.target, draft, args.load, args.trust_remote_code)
    if args.json:
        print(json.dumps(findings, indent=1))
    else:
        view = Table(show_header=False, box=None)
        view.add_column(style="bold", no_wrap=True)
        view.add_column()
        for section, values in findings.items():
            view.add_row(section.replace("_", " "), Text(_as_text(values)))
        output_console().print(view)
    return 0 if findings["ready"] else FAILURE


def examine(
    target: str | None = None, draft: str | None = None, load: str | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Everything that `doctor` reports; a part that fails holds its error, and nothing is raised.

    target: None for the bundled pair. load: the device where they are loaded and tried, None for not at all.
    """
    if target is None:
        target = draft = "bundled"
    findings: dict[str, Any] = {
        "versions": describe_versions(),
        "machine": _attempt(describe_machine),
        "threads": _attempt(_threads),
        "core": _attempt(_core),
        "openmp": _attempt(_openmp),
        "cuda": _attempt(_cuda),
        "cuda_graphs": {},
        "fused_layers": {},
        "bundled_pair": _attempt(_bundled_pair),
    }
    needed = ("core", "bundled_pair", "threads")
    problems = [f"{part}: {findings[part]['error']}" for part in needed if "error" in findings[part]]
    for role, source in (("target", target), ("draft", draft)):
        if source is not None:
            findings["cuda_graphs"][role], problem = configured(source, role, trust_remote_code)
            problems += [] if problem is None else [problem]
            if problem is None:
                findings["fused_layers"][role] = _attempt(partial(fused, source, role, trust_remote_code))
    if load is None:
        findings["loaded"] = "no: --load looks at weights, tokenizers, logits and rows, as generate does"
    elif problems:
        findings["loaded"] = "no: see the problems"
    else:
        findings["loaded"] = _attempt(lambda: loaded(target, draft, load, trust_remote_code))
        problems += [findings["loaded"]["error"]] if "error" in findings["loaded"] else []
    return {**findings, "problems": problems, "ready": not problems}


def _attempt(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return part()
    except Exception as error:
        return {"error": one_line(error)}


def _threads() -> dict[str, Any]:
    import torch

    return {"intra_op": torch.get_num_threads(), "inter_op": torch.get_num_interop_threads()}


def _core() -> dict[str, Any]:
    import specbranch_ext

    return dict(specbranch_ext.build_info())


def _openmp() -> dict[str, Any]:
    """The OpenMP runtimes in this process: torch and the core should share one, as two compete for the cores."""
    import torch  # noqa: F401

    import specbranch_ext  # noqa: F401

    if not sys.platform.startswith("linux"):
        return {"runtimes": None, "shared": None}
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    runtimes = sorted(path for path in mapped if Path(path).name.startswith(("libgomp", "libomp", "libiomp")))
    return {"runtimes": runtimes, "shared": len(runtimes) == 1}


def _cuda() -> dict[str, Any]:
    """Whether CUDA can be used, and what is missing: kernels, a CUDA build of torch, a driver or a device."""
    import torch

    from specbranch_ext import cuda_device_problem

    core = _attempt(_core)
    built = bool(core.get("cuda"))
    reasons = []
    if not built:
        reasons.append(core.get("cuda_reason") or "the core was built without CUDA kernels")
    if torch.version.cuda is None:
        reasons.append("torch is a CPU build")
    elif not torch.cuda.is_available():
        reasons.append("torch finds no CUDA device or driver")
    devices = []
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if built:
        problems = [(name, cuda_device_problem(index)) for index, name in enumerate(devices)]
        reasons += [f"{name}: {problem}" for name, problem in problems if problem]
    return {
        "built": built,
        "compiler": core.get("cuda_compiler"),
        "architectures": core.get("cuda_architectures", []),
        "runtime": _cuda_runtime() if built else None,
        "torch_cuda": torch.version.cuda,
        "driver": _driver(),
        "devices": devices,
        "usable": not reasons,
        "why_not": reasons,
    }


def _cuda_runtime() -> str:
    """What the core's own CUDA runtime finds, which may differ from torch's."""
    from specbranch_ext import _C

    return str(_C.cuda_runtime_report())


def _driver() -> str | None:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None


def _bundled_pair() -> dict[str, Any]:
    from specbranch import bundled

    folders = {name: Path(bundled.path(name)) for name in ("target", "draft")}
    for name, folder in folders.items():
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            if not (folder / file).is_file():
                raise FileNotFoundError(f"the bundled {name} lacks {file}")
    return {name: str(folder) for name, folder in folders.items()}


def _as_text(values: object) -> str:
    if isinstance(values, dict):
        return "\n".join(f"{key.replace('_', ' ')}: {_as_text(value)}" for key, value in values.items())
    if isinstance(values, list):
        return ", ".join(_as_text(value) for value in values) or "none"
    if values is None:
        return "-"
    if isinstance(values, bool):
        return "yes" if values else "no"
    return str(values)
