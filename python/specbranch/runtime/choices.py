"""What can be chosen by name when a pair is loaded. Imports nothing, so that `specbranch --help` is quick."""

from typing import Any

DTYPES = ("auto", "bfloat16", "float16", "float32")  # of weights; auto: as the checkpoint stores them
PRIORITIES = ("target", "draft", "none")  # the model whose work goes first where both share a GPU
ROUNDS = "rounds.safetensors"  # what a predictor was trained on, in its directory
WEIGHTS = ("auto", "keep", "lossless", "int8", "int4")  # how a loaded checkpoint's weights are kept
CACHE_TOKENS = 4096  # of a text, where there is to be room for several that come one by one
SELF = "self"  # as a draft: the target once more
RETRIEVAL = "retrieval"  # as a draft: none, but what followed the same tokens before
ARITHMETICS = ("exact", "fast")  # of products over blocks of weights: over their values, or with activations in 8 bits
ARITHMETIC_OF = {"target": "exact", "draft": "fast"}  # where none is chosen


def draft_of(target: Any, draft: Any, weights: str) -> tuple[Any, str]:
    """The draft that is meant, and how its weights are kept: of the target's own in 4 bits where nothing else is said;
    a file's blocks may have no more already."""
    if draft != SELF:
        return draft, weights
    return target, "int4" if weights == "auto" and not str(target).lower().endswith(".gguf") else weights
