"""GGUF files that cannot be used: a line for each, and nothing half-loaded."""

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import encoded, load, model_of, write_gguf
from tiny import tiny_model

from specbranch import SpecBranch, SpecBranchError
from specbranch.runtime import gguf as loader
from specbranch.runtime.gguf_file import read_header
from specbranch.runtime.loading import load_config, load_tokenizer, without_weights
from specbranch.runtime.packed import weight_format

QUERIES, NORM, DOWN = "blk.0.attn_q.weight", "blk.0.attn_norm.weight", "blk.1.ffn_down.weight"


def refused(path: Path, line: str, load: Callable[[Path], object] = load) -> None:
    with pytest.raises(SpecBranchError) as caught:
        load(path)
    said = str(caught.value)
    assert re.search(line, said), said
    assert "\n" not in said
    assert str(path.name) in said


def without(*names: str) -> Callable[..., object]:
    return lambda writer, tensors: [tensors.pop(name) for name in names]


def changed(name: str, kind: str, shape: tuple[int, ...] = (32, 32)) -> Callable[..., object]:
    """Another tensor of this name."""
    data = encoded(np.ones(shape, np.float32), kind)
    return lambda writer, tensors: tensors.update({name: (kind, data)})


def integers(writer: gguf.GGUFWriter, tensors: dict[str, tuple[str, Any]]) -> None:
    tensors[DOWN] = "I32", np.zeros((32, 64), np.int32)


def infinite(writer: gguf.GGUFWriter, tensors: dict[str, tuple[str, Any]]) -> None:
    _, data = tensors[DOWN]
    data[3, :2] = np.array([np.inf], np.float16).view(np.uint8)


ENDS = r"not a whole file: it ends within its header, at byte"
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": (
        {"general.architecture": "gemma3"},
        r"its architecture is 'gemma3'; of GGUF files expected",
    ),
    "an adapter": ({"general.type": "adapter"}, r"general\.type is 'adapter'; expected a model"),
    "a part": ({"split.count": 3}, r"one of 3 parts of a split file; expected the whole model in one file"),
    "no size": ({"$.embedding_length": None}, r"lacks llama\.embedding_length"),
    "no precision": ({"$.attention.layer_norm_rms_epsilon": None}, r"lacks llama\.attention\.layer_norm_rms_epsilon"),
    "sizes of layers": (
        {"$.feed_forward_length": [64, 32]},
        r"llama\.feed_forward_length is \[64, 32\]; expected an int",
    ),
    "no layers": ({"$.block_count": 0}, r"llama\.block_count is 0; expected 1 <="),
    "too many layers": ({"$.block_count": 10**9}, r"llama\.block_count is 1000000000; expected"),
    "a layer more": ({"$.block_count": 3}, r"lacks blk\.2\..* and 4 more of LlamaForCausalLM"),
    "a layer less": ({"$.block_count": 1}, r"has blk\.1\..* and 4 more, for which LlamaForCausalLM has no place"),
    "another width": (
        {"$.feed_forward_length": 96},
        r"has blk\.0\.ffn_down\.weight \[32, 64\] instead of \[32, 96\], .* as its header says",
    ),
    "odd heads": ({"$.attention.head_count": 3}, r"cannot be loaded: .*heads"),
    "widths of heads": ({"$.attention.value_length": 16}, r"value_length is 16, and heads are 8 wide"),
    "partial rotation": ({"$.rope.dimension_count": 4}, r"rope\.dimension_count is 4, and heads are 8 wide"),
    "yarn": ({"$.rope.scaling.type": "yarn"}, r"llama\.rope\.scaling\.type is 'yarn', which specbranch does not know"),
    "experts": ({"$.expert_count": 8}, r"llama\.expert_count is 8, which specbranch does not know to follow"),
    "a window": ({"$.attention.sliding_window": 64}, r"llama\.attention\.sliding_window is 64, which"),
    "an end that is none": (
        {"tokenizer.ggml.tokens": ["a"] * 32, "tokenizer.ggml.eos_token_id": 32},
        r"tokenizer\.ggml\.eos_token_id is 32; expected 0 <= .* <= 31",
    ),
    "more tokens than rows": (
        {"tokenizer.ggml.tokens": ["a"] * 33},
        r"has 33 tokens, and token_embd\.weight has rows for 32",
    ),
}
TENSORS: dict[str, tuple[Callable[..., object], str]] = {
    "a missing tensor": (without(NORM), rf"lacks {re.escape(NORM)} of LlamaForCausalLM$"),
    "no embedding": (without("token_embd.weight"), r"lacks token_embd\.weight of LlamaForCausalLM"),
    "a tensor too many": (
        changed("blk.0.attn_q_norm.weight", "F32", (8,)),
        r"has blk\.0\.attn_q_norm\.weight, for which",
    ),
    "another shape": (
        changed(QUERIES, "Q8_0", (32, 64)),
        r"has blk\.0\.attn_q\.weight \[32, 64\] instead of \[32, 32\] as its",
    ),
    "other blocks": (
        changed(QUERIES, "MXFP4"),
        r"blk\.0\.attn_q\.weight is MXFP4; expected one of Q8_0, .*, F32, F16, BF16$",
    ),
    "integers": (integers, r"blk\.1\.ffn_down\.weight is I32; expected one of"),
    "infinite scales": (infinite, r"blk\.1\.ffn_down\.weight: "),
    "other factors": (
        changed("rope_freqs.weight", "F32", (3,)),
        r"rope_freqs\.weight is F32 \[3\]; expected F32 \[4\]",
    ),
}


