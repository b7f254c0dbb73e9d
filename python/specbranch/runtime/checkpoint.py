"""The files of a checkpoint: which of them is at fault, and weights that do not belong to its model."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import PreTrainedModel
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME

from specbranch.core.errors import SpecBranchError

WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)  # as transformers looks
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
VOCABULARIES = (TOKENIZER, "*.model", "vocab.*", "*.tiktoken", "tekken.json")
GENERATION_CONFIG = "generation_config.json"
ADAPTER_CONFIG = ADAPTER_CONFIG_NAME
ADAPTER_WEIGHTS = (ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME)
PICKLE = b"\x80"  # how a file of torch's begins that is no archive
NAMED = 5  # tensors in a message
MOST_LAYERS = 10_000  # more are a mistake, and would be made one by one before anything else says so

# Tensors of checkpoints that change nothing of a text: buffers that models make themselves, predictors of further
# tokens, and the value heads of training.
SPARE = re.compile(r"rotary_emb\.inv_freq$|masked_bias$|position_ids$|(cos|sin)_cached$|(^|\.)mtp(_|\.)|^v_head\.")


def is_gguf(name: str) -> bool:
    """Whether a name is that of a GGUF file, there or not; a directory may have such a name too."""
    return name.lower().endswith(".gguf") and not os.path.isdir(name)


def folder_of(name: str) -> Path | None:
    """Where the files of a directory or hub name are on this machine, as far as they are; a GGUF file has no others."""
    if os.path.isdir(name):
        return Path(name)
    if is_gguf(name):
        return None
    try:
        config = cached_file(name, CONFIG_NAME, local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if config is None else Path(config).parent


def weights_fault(folder: Path) -> str | None:
    """The first file of a checkpoint that cannot be used, and why; None where all can be read."""
    for name in (CONFIG_NAME, GENERATION_CONFIG):
        if reason := json_fault(folder / name):
            return reason
    weights = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if weights is None or weights.suffix != ".json":
        return None if weights is None else _file_fault(weights)
    if reason := json_fault(weights):
        return reason
    shards = shards_of(weights)
    if not shards:
        return f"{weights}: has no weight_map of tensors to files"
    for shard in sorted(set(shards.values())):
        if not (folder / shard).exists():
            return f"{weights}: names {shard}, which is not there"
        if reason := _file_fault(folder / shard):
            return reason
    return None


def adapter_fault(folder: Path) -> str | None:
    """The same for an adapter."""
    file = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).exists()), None)
    return json_fault(folder / ADAPTER_CONFIG) or (None if file is None else _file_fault(file))


def shards_of(index: Path) -> dict[str, str]:
    """Tensors and their files, of an index; none where it has no such map."""
    found = json.loads(index.read_bytes()).get("weight_map")
    valid = isinstance(found, dict) and all(isinstance(file, str) for file in found.values())
    return found if valid else {}


def tokenizer_fault(folder: Path) -> str | None:
    """The same for a tokenizer's files."""
    for name in (CONFIG_NAME, TOKENIZER_CONFIG, TOKENIZER):
        if reason := json_fault(folder / name):
            return reason
    if (folder / TOKENIZER).exists():
        try:
            Tokenizer.from_file(str(folder / TOKENIZER))
        except Exception as error:  # the library raises nothing more special
            return f"{folder / TOKENIZER}: no tokenizer ({error})"
    if not any(found for pattern in VOCABULARIES for found in folder.glob(pattern)):
        return f"{folder} has none of tokenizer.json, tokenizer.model, vocab.json with merges.txt"
    return None


def json_fault(path: Path) -> str | None:
    """Why a file is no JSON object; None where it is one, or is not there."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    except (ValueError, RecursionError) as error:
        return f"{path}: not JSON ({error})"
    return None if isinstance(found, dict) else f"{path}: expected a JSON object"


def _file_fault(path: Path) -> str | None:
    """Of a file of weights; of pickles only whether there is anything to read."""
    try:
        with path.open("rb") as file:
            if not (first := file.read(1)):
                return f"{path}: empty"
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif first != PICKLE and not zipfile.is_zipfile(path):
            return f"{path}: not a whole file of torch's"
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    except SafetensorError as error:
        return f"{path}: not a whole safetensors file ({error})"
    return None


def check_weights(
    model: PreTrainedModel, info: Mapping[str, Any], folder: Path | None, config: str = CONFIG_NAME
) -> None:
    """Refuse a model whose checkpoint lacks weights, or has some that it has no place for or that are of another shape.

    config: the file that says what belongs there. info: of `from_pretrained(output_loading_info=True)`, which knows
    tied weights and what a model's class declares as dispensable. Raises SpecBranchError naming file and tensors.
    """
    mismatched = {name: (tuple(found), tuple(wanted)) for name, found, wanted in info.get("mismatched_keys", ())}
    missing = set(info.get("missing_keys", ())) - mismatched.keys()
    unexpected = {name for name in info.get("unexpected_keys", ()) if not _is_spare(name, model)}
    if faults := faults_of(type(model).__name__, missing, mismatched, unexpected, config):
        where = _file_of(folder, sorted(missing or mismatched or unexpected)[0])
        raise SpecBranchError(f"{where}: {faults}")


def faults_of(
    kind: str,
    missing: Collection[str],
    mismatched: Mapping[str, tuple[Sequence[int], Sequence[int]]],
    unexpected: Collection[str],
    source: str,
) -> str:
    """What is wrong with the tensors of a model's class, in words; "" for nothing.

    mismatched: the shapes that they have, and those that `source` says.
    """
    faults = []
    if missing:
        faults.append(f"lacks {_some(missing)} of {kind}")
    if mismatched:
        shapes = (f"{name} {list(found)} instead of {list(wanted)}" for name, (found, wanted) in mismatched.items())
        faults.append(f"has {_some(shapes)} as {source} says")
    if unexpected:
        faults.append(f"has {_some(unexpected)}, for which {kind} has no place")
    return "; ".join(faults)


def _is_spare(name: str, model: PreTrainedModel) -> bool:
    if SPARE.search(name) or any(f".{buffer}".endswith(f".{name}") for buffer, _ in model.named_buffers()):
        return True
    config = model.config.get_text_config()
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    further = getattr(config, "num_nextn_predict_layers", None) or 0  # which are stored behind the model's own
    return layer is not None and 0 <= int(layer[1]) - config.num_hidden_layers < further


def _file_of(folder: Path | None, tensor: str) -> Path | str:
    """Where a tensor should be."""
    if folder is None:
        return "the checkpoint"
    file = next((folder / name for name in (*WEIGHTS, *ADAPTER_WEIGHTS) if (folder / name).exists()), folder)
    return folder / shards_of(file).get(tensor, file.name) if file.suffix == ".json" else file


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
