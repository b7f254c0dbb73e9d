"""Loading a target and a draft, and refusing, by name, what cannot be loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import AutoHfQuantizer

from specbranch.core.checks import choice, shown
from specbranch.core.errors import SpecBranchError
from specbranch.core.extras import check_installed
from specbranch.runtime import gguf
from specbranch.runtime.adapters import add_adapter, base_of_adapter
from specbranch.runtime.checkpoint import (
    ADAPTER_CONFIG,
    GENERATION_CONFIG,
    MOST_LAYERS,
    TOKENIZER_CONFIG,
    adapter_fault,
    check_weights,
    folder_of,
    is_gguf,
    json_fault,
    tokenizer_fault,
    weights_fault,
)
from specbranch.runtime.choices import ARITHMETIC_OF, ARITHMETICS, DTYPES
from specbranch.runtime.gguf_file import GgufFile, read_header
from specbranch.runtime.sources import loading, named, resolve

GIB = 2**30

ModelSource = str | os.PathLike[str] | PreTrainedModel


def check_loaded(target: object, draft: object, hrad: object) -> None:
    """Raises SpecBranchError for the name of a model where a model is expected, and for what is no predictor."""
    for role, model in (("target", target), ("draft", draft)):
        if isinstance(model, (str, os.PathLike)):
            raise SpecBranchError(f"{role} is {shown(model)}; expected a model: SpecBranch.from_pretrained loads one")
    if hrad is not None and not isinstance(hrad, (str, os.PathLike, nn.Module)):
        raise SpecBranchError(f"hrad is {shown(hrad)}; expected a predictor, or the directory of one")


def load_config(source: str | os.PathLike[str], role: str, trust_remote_code: bool = False) -> Any:
    """The configuration of a checkpoint. Raises SpecBranchError when it cannot be used."""
    name = resolve(source, role)
    if is_gguf(name):
        with _gguf(name, role) as file:
            return gguf.config_of(file)
    with loading(name, role):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
        if isinstance(layers, int) and not 0 < layers <= MOST_LAYERS:
            raise ValueError(f"config.json: num_hidden_layers is {layers}; expected 1 to {MOST_LAYERS}")
        quantization = getattr(config, "quantization_config", None)
        if isinstance(quantization, dict) and not AutoHfQuantizer.supports_quant_method(quantization):
            method = quantization.get("quant_method")
            raise ValueError(f"config.json: this version of transformers does not know the quant_method {method!r}")
    return config


def load_model(
    source: ModelSource,
    role: str,
    dtype: str | torch.dtype,
    device: str | torch.device,
    device_map: str | dict[str, int | str] | None = None,
    trust_remote_code: bool = False,
    arithmetic: str | None = None,
) -> PreTrainedModel:
    """A causal language model on `device`, or spread as `device_map` says; a loaded one is taken as it is.

    arithmetic: of products over a GGUF file's blocks; None: the usual one of the role.

    Raises SpecBranchError when there is no such checkpoint, when it is not a causal language model, and when its
    weights are not those of its configuration.
    """
    if arithmetic is not None:
        arithmetic = choice(f"{role}_arithmetic", arithmetic, ARITHMETICS)
    if isinstance(source, nn.Module):  # peft's models are no PreTrainedModel
        return source
    wanted, place = _dtype(dtype), _device(device)
    name = resolve(source, role)
    if is_gguf(name):
        return _load_gguf(name, role, wanted, place, device_map, arithmetic)
    if device_map is not None:
        check_installed("device_map", "accelerate")
    base = base_of_adapter(name, role)
    model = _load_whole(name if base is None else base, role, wanted, device_map, trust_remote_code)
    if base is not None:
        add_adapter(model, name, role)
    if device_map is not None:
        return model
    try:
        check_memory(model, role, place)
        if model.device != place:  # quantised models may not be moved
            model.to(place)  # type: ignore[arg-type]
        return model
    except (RuntimeError, AssertionError, ValueError) as error:
        if isinstance(error, SpecBranchError):
            raise
        raise SpecBranchError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error


@contextmanager
def _gguf(name: str, role: str) -> Iterator[GgufFile]:
    """The header of a GGUF file, in a context in which errors name the file."""
    with loading(name, role), named(name, role):
        yield read_header(name)


def _load_gguf(
    name: str,
    role: str,
    dtype: Any,
    device: torch.device,
    device_map: str | dict[str, int | str] | None,
    arithmetic: str | None,
) -> PreTrainedModel:
    with _gguf(name, role) as file:
        if device_map is not None or device.type != "cpu":
            place = f"device {device}" if device_map is None else f"device_map {shown(device_map)}"
            raise SpecBranchError(f"packed weights run on the CPU, not with {place}")
        if dtype not in ("auto", torch.bfloat16):
            found = str(dtype).removeprefix("torch.")
            raise SpecBranchError(f"dtype {found}; expected auto or bfloat16 for a GGUF file")
        return gguf.load(file, arithmetic or ARITHMETIC_OF[role])


def _load_whole(
    name: str, role: str, dtype: Any, device_map: str | dict[str, int | str] | None, trust_remote_code: bool
) -> PreTrainedModel:
    load_config(name, role, trust_remote_code)
    with loading(name, role):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the shapes
        )
    model: PreTrainedModel
    model, info = loaded if isinstance(loaded, tuple) else (loaded, {})  # code of a checkpoint's own may do otherwise
    folder = folder_of(name)
    with named(name, role):
        check_weights(model, info, folder)
        if folder is not None and (at_fault := json_fault(folder / GENERATION_CONFIG)):  # transformers overlooks it
            raise SpecBranchError(at_fault)
    return model


# ---- Values


def _dtype(dtype: object) -> Any:
    """What transformers takes for it."""
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise SpecBranchError(f"dtype {shown(dtype)}; expected one of {', '.join(DTYPES)}")
    return dtype if dtype == "auto" else getattr(torch, dtype)


def _device(device: object) -> torch.device:
    if not re.fullmatch(r"(cpu|cuda(:\d{1,3})?)", str(device)) or not isinstance(device, (str, torch.device)):
        raise SpecBranchError(f"device is {shown(device)}; expected cpu, cuda or, for example, cuda:1")
    return torch.device(device)


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


def without_weights(source: str | os.PathLike[str], role: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a checkpoint on the meta device: its shapes and code, and no memory.

    Raises SpecBranchError for a configuration that cannot be used and for a file of weights that cannot be read.
    """
    own = resolve(source, role)
    if is_gguf(own):
        with _gguf(own, role) as file:
            return gguf.without_values(file)
    base = base_of_adapter(own, role)
    if base is not None and (at_fault := adapter_fault(Path(own))):
        raise SpecBranchError(f"{role} {own}: {at_fault}")
    name = own if base is None else base
    config = load_config(name, role, trust_remote_code)
    with loading(name, role), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    if (folder := folder_of(name)) is not None and (at_fault := weights_fault(folder)):
        raise SpecBranchError(f"{role} {name}: {at_fault}")
    model.eval()
    return model


def load_tokenizer(source: ModelSource, role: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a checkpoint, or in a GGUF file; None for a loaded model that has none.

    Raises SpecBranchError when there is none, or one without a vocabulary.
    """
    loaded = isinstance(source, nn.Module)
    name = getattr(source, "name_or_path", "") if isinstance(source, nn.Module) else resolve(source, role)
    if not name:
        return None
    try:
        if is_gguf(name):
            with loading(name, role, tokenizer_fault, "its tokenizer "), named(name, role):
                return gguf.tokenizer_of(read_header(name))
        if (Path(name) / ADAPTER_CONFIG).is_file() and not (Path(name) / TOKENIZER_CONFIG).is_file():
            name = base_of_adapter(name, role) or name  # an adapter need not have one
        with loading(name, role, tokenizer_fault, "its tokenizer "):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                name, trust_remote_code=trust_remote_code
            )
            # Some classes of transformers are content without their files.
            if not tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens, *tokenizer.added_tokens_encoder}:
                raise ValueError("the tokenizer has no vocabulary")
    except SpecBranchError:
        if loaded:
            return None
        raise
    return tokenizer
