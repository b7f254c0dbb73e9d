"""Build the source distribution and a wheel of it, and install both into environments of their own.

    python scripts/check_artefacts.py [--out dist]

Nothing is downloaded: the tools of this environment build them, and the fresh ones see its torch and numpy by links,
and where an extra is wanted its packages. The wheel runs the ops without transformers, says what is missing, and with
the extra `cli` generates from the bundled pair. The archive is installed by pip as it is, for a processor without
instruction-set levels, which takes a third of the time. Status 1 where anything fails.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPS = """
import sys, torch, specbranch_ext, specbranch
from specbranch_ext import reference
logits, given = torch.randn(5, 300), dict(seed=3, temperature=0.8, top_k=0, top_p=0.9, min_p=0.0)
parents, positions = torch.tensor([-1, 0, 1, 1, 0]), torch.arange(5)
ours = specbranch_ext.draft_sample(logits, positions, 4, **given)
theirs = reference.draft_sample(logits, positions, 4, **given)
assert torch.equal(ours.tokens, theirs.tokens), (ours, theirs)
assert torch.equal(specbranch_ext.ancestor_mask(parents).depths, torch.tensor([0, 1, 2, 2, 1]))
assert "transformers" not in sys.modules
from specbranch.core import _planning
print(specbranch_ext.__file__, specbranch_ext._C.__file__, specbranch.__file__, _planning.__file__, sep="\\n")
"""
GENERATE = ["generate", "--target", "bundled", "--draft", "bundled", "--prompt", "def f(", "--max-new-tokens", "8"]
NEEDS = "specbranch: error: specbranch generate needs transformers: pip install 'specbranch[cli]'\n"
# A processor that CMake knows nothing of: baseline kernels only.
PLAIN = "-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=plain"


def closure(names: list[str]) -> list[str]:
    """Installed distributions and what they need, without extras."""
    found: dict[str, None] = {}
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        try:
            needs = distribution(name).requires or []
        except PackageNotFoundError:  # of another system
            continue
        if name not in found:
            found[name] = None
            names += [match[0] for need in needs if "extra ==" not in need and (match := re.match(r"[\w.-]+", need))]
    return [*found]


def link(names: list[str], folder: Path) -> None:
    """Links in `folder` to all that these distributions have in site-packages."""
    folder.mkdir(exist_ok=True)
    for name in names:
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(installed.locate_file(top))))


class Environment:
    """A fresh virtual environment that sees the packages of some folders."""

    def __init__(self, home: Path, *folders: Path) -> None:
        venv.create(home, with_pip=True)
        self.bin = home / "bin"
        pip = [
            str(self.bin / "python"),
            "-m",
            "pip",
            "uninstall",
            "-q",
            "-y",
            "setuptools",
        ]  # Python 3.11 brings an old one
        subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)
        (self.packages,) = home.glob("lib/python*/site-packages")
        self.see(*folders)
        self.variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.variables |= {"SPECBRANCH_CUDA": "0", "HF_HUB_OFFLINE": "1"}

    def see(self, *folders: Path) -> None:
        (self.packages / "others.pth").write_text("".join(f"{folder}\n" for folder in folders))

    def install(self, *what: str, **variables: str) -> None:
        """From what is there: pip finds the dependencies that were declared, or fails."""
        pip = [str(self.bin / "python"), "-m", "pip", "install", "-q", "--no-index", "--no-build-isolation"]
        subprocess.run([*pip, *what], env=self.variables | variables, cwd=self.bin, check=True)

    def run(self, *command: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        """In a folder where there is no source."""
        done = subprocess.run(
            [self.bin / command[0], *command[1:]], env=self.variables, cwd=self.bin, capture_output=True, text=True
        )
        check(
            done.returncode == status, f"{' '.join(command[:2])}: status {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done

    def ops(self) -> None:
        homes = self.run("python", "-c", OPS).stdout.split()
        check(all(Path(home).is_relative_to(self.packages) for home in homes), f"imported from {homes}")


def check(fine: bool, otherwise: str) -> None:
    if not fine:
        sys.exit(f"error: {otherwise}")


def look_into(wheel: Path) -> None:
    """What a wheel holds, and what not; its version is pyproject.toml's."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    typed = ("specbranch_ext/_C.pyi", "specbranch/core/_planning.pyi")
    for name in ("specbranch_ext/py.typed", "specbranch/py.typed", "specbranch/__main__.py", *typed):
        check(name in names, f"{wheel.name} lacks {name}")
    stray = [name for name in names if "_emulated" in name or name.split("/")[0] in ("csrc", "tests", "benchmarks")]
    check(not stray, f"{wheel.name} has {stray}")
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    check(declared is not None and f"\nVersion: {declared[1]}\n" in metadata, f"{wheel.name} has another version")
    needs = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.M)
    check(needs == ["torch", "numpy"], f"{wheel.name} needs {needs}; expected torch and numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the two are kept (default: nowhere)")
    out: Path | None = parser.parse_args().out
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        dist = (out or work / "dist").resolve()
        tools = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # cmake and ninja
        build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(ROOT)]
        subprocess.run(build, env={**os.environ, **tools, "SPECBRANCH_CUDA": "0"}, cwd=work, check=True)
        archive, wheel = (max(dist.glob(each), key=os.path.getmtime) for each in ("*.tar.gz", "*.whl"))
        look_into(wheel)

        base, more, building = work / "base", work / "more", work / "building"
        link(closure(["torch", "numpy"]), base)
        link(closure(["transformers", "safetensors", "tokenizers", "gguf", "rich"]), more)
        link(closure(["setuptools", "pybind11"]), building)

        clean = Environment(work / "wheel", base)
        clean.install(str(wheel))
        clean.ops()
        check(clean.run("specbranch", *GENERATE, status=1).stderr == NEEDS, "what is missing is not named")
        check(clean.run("specbranch", "--version").stdout.split()[-1] in wheel.name, "another version")
        clean.see(base, more)
        clean.install(f"specbranch[cli] @ {wheel.as_uri()}")
        check(bool(clean.run("specbranch", *GENERATE).stdout.strip()), "no text")
        clean.run("python", "-m", "specbranch", *GENERATE)
        print(f"{wheel.name}: ops, and with the extra cli text ({version('torch')}, {version('transformers')})")

        source = Environment(work / "source", base, building)
        source.install(str(archive), CMAKE_ARGS=PLAIN, **tools)
        source.ops()
        print(f"{archive.name}: installed by pip; ops")


if __name__ == "__main__":
    main()
