"""Who may import whom: the storeys of python/specbranch, read from the source and from what an import loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "python"
# From below: a room imports only from rooms before it.
STOREYS = [
    "core", "stages", "constrained", "bundled", "text", "corpus",
    "policies", "runtime", "drafters", "together", "decoding", "loop",
    "request", "door", "job", "decoder", "scheduler", "several", "engine", "once", "proposer", "integrations", "serve",
    "replay", "cli",
]  # fmt: skip
HEAVY = {"torch", "transformers", "specbranch_ext"}
NEVER = {  # modules, and what they and those in them never import
    "specbranch.core": {*HEAVY, "numpy"},
    "specbranch.stages": {*HEAVY, "numpy"},
    "specbranch.constrained": {*HEAVY, "numpy"},
    "specbranch.policies": {*HEAVY, "specbranch.runtime"},
    "specbranch.loop": {*HEAVY, "numpy", "specbranch.runtime", "specbranch.drafters", "specbranch.together"},
    "specbranch.decoding": {*HEAVY, "numpy", "specbranch.runtime", "specbranch.drafters", "specbranch.together"},
    "specbranch.replay.replayer": {"specbranch.runtime", "specbranch.drafters.model", "specbranch.engine"},
    "specbranch.replay.virtual_time": {*HEAVY, "numpy", "specbranch.runtime"},
    "specbranch.runtime": {"specbranch.policies"},
    "specbranch.cli.bench.vllm_worker": {*HEAVY, "numpy", "specbranch"},  # another Python runs it
}


def imports() -> Iterator[tuple[str, str]]:
    """Every import of the package: who, and what. `from specbranch import x` counts as the module x, if it is one."""
    for file in ROOT.glob("specbranch/**/*.py"):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((module, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield from ((module, f"{node.module}.{alias.name}") for alias in node.names)


def is_in(module: str, prefix: str) -> bool:
    return f"{module}.".startswith(f"{prefix}.")


def test_the_nevers() -> None:
    found = list(imports())
    for room, never in NEVER.items():
        assert any(is_in(module, room) for module, _ in found), f"there is no {room}"
        bad = [(a, b) for a, b in found if is_in(a, room) and any(is_in(b, prefix) for prefix in never)]
        assert not bad, room


def test_no_import_points_upward() -> None:
    height = {f"specbranch.{room}": i for i, room in enumerate(STOREYS)}

    def storey(module: str) -> int | None:
        return height.get(".".join(module.split(".")[:2]))

    rooms = {path.stem for path in (ROOT / "specbranch").iterdir() if path.suffix in ("", ".py")}
    assert rooms - {"__init__", "__main__", "__pycache__"} == set(STOREYS)
    arrows = [(a, b, storey(a), storey(b)) for a, b in imports()]
    known = [(a, b, below, above) for a, b, below, above in arrows if below is not None and above is not None]
    assert len(known) > 100
    assert [(a, b) for a, b, here, there in known if there > here] == []


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("specbranch.core.stats", ("numpy", "torch", "transformers")),
        ("specbranch.loop", ("numpy", "torch", "transformers")),
        ("specbranch.policies.methods", ("torch", "transformers")),
        ("specbranch", ("torch", "transformers")),
        ("specbranch_ext", ("transformers", "specbranch")),
        ("specbranch_ext.integrations.transformers", ("specbranch",)),
    ],
)
def test_what_an_import_loads(module: str, never: tuple[str, ...]) -> None:
    script = f"import sys, {module}; sys.exit(', '.join({{*{never}}} & {{*sys.modules}}) or 0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
