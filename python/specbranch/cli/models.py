"""What `doctor` finds out about a pair of models: from their configuration, and by trying them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from specbranch.cli.loading import load_pair, quiet_libraries
from specbranch.cli.messages import one_line
from specbranch.core.errors import SpecBranchError, SpecBranchWarning

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT = 8  # tokens, and as many new ones with each method


def configured(source: str, role: str, trust_remote_code: bool) -> tuple[str, str | None]:
    """Whether a model's steps can be captured in CUDA graphs, and why the model would be refused (None: it would not);
    by its configuration alone."""
    quiet_libraries()
    try:
        from specbranch.runtime.checkpoint import is_gguf
        from specbranch.runtime.graphs.probe import why_not_captured
        from specbranch.runtime.loading import without_weights
        from specbranch.runtime.support import check_supported

        model = without_weights(source, role, trust_remote_code)
        reason = why_not_captured(model)
    except Exception as error:
        reason = one_line(error)
        return f"eager: {reason}", reason if isinstance(error, SpecBranchError) else f"{role}: {reason}"
    captured = "can be captured" if reason is None else f"eager: {reason}"
    try:
        check_supported(model, role)
    except SpecBranchError as error:
        return captured, one_line(error)
    try:
        if is_gguf(source):
            raise SpecBranchError("weights of a GGUF file run on the CPU")
        check_supported(model, role, on="cuda")
    except SpecBranchError as error:
        return f"refused on CUDA: {one_line(error)}", None
    return captured, None


def fused(source: str, role: str, trust_remote_code: bool) -> dict[str, Any]:
    """How much of a model runs with fewer kernels, and how many a forward has; by its configuration alone."""
    import torch

    from specbranch.runtime.fused.report import fused_report, kernels_of_step
    from specbranch.runtime.loading import without_weights
    from specbranch.runtime.model import CachedModel
    from specbranch.runtime.support import meta_twin

    model = without_weights(source, role, trust_remote_code)
    twin = meta_twin(model, torch.bfloat16)  # mixtures of experts take nothing else there
    return {**fused_report(model), "kernels": kernels_of_step(CachedModel(twin, role))}


def loaded(target: str, draft: str | None, device: str, trust_remote_code: bool) -> dict[str, Any]:
    """Load and try what is named, as `generate` does. Raises SpecBranchError as that does."""
    from specbranch.runtime.fused.report import fused_report

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", SpecBranchWarning)
        engine = load_pair(target, draft, device=device, trust_remote_code=trust_remote_code)
        # The default method may find that a draft does not pay, and leave it alone.
        methods = ("autoregressive",) if draft is None else ("autoregressive", "speculative")
        prompt = [token % engine.pair.vocabulary for token in range(1, PROMPT + 1)]
        texts = [engine.generate(prompt, max_new_tokens=PROMPT, temperature=0, method=name) for name in methods]
    plain, last = texts[0], texts[-1]
    if plain.tokens != last.tokens and not last.stats.row_dependent:
        raise SpecBranchError(f"{methods[-1]} gave the tokens {last.tokens} instead of {plain.tokens}")
    ours = (each.message for each in said if isinstance(each.message, SpecBranchWarning))
    return {
        "device": device,
        "weights": [_weights(model) for model in engine.pair.models],
        "fused": [fused_report(model)["layers"] for model in engine.pair.models],
        "warnings": list(dict.fromkeys(map(str, ours))),
        "same_tokens": plain.tokens == last.tokens,
    }


def _weights(model: PreTrainedModel) -> str:
    """Their dtype, and the format of those that are packed."""
    from specbranch.runtime.packed import weight_format

    dtype, packed = str(model.dtype).removeprefix("torch."), weight_format(model)
    return f"{dtype} ({packed})" if packed else dtype
