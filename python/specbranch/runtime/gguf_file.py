"""What a GGUF file says of itself: its settings, and which tensors lie where. No weights are read.

The reader of the package `gguf` makes an array for every word of a vocabulary, which takes seconds, and believes the
lengths in a damaged file.
"""

from __future__ import annotations

import mmap
import os
import struct
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from specbranch.core.errors import SpecBranchError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # where a file does not say
MOST_DIMENSIONS = 4

# Types of values: fixed ones as struct has them, and two of any length.
FIXED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of a file. shape: as torch has it. kind: "F32", "Q4_K", … offset: of its bytes in the file."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """settings: by name; of an array of texts, such as a vocabulary, its length. tensors: by name, as they lie."""

    path: Path
    settings: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.settings.get("general.architecture", ""))


def read_header(path: str | os.PathLike[str]) -> GgufFile:
    """Raises SpecBranchError, without the file's name, for what is no whole GGUF file in this machine's byte order."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                raise SpecBranchError("not a GGUF file: it is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(data).read(path)
    except OSError as error:
        raise SpecBranchError(error.strerror or str(error)) from error


class _Header:
    """Takes values from the beginning of a file, one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._size, self._at = data, len(data), 0

    def read(self, path: Path) -> GgufFile:
        if (magic := self._bytes(min(4, self._size))) != MAGIC:
            raise SpecBranchError(f"not a GGUF file: it begins with {magic!r} instead of {MAGIC!r}")
        version = self._one("I")
        if version not in VERSIONS:
            if not version & 0xFFFF:
                raise SpecBranchError("a big-endian GGUF file; expected little-endian")
            raise SpecBranchError(f"version {version} of GGUF; expected {' or '.join(map(str, VERSIONS))}")
        tensors, settings = self._one("Q"), self._one("Q")
        found = self._settings(settings)
        if (parts := found.get("split.count", 1)) not in (0, 1):
            raise SpecBranchError(f"one of {parts} parts of a split file; expected the whole model in one file")
        alignment = found.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise SpecBranchError(f"general.alignment is {alignment!r}; expected a power of two")
        table = self._tensors(tensors)
        start = -(-self._at // alignment) * alignment
        return GgufFile(path, found, {name: self._placed(start, name, *entry) for name, entry in table.items()})

    def _settings(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            name = self._text()
            if name in found:
                raise SpecBranchError(f"has {name} twice")
            found[name] = self._value(self._one("I"))
        return found

    def _value(self, kind: int) -> Any:
        if kind == TEXT:
            return self._text()
        if kind in FIXED:
            return self._one(FIXED[kind])
        if kind != ARRAY:
            raise SpecBranchError(f"has a value of type {kind} in its header, which is not known")
        inner, count = self._one("I"), self._one("Q")
        if inner in FIXED:
            layout = struct.Struct(f"<{count}{FIXED[inner]}") if count <= self._size else None
            if layout is None:
                raise self._short()
            return list(layout.unpack(self._bytes(layout.size)))
        if inner != TEXT:
            raise SpecBranchError(f"has an array of type {inner} in its header, which is not known")
        self._skip_texts(count)
        return count

    def _skip_texts(self, count: int) -> None:
        length = partial(struct.Struct("<Q").unpack_from, self._data)
        at = self._at
        try:
            for _ in range(count):
                at += 8 + length(at)[0]
        except (struct.error, OverflowError):
            raise self._short() from None
        if at > self._size:
            raise self._short()
        self._at = at

    def _tensors(self, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
        """By name: shape, number of the type, and offset behind the header."""
        found = {}
        for _ in range(count):
            name = self._text()
            if name in found:
                raise SpecBranchError(f"has {name} twice")
            dimensions = self._one("I")
            if dimensions > MOST_DIMENSIONS:
                raise SpecBranchError(f"{name} has {dimensions} dimensions; expected at most {MOST_DIMENSIONS}")
            shape = tuple(self._one("Q") for _ in range(dimensions))
            found[name] = shape[::-1], self._one("I"), self._one("Q")
        return found

    def _placed(self, start: int, name: str, shape: tuple[int, ...], number: int, offset: int) -> GgufTensor:
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise SpecBranchError(f"{name} is of type {number}, which is not known") from None
        of_block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape and shape[-1] % of_block:
            raise SpecBranchError(
                f"{name} has rows of {shape[-1]}; expected whole blocks of {of_block} for {kind.name}"
            )
        nbytes = prod(shape) // of_block * block_bytes
        if start + offset + nbytes > self._size:
            raise SpecBranchError(
                f"not a whole file: {name} ends at byte {start + offset + nbytes}, the file at {self._size}"
            )
        return GgufTensor(name, shape, kind.name, start + offset, nbytes)

    def _one(self, kind: str) -> Any:
        layout = struct.Struct(f"<{kind}")
        return layout.unpack(self._bytes(layout.size))[0]

    def _text(self) -> str:
        try:
            return self._bytes(self._one("Q")).decode()
        except UnicodeDecodeError:
            raise SpecBranchError("has text in its header that is not UTF-8") from None

    def _bytes(self, count: int) -> bytes:
        if count > self._size - self._at:
            raise self._short()
        self._at += count
        return self._data[self._at - count : self._at]

    def _short(self) -> SpecBranchError:
        return SpecBranchError(f"not a whole file: it ends within its header, at byte {self._size}")
