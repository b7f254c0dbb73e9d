"""Features of the target for a learned predictor, read while it verifies: no forward of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specbranch.core.errors import SpecBranchError
from specbranch.runtime.modes import inference

LAYERS = 4  # the last K layers; K = 4 in the paper

Forward = Callable[..., Any]


class FeatureTap:
    """Keeps what the target's last decoder layers give.

    A position's features are what those layers gave for the last verified token, and the embedding of the newest one:
    [(layers + 1) * hidden], float32.
    """

    def __init__(self, model: PreTrainedModel, layers: int = LAYERS) -> None:
        self.modules = decoder_layers(model)[-layers:]
        embeddings = model.get_input_embeddings()
        assert embeddings is not None
        self.embeddings: nn.Module = embeddings
        self._hidden: list[Tensor] = [torch.empty(0)] * len(self.modules)

    def keepers(self) -> Iterator[tuple[nn.Module, Callable[[Forward], Forward]]]:
        """The layers, each with what makes a forward of theirs one that keeps what it gives."""
        for place, module in enumerate(self.modules):
            yield module, partial(partial, self._keep, place)

    @property
    def newest(self) -> list[Tensor]:
        """What the layers gave in the newest forward, each [rows, hidden]; in a captured step, where it will lie."""
        return list(self._hidden)

    @inference
    def rows(self, rows: slice, tokens: list[int], hidden: list[Tensor] | None = None) -> Tensor:
        """Features at several rows of a forward, each with the token after it: [n, features]. hidden: of which forward;
        None for the newest."""
        hidden = self._hidden if hidden is None else hidden
        ids = torch.tensor(tokens, device=hidden[0].device)
        parts = [values[rows] for values in hidden]
        return torch.cat([*parts, self.embeddings(ids).to(parts[0].dtype)], dim=1).float()

    def _keep(self, place: int, forward: Forward, *args: Any, **kwargs: Any) -> Any:
        output: Tensor | tuple[Tensor, ...] = forward(*args, **kwargs)
        hidden = output if isinstance(output, Tensor) else output[0]
        self._hidden[place] = hidden[0]
        return output


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's list of decoder layers. Raises SpecBranchError when there is none of the configured length."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise SpecBranchError(f"{type(model).__name__} has no list of {count} decoder layers to read features from")
