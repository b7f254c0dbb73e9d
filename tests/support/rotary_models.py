"""Tiny models whose rotary embeddings choose by the length of the text, and others."""

from typing import Any

from families import family_config, family_model
from transformers import PreTrainedModel

SWITCH = 24  # the longest text before it
PRETRAINED = {"original_max_position_embeddings": SWITCH}
SHORT, LONG = [1.0 + 0.05 * i for i in range(4)], [1.0 + 2.0 * i for i in range(4)]

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, **PRETRAINED},
    "longrope": {"factor": 4.0, "short_factor": SHORT, "long_factor": LONG, **PRETRAINED},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **PRETRAINED},
    "proportional": {"partial_rotary_factor": 0.5},
}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **KINDS[kind], **more}


def model_with(family: str, parameters: dict[str, Any], **more: Any) -> PreTrainedModel:
    kinds = {
        parameters.get("rope_type"),
        *(each["rope_type"] for each in parameters.values() if isinstance(each, dict)),
    }
    context = SWITCH if "dynamic" in kinds else 4 * SWITCH  # where dynamic NTK scaling begins
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "sliding_window": None, "max_position_embeddings": context}
    return family_model(family_config(family, **{**sizes, "rope_parameters": parameters, **more}))


def phi(family: str = "phi3", **more: Any) -> PreTrainedModel:
    """One that reads the text anew at the switch."""
    scales = {"short_mscale": 1.1, "long_mscale": 1.3} if family == "phimoe" else {}
    return model_with(family, rope("longrope", **scales, **more), original_max_position_embeddings=SWITCH)
