"""pip's door to CMake: builds the torch-free `specbranch_ext._C` and `specbranch.core._planning`; the rest is in
pyproject.toml."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MODULES = ("specbranch_ext._C", "specbranch.core._planning")


class CMakeBuild(build_ext):
    """Configure and build with CMake and ninja, into the folders where setuptools expects the modules.

    Environment: SPECBRANCH_CUDA = auto (default), 1 (fail when it cannot be built) or 0;
    SPECBRANCH_CUDA_ARCHITECTURES, for example "80;90", or "all" of the release list; CMAKE_BUILD_PARALLEL_LEVEL;
    CMAKE_ARGS, more arguments for CMake, quoted as in a shell.
    """

    def build_extensions(self) -> None:
        """All at once: CMake knows what they share."""
        import pybind11

        more = cmake_args()
        core, planning = (Path(self.get_ext_fullpath(name)).resolve() for name in MODULES)
        # setuptools gives every editable install a new folder; a fixed one rebuilds only what changed.
        build_dir = (
            ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
            if self.editable_mode
            else Path(self.build_temp).resolve() / "cmake"
        )
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",  # an earlier build environment's is gone
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSPECBRANCH_MODULE_DIR={core.parent}",
            f"-DSPECBRANCH_PLANNING_DIR={planning.parent}",
            f"-DSPECBRANCH_CUDA={os.environ.get('SPECBRANCH_CUDA', 'auto')}",
            f"-DSPECBRANCH_CUDA_ARCHITECTURES={os.environ.get('SPECBRANCH_CUDA_ARCHITECTURES', '')}",
            # Only the tests use it. Beside the sources, because setuptools does not know of it.
            f"-DSPECBRANCH_EMULATED={'ON' if self.editable_mode else 'OFF'}",
            f"-DSPECBRANCH_EMULATED_DIR={ROOT / 'specbranch_ext'}",
            *more,
        ]
        subprocess.run(configure, check=True)
        targets = ["_C", "_planning", *(["_emulated"] if self.editable_mode else [])]
        subprocess.run(["cmake", "--build", str(build_dir), "--target", *targets], check=True)


def cmake_args() -> list[str]:
    """Those of the environment variable CMAKE_ARGS. Ends the build where it cannot be read."""
    value = os.environ.get("CMAKE_ARGS", "")
    try:
        return shlex.split(value)
    except ValueError as error:
        sys.exit(f"error: CMAKE_ARGS={value}: expected arguments quoted as in a shell: {error}")


setup(ext_modules=[Extension(name, sources=[]) for name in MODULES], cmdclass={"build_ext": CMakeBuild})
