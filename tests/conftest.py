"""Shared by the tests: no network, quiet transformers, the bundled pair loaded once, and long versions by night."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two threads on matrices of 128 x 192 wait for each other more than they compute. Tests of threads set their number;
# the processes that tests start inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import implementations
import pytest
import torch
from gguf_files import write_pair
from transformers.utils import logging

from specbranch import SpecBranch

# A shell starts background jobs with SIGINT ignored; the tests of Ctrl-C need it, here and in the processes they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

logging.set_verbosity_error()
logging.disable_progress_bar()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The marker alone says that a test needs a GPU: `-m cuda` selects all of them, and nothing else skips them."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


# ---- Long versions: the marker `nightly`, which `pytest --nightly` and any -m that names it run

LEFT: pytest.StashKey[list[str]] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="run the long versions as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--nightly") or "nightly" in config.getoption("markexpr"):
        return
    left = [item for item in items if item.get_closest_marker("nightly")]
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=left)
    config.stash[LEFT] = [item.nodeid for item in left]


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # under pytest-xdist the workers collect, and another process reports
        session.config.workeroutput["left"] = session.config.stash.get(LEFT, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    if left := getattr(node, "workeroutput", {}).get("left"):  # the same from each
        node.config.stash[LEFT] = left


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if left := config.stash.get(LEFT, []):
        tests = Counter(name.partition("[")[0].removeprefix("tests/") for name in left)
        names = ", ".join(f"{name} ({count})" for name, count in tests.items())
        terminalreporter.write_line(f"left to `make nightly`: {len(left)} cases of {names}")


@pytest.fixture(scope="session")
def bundled_pair() -> SpecBranch:
    """The bundled target and draft in float32. The draft reads every prompt, whether or not that pays here."""
    return SpecBranch.from_pretrained("bundled", draft="bundled", dtype="float32", draft_context="all")


@pytest.fixture(scope="session")
def gguf_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with target.gguf and draft.gguf, and the checkpoints target and draft: see write_pair."""
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder)
    return folder


@pytest.fixture(scope="module", params=implementations.NAMES)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test of a module that uses it runs on the CPU kernels, the emulated CUDA kernels and, if there is a device,
    the CUDA kernels."""
    yield from implementations.use(request.param)
