"""Build the CUDA kernels for every architecture of the release list, and fail when one spills.

    python scripts/cuda_gate.py [--build-dir build/cuda-gate] [--jobs N]

Prints what each kernel needs on each architecture (registers, shared memory, stack frame, spills, as ptxas says), links
the module, and imports it, which must work without a device. Status 1 for a spill, a stack frame or a failed step.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def release_architectures() -> tuple[str, ...]:
    """The list that the build itself uses for "all"."""
    text = (ROOT / "cmake" / "cuda.cmake").read_text()
    found = re.search(r"set\(SPECBRANCH_CUDA_RELEASE_ARCHITECTURES ([\d ]+)\)", text)
    assert found, "cmake/cuda.cmake names no release architectures"
    return tuple(found[1].split())


ARCHITECTURES = release_architectures()


@dataclass(frozen=True)
class Needs:
    """What one kernel needs on one architecture, in registers and bytes."""

    registers: int
    shared: int
    stack: int
    spills: int

    @property
    def clean(self) -> bool:
        return self.stack == 0 and self.spills == 0


def parse(log: str) -> dict[str, dict[str, Needs]]:
    """From ptxas -v output to {mangled kernel: {architecture: Needs}}."""
    found: dict[str, dict[str, Needs]] = defaultdict(dict)
    kernel = architecture = ""
    stack = spills = 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for 'sm_(\d+)\w?'", line):
            kernel, architecture = match.groups()
            stack = spills = 0
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            frame, stores, loads = map(int, match.groups())
            stack, spills = max(stack, frame), max(spills, stores + loads)
        elif (match := re.search(r"Used (\d+) registers", line)) and kernel:
            shared = re.search(r"(\d+) bytes smem", line)
            found[kernel][architecture] = Needs(int(match[1]), int(shared[1]) if shared else 0, stack, spills)
            kernel = ""
    return found


def demangle(names: list[str]) -> list[str]:
    output = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    readable = []
    for name in output.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|specbranch::(cuda::)?|\(int\)|\(bool\)|^void ", "", name)
        readable.append(re.sub(r"\(.*", "", name))
    return readable


def report(found: dict[str, dict[str, Needs]]) -> bool:
    """Print the table; whether all is clean and nothing is missing."""
    clean = bool(found)
    names = dict(zip(found, demangle(list(found)), strict=True))
    width = max(map(len, names.values()), default=0)
    print(f"{'registers':{width}}" + "".join(f"{architecture:>9}" for architecture in ARCHITECTURES))
    for kernel in sorted(found, key=names.__getitem__):
        cells = []
        for architecture in ARCHITECTURES:
            needs = found[kernel].get(architecture)
            if needs is None:
                cells.append("missing")
                clean = False
            elif needs.clean:
                cells.append(f"{needs.registers}")
            else:
                cells.append(f"{needs.registers}!")
                clean = False
        print(f"{names[kernel]:{width}}" + "".join(f"{cell:>9}" for cell in cells))
    for kernel, by_architecture in found.items():
        for architecture, needs in by_architecture.items():
            if not needs.clean:
                print(
                    f"sm_{architecture} {names[kernel]}: {needs.stack} bytes of stack, {needs.spills} bytes of spills"
                )
    return clean


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build-dir", type=Path, default=ROOT / "build" / "cuda-gate")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()

    import pybind11

    build_dir = arguments.build_dir.resolve()
    start = time.monotonic()
    subprocess.run(
        [
            *("cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", "-DSPECBRANCH_CUDA=1", "--fresh"),
            *("-DSPECBRANCH_CUDA_ARCHITECTURES=all", f"-DPython_EXECUTABLE={sys.executable}"),
            *(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DSPECBRANCH_MODULE_DIR={build_dir}"),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    # ptxas speaks only when it runs: the objects are built anew.
    subprocess.run(["cmake", "--build", str(build_dir), "--target", "clean"], check=True, stdout=subprocess.DEVNULL)
    build = subprocess.run(
        ["cmake", "--build", str(build_dir), "--target", "_C", "-j", str(arguments.jobs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if build.returncode != 0:
        print(build.stdout)
        return 1
    clean = report(parse(build.stdout))

    check = "import torch, _C; print(_C.build_info()['cuda_architectures'], '-', _C.cuda_runtime_report())"
    imported = subprocess.run([sys.executable, "-c", check], cwd=build_dir)
    print(f"{time.monotonic() - start:.0f} s")
    return 0 if clean and imported.returncode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