@pytest.mark.parametrize("name", [*SETTINGS, *TENSORS])
def test_what_cannot_be_loaded_is_refused_in_a_line(tmp_path: Path, name: str) -> None:
    path, model = tmp_path / "tiny.gguf", model_of()
    if name in SETTINGS:
        settings, line = SETTINGS[name]
        settings = dict(settings)
        write_gguf(path, model, architecture=settings.pop("general.architecture", None), settings=settings)
    else:
        edit, line = TENSORS[name]
        write_gguf(path, model, edit=edit)
    refused(path, line)
    if name != "infinite scales":  # these are values, which are not read
        refused(path, line, lambda path: without_weights(path, "draft"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("sound") / "tiny.gguf"
    write_gguf(path, model_of(num_hidden_layers=1), settings={"tokenizer.ggml.tokens": ["a"] * 32})
    return path.read_bytes()


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "nothing": (lambda data: b"", r"not a GGUF file: it is empty"),
    "text": (lambda data: b"version https://git-lfs.github.com/spec/v1", r"not a GGUF file: it begins with b'vers'"),
    "two bytes": (lambda data: data[:2], r"not a GGUF file: it begins with b'GG'"),
    "no header": (lambda data: data[:20], ENDS),
    "half a header": (lambda data: data[:700], ENDS),
    "half the weights": (
        lambda data: data[: len(data) - 999],
        r"not a whole file: output\.weight ends at byte \d+, the file at",
    ),
    "big-endian": (
        lambda data: data[:4] + data[4:8][::-1] + data[8:],
        r"a big-endian GGUF file; expected little-endian",
    ),
    "version 1": (lambda data: data[:4] + b"\1\0\0\0" + data[8:], r"version 1 of GGUF; expected 2 or 3"),
    "endless": (lambda data: data[:8] + b"\xff" * 16 + data[24:], r"not a whole file|has .*twice|in its header"),
}


@pytest.mark.parametrize("name", BYTES)
def test_what_is_no_whole_file(tmp_path: Path, sound: bytes, name: str) -> None:
    change, line = BYTES[name]
    path = tmp_path / "tiny.gguf"
    path.write_bytes(change(sound))
    for load_some in (load, lambda path: load_config(path, "target"), lambda path: load_tokenizer(path, "target")):
        refused(path, line, load_some)


def test_any_damage_to_a_header_is_a_line_or_nothing(tmp_path: Path, sound: bytes) -> None:
    path, dice = tmp_path / "tiny.gguf", random.Random(0)
    path.write_bytes(sound)
    header = min(tensor.offset for tensor in read_header(path).tensors.values())
    for _ in range(300):
        data = bytearray(sound[: dice.choice((len(sound), dice.randrange(header)))])
        for _ in range(dice.randrange(4) if data else 0):
            data[dice.randrange(min(header, len(data)))] = dice.randrange(256)
        path.write_bytes(bytes(data))
        try:
            found = read_header(path)
            if found.tensors:
                loader.config_of(found)
        except (SpecBranchError, ValueError):
            pass


def test_files_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path("tiny.gguf"), tmp_path / "tiny.gguf", Path("some/tiny.gguf")):
        refused(path, r"there is no such file$")
    (tmp_path / "tiny.gguf").mkdir()
    refused(tmp_path / "tiny.gguf", r"the directory has no config\.json")
    (tmp_path / "weights.bin").write_bytes(b"GGUF")
    refused(tmp_path / "weights.bin", r"expected the directory of a checkpoint or a file named \*\.gguf")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read(tmp_path: Path, sound: bytes) -> None:
    (tmp_path / "tiny.gguf").write_bytes(sound)
    (tmp_path / "tiny.gguf").chmod(0)
    refused(tmp_path / "tiny.gguf", r"Permission denied")


