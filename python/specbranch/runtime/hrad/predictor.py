"""H-RAD, the hybrid rollback-aware draft of SpecBranch (arXiv 2506.01979): how much of the trunk will be accepted.

A small network on the target's features at the last verified token. It is trained for one pair (replay/train_hrad.py).
"""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from specbranch.core.errors import SpecBranchError
from specbranch.core.identity import ModelIdentity
from specbranch.core.messages import FORECASTS, Forecast
from specbranch.runtime.hrad.tap import FeatureTap
from specbranch.runtime.identity import identify

FORMAT = "specbranch-hrad-1"
WIDTHS = (256, 64)
DROPOUT = 0.3
CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class HRadConfig:
    """target, draft: the pair it is for. features: inputs of the network. length: tokens that "all" means.

    metrics: what training printed.
    """

    target: ModelIdentity
    draft: ModelIdentity
    features: int
    length: int
    metrics: dict[str, Any] = field(default_factory=dict)


class HRad(nn.Module):
    """The predictor: standardised features, two hidden layers, three classes."""

    mean: Tensor
    scale: Tensor

    def __init__(self, config: HRadConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.zeros(config.features))
        self.register_buffer("scale", torch.ones(config.features))
        sizes = (config.features, *WIDTHS)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Dropout(DROPOUT), nn.Linear(inputs, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(WIDTHS[-1], len(FORECASTS)))
        self.eval()

    def forward(self, features: Tensor) -> Tensor:
        """Features [n, F] to logits [n, 3]."""
        logits: Tensor = self.layers((features.float() - self.mean) * self.scale)
        return logits

    @torch.inference_mode()
    def predict(self, features: Tensor) -> Forecast:
        """The forecast after one verdict; features [F]."""
        return Forecast(*self(features[None].to(self.mean.device))[0].softmax(0).tolist())

    def with_metrics(self, metrics: dict[str, Any]) -> HRad:
        """This predictor, with what its training printed in its configuration."""
        self.config = replace(self.config, metrics=metrics)
        return self

    def save(self, directory: Path) -> None:
        """Write the configuration and the weights; the weights come last, so that half a save cannot be loaded."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / WEIGHTS).unlink(missing_ok=True)
        config = {"format": FORMAT, **asdict(self.config)}
        (directory / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        partial = directory / f"{WEIGHTS}.part"
        save_file({name: values.contiguous() for name, values in self.state_dict().items()}, partial)
        partial.replace(directory / WEIGHTS)


@dataclass(frozen=True)
class Predictor:
    """A network and where its features come from."""

    tap: FeatureTap
    network: HRad

    def after(self, row: int, token: int, hidden: list[Tensor]) -> Forecast:
        """The forecast when a forward of the target, which gave `hidden`, is accepted up to `row` and `token` comes
        next."""
        return self.network.predict(self.tap.rows(slice(row, row + 1), [token], hidden)[0])


def load_hrad(directory: str | Path, target: PreTrainedModel, draft: PreTrainedModel) -> HRad:
    """Read a predictor that was trained for this pair.

    Raises SpecBranchError for a missing, truncated or foreign file, and for a predictor of another pair.
    """
    directory = Path(directory)
    config = _read_config(directory)
    for role, trained, model in (("target", config.target, target), ("draft", config.draft, draft)):
        found = identify(model)
        if found.fingerprint != trained.fingerprint:
            raise SpecBranchError(
                f"{directory}: this predictor was trained for the {role} {trained.name} ({trained.fingerprint}); "
                f"the {role} here is {found.name} ({found.fingerprint})"
            )
    hrad = HRad(config)
    try:
        hrad.load_state_dict(load_file(directory / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise SpecBranchError(f"{directory / WEIGHTS}: not the weights of a predictor: {error}") from error
    return hrad


def _read_config(directory: Path) -> HRadConfig:
    path = directory / CONFIG
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(read, dict) or read.pop("format", None) != FORMAT:
            raise SpecBranchError(f"{path}: expected a predictor of the format {FORMAT}")
        target, draft = ModelIdentity(**read.pop("target")), ModelIdentity(**read.pop("draft"))
        return HRadConfig(target=target, draft=draft, **read)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecBranchError(f"{path}: not a readable configuration of a predictor: {error}") from error
