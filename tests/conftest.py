"""Shared by the tests: no network, quiet transformers, and the bundled pair loaded once."""

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Iterator

import implementations
import pytest
import torch
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


@pytest.fixture(scope="session")
def bundled_pair() -> SpecBranch:
    """The bundled target and draft in float32."""
    return SpecBranch.from_pretrained("bundled", draft="bundled", dtype="float32")


@pytest.fixture(scope="module", params=implementations.NAMES)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test of a module that uses it runs on the CPU kernels, the emulated CUDA kernels and, if there is a device,
    the CUDA kernels."""
    yield from implementations.use(request.param)
