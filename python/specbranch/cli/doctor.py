"""`specbranch doctor`: what is installed, what can run here, and why something cannot."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from textwrap import TextWrapper
from typing import Any

from specbranch.cli.arguments import MODEL, add_trust, device
from specbranch.cli.machine import describe_machine, describe_versions
from specbranch.cli.messages import FAILURE, one_line
from specbranch.cli.models import configured, fused, loaded
from specbranch.cli.terminal import output_width
from specbranch.core.extras import MissingPackageError, check_installed
from specbranch.runtime.choices import RETRIEVAL, draft_of

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
    if args.draft == RETRIEVAL:
        raise ValueError(f"--draft {RETRIEVAL} is no model that could be examined")
    draft, _ = draft_of(args.target, args.draft, "auto")
    findings = examine(args.target, draft, args.load, args.trust_remote_code)
    if args.json:
        print(json.dumps(findings, indent=1))
    else:
        print("\n".join(_lines(findings, output_width())))
    return 0 if findings["ready"] else FAILURE


def examine(
    target: str | None = None, draft: str | None = None, load: str | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Everything that `doctor` reports; a part that fails holds its error, and nothing is raised.

    target: None for the bundled pair. load: the device where they are loaded and tried, None for not at all.
    """
    missing = _missing()
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
    problems = [missing] * bool(missing)
    problems += [f"{part}: {findings[part]['error']}" for part in needed if "error" in findings[part]]
    for role, source in (("target", target), ("draft", draft)):
        if source is not None and not missing:
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


def _missing() -> str:
    """The first package that generating needs and that is not here, with the line that installs it; else nothing."""
    try:
        check_installed("specbranch generate", "cli")
    except MissingPackageError as error:
        return str(error)
    return ""


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
    devices, notes = [], []
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    for index, name in enumerate(devices) if built else ():
        if problem := cuda_device_problem(index):
            reasons.append(f"{name}: {problem}")
        elif note := ptx_note(core.get("cuda_architectures", []), *torch.cuda.get_device_capability(index)):
            notes.append(f"{name}: {note}")
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
        "notes": notes,
    }


def ptx_note(architectures: Sequence[str], major: int, minor: int) -> str:
    """What to know where a build has no machine code for a device of this compute capability; empty where it has.

    architectures: as CMake takes them: "80" is machine code, which runs on 8.x from 8.0 on, and PTX; "80-real" the
    former, "80-virtual" the latter.
    """
    compiled = [match for each in architectures if (match := re.fullmatch(r"(\d+)(\d)[af]?(-real)?", each))]
    if any(int(match[1]) == major and int(match[2]) <= minor for match in compiled):
        return ""
    return (
        f"its driver compiles the kernels from PTX ({', '.join(architectures)}) when they first run, and keeps them; a "
        f"build with SPECBRANCH_CUDA_ARCHITECTURES={major}{minor} has them for compute capability {major}.{minor}, one "
        "with =all for every release"
    )


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


def _lines(findings: dict[str, Any], width: int) -> Iterator[str]:
    """Sections on the left, what was found beside them; without rich, which may be what is missing."""
    indent = max(map(len, findings)) + 2
    for section, values in findings.items():
        label = section.replace("_", " ").ljust(indent)
        for line in _as_text(values).split("\n"):
            wrap = TextWrapper(max(width, 2 * indent), initial_indent=label, subsequent_indent=" " * (indent + 2))
            wrap.break_on_hyphens = False
            yield from wrap.wrap(line) or [label.rstrip()]
            label = " " * indent


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
