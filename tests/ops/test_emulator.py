"""The emulator's own tests (tests/cpp): kernels that are right on every schedule, and mistakes that must be found."""

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "cpp"


@pytest.mark.parametrize("sanitize", ["OFF", "ON"])
def test_emulator(sanitize, tmp_path):
    for tool in ("cmake", "ctest"):
        assert shutil.which(tool), f"{tool} is missing: pip install -e '.[dev]'"
    for command in (
        ["cmake", "-S", str(SOURCE), "-B", ".", "-G", "Ninja", f"-DSANITIZE={sanitize}", "-DCMAKE_BUILD_TYPE=Release"],
        ["cmake", "--build", ".", "--parallel", "2"],
        ["ctest", "--output-on-failure"],
    ):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
