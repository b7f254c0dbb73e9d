"""The source distribution: all that its build reads, nothing that was built; and how CMAKE_ARGS is read.

`make artefacts` builds and installs it, and a wheel of it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READ_BY_THE_BUILD = (
    "CMakeLists.txt",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "cmake",
    "csrc",
    "pyproject.toml",
    "python",
    "setup.py",
    "specbranch_ext",
)


def tracked(*paths: str) -> list[str]:
    listed = subprocess.run(["git", "ls-files", *paths], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("needs a git checkout")
    return listed.stdout.split("\n")[:-1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The tracked files, as a fresh clone of what is here would have them."""
    folder = tmp_path / "checkout"
    for name in tracked(*READ_BY_THE_BUILD, "CHANGELOG.md"):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def sdist(checkout: Path, out: Path) -> Path:
    code = f"import setuptools.build_meta; print(setuptools.build_meta.build_sdist({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=True)
    return out / done.stdout.split()[-1]


def test_the_sdist_has_all_that_its_build_reads(checkout: Path, tmp_path: Path) -> None:
    built = [
        checkout / name
        for name in (
            "specbranch_ext/_C.so",
            "python/specbranch/core/_planning.so",
            "csrc/core/__pycache__/a.pyc",
            "python/specbranch/a.pyc",
        )
    ]
    for file in built:  # of an earlier build in the same folder
        file.parent.mkdir(exist_ok=True)
        file.touch()
    with tarfile.open(sdist(checkout, tmp_path)) as archive:
        names = {member.name.split("/", 1)[-1] for member in archive.getmembers() if member.isfile()}
    expected = set(tracked(*READ_BY_THE_BUILD))
    assert {"csrc/core/numerics.h", "csrc/sampling/cuda/verify.cu", "specbranch_ext/py.typed"} <= expected
    assert sorted(expected - names) == []
    made = {"PKG-INFO", "setup.cfg", "CHANGELOG.md"}
    assert sorted(name for name in names - expected - made if not name.startswith("specbranch.egg-info/")) == []


def test_import_without_the_compiled_module_says_what_to_do(tmp_path: Path) -> None:
    left_out = shutil.ignore_patterns("*.so", "__pycache__", "bundled")
    shutil.copytree(ROOT / "python/specbranch", tmp_path / "specbranch", ignore=left_out)
    # An editable install's finder would still find the compiled module of the installed package.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]; import specbranch.loop"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "ImportError: specbranch was imported without its compiled module `specbranch.core._planning`" in done.stderr
    assert "pip install -e ." in done.stderr


# ---- CMAKE_ARGS


def configure(checkout: Path, tmp_path: Path, arguments: str) -> tuple[list[str], str]:
    """What CMake is given for CMAKE_ARGS, one argument an entry, and what the build says."""
    pytest.importorskip("pybind11")
    noted, bin = tmp_path / "arguments", tmp_path / "bin"
    bin.mkdir()
    (bin / "cmake").write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {noted}\nexit 1\n")
    (bin / "cmake").chmod(0o755)
    environment = os.environ | {"PATH": f"{bin}:{os.environ['PATH']}", "CMAKE_ARGS": arguments}
    command = [sys.executable, "setup.py", "-q", "build_ext"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    return noted.read_text().split("\n")[:-1] if noted.exists() else [], done.stderr


def test_cmake_args_are_quoted_as_in_a_shell(checkout: Path, tmp_path: Path) -> None:
    arguments = "-DCMAKE_CXX_FLAGS=\"-O2 -g0\" '-DA=b c'  -DB=d\\ e -DC="
    given, _ = configure(checkout, tmp_path, arguments)
    assert given[-4:] == ["-DCMAKE_CXX_FLAGS=-O2 -g0", "-DA=b c", "-DB=d e", "-DC="]


@pytest.mark.parametrize("arguments", ['-DCMAKE_CXX_FLAGS="-O2', "-DA='b", "-DA=b\\"])
def test_cmake_args_that_cannot_be_read_are_refused_by_name(checkout: Path, tmp_path: Path, arguments: str) -> None:
    given, said = configure(checkout, tmp_path, arguments)
    assert given == []
    assert f"error: CMAKE_ARGS={arguments}: expected arguments quoted as in a shell: No " in said
    assert "Traceback" not in said
