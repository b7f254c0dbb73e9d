"""Doors into other people's engines."""

from __future__ import annotations

from specbranch.core.extras import check_installed

check_installed("specbranch.integrations", "transformers")
