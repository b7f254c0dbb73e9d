"""`specbranch bench`: methods and transformers' own generation, on the same prompts."""

from specbranch.cli.bench.command import HELP, OUTPUTS, add_arguments, run

__all__ = ["HELP", "OUTPUTS", "add_arguments", "run"]
