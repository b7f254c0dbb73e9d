"""`specbranch bench`: our methods and transformers' own, on the same prompts."""

from specbranch.cli.bench.bench import run

__all__ = ["run"]
