"""Shared by the tests: no network, quiet transformers, and the bundled pair loaded once."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from transformers.utils import logging

from specbranch import SpecBranch

logging.set_verbosity_error()
logging.disable_progress_bar()


@pytest.fixture(scope="session")
def bundled_pair() -> SpecBranch:
    """The bundled target and draft in float32."""
    return SpecBranch.from_pretrained("bundled", draft="bundled", dtype="float32")
