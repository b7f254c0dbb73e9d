"""Loading a target and a draft, and refusing pairs that cannot work together."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from specbranch import bundled
from specbranch.core.errors import SpecBranchError
from specbranch.runtime.choices import DTYPES

GIB = 2**30

ModelSource = str | os.PathLike[str] | PreTrainedModel


def resolve(source: str | os.PathLike[str], role: str) -> str:
    """The directory or hub name that `source` means; "bundled" is the pair in this package.

    Raises SpecBranchError for a path that is not there.
    """
    name = os.fspath(source)
    if name == "bundled":
        return str(bundled.path(role))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SpecBranchError(f"{role} {name}: the directory has no config.json, so it is no checkpoint")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise SpecBranchError(f"{role} {name}: there is no such directory")
    return name


def load_model(
    source: ModelSource,
    role: str,
    dtype: str | torch.dtype,
    device: str,
    device_map: str | dict[str, int | str] | None = None,
) -> PreTrainedModel:
    """A causal language model in evaluation mode on `device`, or spread as `device_map` says; a loaded one is taken as
    it is.

    Raises SpecBranchError when there is no such checkpoint or it is not a causal language model.
    """
    if isinstance(source, PreTrainedModel):
        source.eval()
        return source
    wanted: Any = dtype
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise SpecBranchError(f"dtype {dtype!r}; expected one of {', '.join(DTYPES)}")
        wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            resolve(source, role), dtype=wanted, device_map=device_map
        )
    except (OSError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SpecBranchError(f"{role} {source}: cannot be loaded: {reason}") from error
    except ValueError as error:
        if isinstance(error, SpecBranchError):
            raise
        raise SpecBranchError(
            f"{role} {source}: expected a decoder-only causal language model: {str(error).splitlines()[0]}"
        ) from error
    if device_map is not None:
        model.eval()
        return model
    try:
        check_memory(model, role, torch.device(device))
        model.to(torch.device(device))  # type: ignore[arg-type]
        model.eval()
        return model
    except (RuntimeError, AssertionError) as error:
        raise SpecBranchError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def check_memory(model: PreTrainedModel, role: str, device: torch.device) -> None:
    """Raises SpecBranchError when the weights are larger than what is free on a CUDA device."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return
    needed = sum(weight.nbytes for weight in model.parameters())
    free, total = torch.cuda.mem_get_info(device)
    if needed > free:
        raise SpecBranchError(
            f"{role} {model.name_or_path}: its weights take {needed / GIB:.1f} GiB; "
            f"{free / GIB:.1f} of {total / GIB:.1f} GiB are free on {device}"
        )


def without_weights(source: str | os.PathLike[str], role: str) -> PreTrainedModel:
    """The model of a checkpoint on the meta device: its shapes and code, and no memory."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(resolve(source, role)))
    model.eval()
    return model


def load_tokenizer(source: ModelSource, role: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a checkpoint; None for a loaded model that names none."""
    name = source.name_or_path if isinstance(source, PreTrainedModel) else resolve(source, role)
    if not name:
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(source, PreTrainedModel):
            return None
        raise SpecBranchError(f"{role} {source}: no tokenizer: {str(error).strip().splitlines()[0]}") from error
    return tokenizer
