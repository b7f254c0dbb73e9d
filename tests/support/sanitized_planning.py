"""A plugin for pytest: specbranch.core._planning as scripts/sanitize.py has built it, in place of the installed one."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import specbranch.core

NAME = "specbranch.core._planning"
(file,) = Path(os.environ["SPECBRANCH_PLANNING_MODULE"]).glob("_planning*.so")
spec = importlib.util.spec_from_file_location(NAME, file)
assert spec is not None
assert spec.loader is not None
sys.modules[NAME] = specbranch.core._planning = importlib.util.module_from_spec(spec)
spec.loader.exec_module(specbranch.core._planning)
