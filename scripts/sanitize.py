"""Run the tests of the ops on the emulated CUDA kernels, and those of the speculation tree and of look-ups in texts,
built with the address and undefined-behaviour sanitizers.

    python scripts/sanitize.py [--build-dir build/sanitize] [PYTEST ARGUMENTS]

Every kernel runs, in a selection of cases that takes a few minutes with the build; a path among the arguments replaces
the list of files, and leaves out the others. Only with g++ on Linux: Python itself is not built with the sanitizers, so
their runtimes are loaded first.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

TESTS = [
    f"tests/ops/{path.name}"
    for path in sorted((ROOT / "tests/ops").glob("test_*.py"))
    if 'usefixtures("implementation")' in path.read_text() and path.name != "test_exhaustive.py"
]
"""What runs on every implementation of the ops. The exhaustive tests take too long here, and on a rented GPU."""

PLANNING = [
    "tests/loop/test_compiled_tree.py",
    "tests/loop/test_compiled_calibration.py",
    "tests/loop/test_proposal_rows.py",
    "tests/loop/test_tree.py",
    "tests/loop/test_calibration.py",
    "tests/loop/test_suffix_index.py",
]
"""What runs on the compiled tree, calibration and look-ups in texts."""

# What takes long under a sanitizer and runs next to no line that the rest does not: left to the ordinary run.
SLOW = [
    "16403 or 8193 or 20000 or (1001 and float16)",  # sizes
    "(group_ratios and 100) or (prompt_chunk and not 700) or 1040 or 1500 or several or 1024_rows",
    "(hidden_row and not nan) or (random and test_verify)",  # the same again with other values
    "one_by_one and (scale or float16)",  # another factor, and another type of two bytes
    "first_candidate or layout_and_threads or (peaked and not 3000) or masked or padded_vocabulary",
    "(rejection and ties) or every_outcome or long_chain or cannot_have_drawn or coin_near_0",
    "opcheck or compile or registration or baseline",  # Python
]
NOT_SLOW = f"not ({' or '.join(SLOW)})"
"""For pytest's -k, on the emulated kernels here and on a device under compute-sanitizer (with -m cuda)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build-dir", type=Path, default=ROOT / "build" / "sanitize")
    arguments, rest = parser.parse_known_args()

    import pybind11

    build_dir = arguments.build_dir.resolve()
    for command in (
        [
            *("cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", "-DSPECBRANCH_CUDA=0"),
            *("-DSPECBRANCH_EMULATED=ON", "-DSPECBRANCH_SANITIZE=ON", f"-DSPECBRANCH_EMULATED_DIR={build_dir}"),
            *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
        ],
        ["cmake", "--build", str(build_dir), "--target", "_emulated", "_planning"],
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            print(done.stdout)
            return 1
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own are not ours
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "SPECBRANCH_EMULATED_MODULE": str(build_dir),
        "SPECBRANCH_PLANNING_MODULE": str(build_dir),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")]),
    }
    chosen = any(Path(ROOT, argument.partition("::")[0]).exists() for argument in rest)
    if not chosen:
        options = ["-q", "--capture=sys", "-p", "no:cacheprovider", "-p", "sanitized_planning"]
        status = subprocess.run([sys.executable, "-m", "pytest", *options, *PLANNING], cwd=ROOT, env=environment)
        if status.returncode != 0:
            return status.returncode
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n",
        os.environ.get("WORKERS", "2"),
        "--dist",
        "worksteal",
        "--capture=sys",
        "-p",
        "no:cacheprovider",
        "-k",
        f"emulated and {NOT_SLOW}",
        *rest,
        *([] if chosen else TESTS),
    ]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
