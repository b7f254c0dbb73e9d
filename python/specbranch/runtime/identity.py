"""A loaded model's identity."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from specbranch.core.identity import ModelIdentity
from specbranch.runtime.packed import PackedEmbedding


def identify(model: PreTrainedModel) -> ModelIdentity:
    """Its directory's or hub's last name, and the fingerprint."""
    config = model.config.get_text_config()
    shape = [type(model).__name__, config.vocab_size, config.hidden_size, config.num_hidden_layers]
    digest = hashlib.sha256(json.dumps(shape).encode())
    embeddings = model.get_input_embeddings()
    assert embeddings is not None
    norms = [values for name, values in model.named_parameters() if values.dim() == 1 and "norm" in name]
    packed = isinstance(embeddings, PackedEmbedding)
    rows = embeddings(torch.arange(4)) if packed else next(embeddings.parameters())[:4]
    for weights in (rows[:, :64], *norms[-2:]):
        # bfloat16, so that a checkpoint is itself in whatever type it was loaded
        digest.update(weights.detach().cpu().to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    name = Path(getattr(model, "name_or_path", "") or type(model).__name__).name
    return ModelIdentity(name, digest.hexdigest()[:16])