def test_a_directory_may_be_named_so(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "tiny.gguf")
    assert weight_format(load(tmp_path / "tiny.gguf")) == ""


def test_an_adapter_of_a_file(gguf_pair: Path, tmp_path: Path) -> None:
    settings = {"base_model_name_or_path": str(gguf_pair / "target.gguf")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    refused(tmp_path, r"its base .*target\.gguf is a GGUF file; expected a checkpoint, which can take layers$")


def test_no_tokenizer(tmp_path: Path, sound: bytes) -> None:
    (tmp_path / "tiny.gguf").write_bytes(sound)
    line = r"^target \S+tiny\.gguf: has no tokenizer: expected tokenizer\.ggml\.model and tokenizer\.ggml\.tokens$"
    refused(tmp_path / "tiny.gguf", line, lambda path: load_tokenizer(path, "target"))
    with pytest.raises(SpecBranchError, match=line):
        SpecBranch.from_pretrained(str(tmp_path / "tiny.gguf"))


def test_a_file_that_becomes_shorter(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(sound)
    file = read_header(path)
    os.truncate(path, len(sound) - 999)
    with pytest.raises(SpecBranchError, match=r"^not a whole file: it ends within output\.weight$"):
        loader.load(file, "exact")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"dtype": "float32"}, r"dtype float32; expected auto or bfloat16 for a GGUF file$"),
        ({"dtype": torch.float16}, r"dtype float16; expected auto or bfloat16"),
        ({"device": "cuda"}, r"packed weights run on the CPU, not with device cuda$"),
        ({"device_map": "auto"}, r"packed weights run on the CPU, not with device_map 'auto'$"),
        ({"target_weights": "lossless"}, r"target_weights is 'lossless', but weights of .* stay in its blocks \("),
        ({"target_weights": "int4"}, r"target_weights is 'int4', but weights of .* stay in its blocks \("),
        ({"draft_weights": "lossless"}, r"draft_weights is 'lossless', but weights of .* stay in its blocks \("),
        ({"draft_weights": "int8"}, r"draft_weights is 'int8', but weights of .* have no more bits \(q8_0\)"),
        ({"target_weights": "int3"}, r"target_weights is 'int3'; expected one of"),
        ({"target_arithmetic": "slow"}, r"target_arithmetic is 'slow'; expected one of exact, fast$"),
        ({"draft_arithmetic": 8}, r"draft_arithmetic is 8; expected one of exact, fast$"),
    ],
)
def test_options_that_do_not_fit(gguf_pair: Path, options: dict[str, Any], line: str) -> None:
    pair = [str(gguf_pair / f"{role}.gguf") for role in ("target", "draft")]
    with pytest.raises(SpecBranchError, match=line):
        SpecBranch.from_pretrained(*pair, **options)
