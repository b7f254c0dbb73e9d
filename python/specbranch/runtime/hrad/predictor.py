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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from specbranch.core.errors import SpecBranchError
from specbranch.core.files import write_tensors
from specbranch.core.identity import ModelIdentity
from specbranch.core.messages import FORECASTS, Forecast
from specbranch.runtime.choices import ROUNDS
from specbranch.runtime.hrad.tap import FeatureTap
from specbranch.runtime.identity import identify
from specbranch.runtime.modes import inference

FORMAT = "specbranch-hrad-2"
PREDICTOR = "hrad.safetensors"  # one file, so that it is whole or not there; no name of a checkpoint's
WIDTHS = (256, 64)
DROPOUT = 0.3


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

    @inference
    def predict(self, features: Tensor) -> Forecast:
        """The forecast after one verdict; features [F]."""
        return Forecast(*self(features[None].to(self.mean.device))[0].softmax(0).tolist())

    def with_metrics(self, metrics: dict[str, Any]) -> HRad:
        """This predictor, with what its training printed in its configuration."""
        self.config = replace(self.config, metrics=metrics)
        return self

    def save(self, directory: str | Path) -> None:
        """Write it to a directory, which is made if need be; a predictor of the same pair there is replaced.

        Raises SpecBranchError for a directory that holds something else, and OSError where nothing can be written.
        """
        directory = Path(directory)
        check_directory(directory, self.config)
        directory.mkdir(parents=True, exist_ok=True)
        config = json.dumps(asdict(self.config))
        tensors = {name: values.contiguous() for name, values in self.state_dict().items()}
        write_tensors(directory / PREDICTOR, save(tensors, {"format": FORMAT, "config": config}))


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
    path = Path(directory) / PREDICTOR
    config, tensors = _read(path)
    for role, trained, model in (("target", config.target, target), ("draft", config.draft, draft)):
        found = identify(model)
        if found.fingerprint != trained.fingerprint:
            raise SpecBranchError(
                f"{directory}: this predictor was trained for the {role} {trained.name} ({trained.fingerprint}); "
                f"the {role} here is {found.name} ({found.fingerprint})"
            )
    hrad = HRad(config)
    try:
        hrad.load_state_dict(tensors)
    except RuntimeError as error:
        raise SpecBranchError(f"{path}: not the weights of a predictor: {error}") from error
    return hrad


def check_directory(directory: Path, config: HRadConfig | None = None) -> None:
    """That a predictor may be written there: it holds nothing, or the rounds of one, or one of the same pair (config).

    Raises SpecBranchError that says what else it holds.
    """
    if not directory.exists():
        return
    if not directory.is_dir():
        raise SpecBranchError(f"{directory} is a file; expected a directory")
    names = sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))
    if PREDICTOR in names:
        found, _ = _read(directory / PREDICTOR)
        for role in ("target", "draft") if config is not None else ():
            here, there = getattr(config, role), getattr(found, role)
            if here.fingerprint != there.fingerprint:
                raise SpecBranchError(
                    f"{directory} holds a predictor for the {role} {there.name}, which would be overwritten by one for "
                    f"{here.name}; choose another directory"
                )
    elif {"config.json", "model.safetensors"} & {*names} and ROUNDS not in names:
        raise SpecBranchError(f"{directory} holds another model, which would be overwritten; choose another directory")
    elif names and ROUNDS not in names:
        raise SpecBranchError(f"{directory} holds something else ({names[0]}, …); choose another directory")


def _read(path: Path) -> tuple[HRadConfig, dict[str, Tensor]]:
    if not path.exists() and (path.parent / "config.json").exists():
        raise SpecBranchError(
            f"{path}: there is none. If {path.parent} is a predictor of an earlier version (config.json and "
            "model.safetensors), train it again: the rounds are kept"
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise SpecBranchError(f"{path}: expected a predictor of the format {FORMAT}")
            read = json.loads(metadata["config"])
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
        target, draft = ModelIdentity(**read.pop("target")), ModelIdentity(**read.pop("draft"))
        return HRadConfig(target=target, draft=draft, **read), tensors
    except SpecBranchError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SpecBranchError(f"{path}: not a readable predictor: {error}") from error
