"""`pytest -m cuda` selects what needs a GPU: collected in a process that believes it has one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import sanitize  # noqa: E402

COLLECT = """
import functools, inspect, json, sys
import pytest, torch
import specbranch_ext

torch.cuda.is_available = lambda: True
info = {**specbranch_ext.build_info(), "cuda": True}
specbranch_ext.build_info = lambda: info
source = functools.cache(inspect.getsource)

class Report:
    left_out = []

    def pytest_deselected(self, items):
        self.left_out += items

    def pytest_collection_finish(self, session):
        found = [
            {
                "id": item.nodeid,
                "selected": item not in self.left_out,
                "marked": item.get_closest_marker("cuda") is not None,
                "skips": [str(mark.kwargs.get("reason")) for mark in item.iter_markers("skipif")],
                # What only the emulator has: a count of launches, for example.
                "emulator": any(
                    mark.args == ("implementation", ["emulated"]) for mark in item.iter_markers("parametrize")
                ),
                "source": source(item.function),
            }
            for item in [*session.items, *self.left_out]
        ]
        print("\\n" + json.dumps(found))

sys.exit(pytest.main(["-qq", "--collect-only", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[Report()]))
"""

Item = dict[str, Any]


@pytest.fixture(scope="module")
def items() -> list[Item]:
    """Every test there is with a GPU; "selected" where a sanitizer is not too slow for it."""
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, "-k", sanitize.NOT_SLOW, "tests"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    found: list[Item] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[{")))
    return found


def runs_on(item: Item, implementation: str) -> bool:
    parameters = item["id"].partition("[")[2].rstrip("]")
    return implementation in parameters.split("-")


def needs_a_gpu(item: Item) -> bool:
    return (
        runs_on(item, "cuda")
        or item["id"].startswith("tests/runtime/test_cuda.py")
        or ".cuda()" in item["source"]
        or any("GPU" in reason for reason in item["skips"])
    )


def test_the_marker_is_on_all_that_needs_a_gpu_and_on_nothing_else(items: list[Item]) -> None:
    marked = [item["id"] for item in items if item["marked"]]
    assert set(marked) == {item["id"] for item in items if needs_a_gpu(item)}
    assert len(set(marked)) == len(marked)


def test_the_tests_of_the_ops_and_of_decoding_carry_it(items: list[Item]) -> None:
    marked = {item["id"] for item in items if item["marked"]}
    assert {id.partition("::")[0] for id in marked} == {
        *sanitize.TESTS,
        *("tests/ops/test_exhaustive.py", "tests/runtime/test_cuda.py", "tests/runtime/test_capturable.py"),
    }
    assert (
        "tests/runtime/test_capturable.py::test_on_a_gpu_steps_are_captured_unless_they_cannot_be_or_must_not" in marked
    )


def test_a_device_is_asked_what_the_emulated_kernels_are(items: list[Item]) -> None:
    """Under a sanitizer too."""
    of_ops = [item for item in items if item["id"].startswith(tuple(f"{file}::" for file in sanitize.TESTS))]
    for chosen in (of_ops, [item for item in of_ops if item["selected"]]):
        on = {
            name: [item["id"].replace(name, "") for item in chosen if runs_on(item, name) and not item["emulator"]]
            for name in ("cuda", "emulated")
        }
        assert len(on["cuda"]) > 100
        assert sorted(on["cuda"]) == sorted(on["emulated"])
        assert len(on["cuda"]) == sum(item["marked"] for item in chosen if runs_on(item, "cuda"))
