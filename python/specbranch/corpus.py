"""Texts from which drafts by retrieval copy, beside the one that is decoded: their tokens and an index over them."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from specbranch.core.checks import shown
from specbranch.core.errors import SpecBranchError
from specbranch.core.files import tensors_header, write
from specbranch.core.identity import ModelIdentity
from specbranch.core.suffix_index import SuffixIndex
from specbranch.text.vocabulary import identify_vocabulary

FORMAT = "specbranch-corpus-1"
KIND = "specbranch-corpus-"  # what the names of all versions of the format begin with
PIECE = 2**16  # characters that are tokenised as one text
PIECES = 16  # that are handed to the tokenizer together, which shares them among its threads
BYTES_BUILT = 32  # of memory for each token while the index is built: the index's own 28, and what it is made from
TEXT_BYTES = 4  # about as many has a token in a file of code or prose
GIB = 2**30

CorpusSource = str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Texts that drafts by retrieval copy from, beside the text that is decoded.

    Made of text files by `build` and kept in a file by `save`; `load` maps that file into memory, so that it costs no
    more than what look-ups read of it. Engines, generations and threads may share one.

    tokenizer: whose tokens these are: its name, and a fingerprint of its vocabulary. files: the names of what it was
    made from, without their folders. path: of the file that it was loaded from, or "".
    """

    index: SuffixIndex
    tokenizer: ModelIdentity
    files: tuple[str, ...]
    path: str = ""

    def __len__(self) -> int:
        """Tokens."""
        return len(self.index)

    @property
    def name(self) -> str:
        """For messages."""
        return self.path or " ".join([*self.files[:3], *["…"] * (len(self.files) > 3)]) or "of texts"

    @staticmethod
    def build(
        files: CorpusSource | Iterable[CorpusSource],
        tokenizer: PreTrainedTokenizerBase,
        *,
        texts: Iterable[str] = (),
        before: Callable[[str], object] = lambda name: None,
    ) -> Corpus:
        """The corpus of text files in UTF-8, and of texts behind them.

        Between two of them stands the tokenizer's token for the end of a text (or its beginning, where there is none
        for the end), so that none runs into the next. before: gets the name of each as it is read, and "the index".

        Raises SpecBranchError for what cannot be read, is no text or has no tokens, and for more of it than there is
        memory for: 32 bytes a token, of which 8 remain.
        """
        paths = [files] if isinstance(files, (str, os.PathLike)) else list(files)
        _check_memory(sum(map(_size, paths)) // TEXT_BYTES)
        tokens = array("i")
        between = next((id for id in (tokenizer.eos_token_id, tokenizer.bos_token_id) if id is not None), None)

        def add(name: str, pieces: Iterator[str]) -> None:
            first = True
            for ids in _tokenized(name, pieces, tokenizer):
                if ids and first and len(tokens) and between is not None:
                    ids = [int(between), *ids]
                first = first and not ids
                tokens.extend(ids)

        for path in paths:
            before(Path(path).name)
            with _opened(path) as stream:
                add(str(path), _pieces(stream, str(path)))
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise SpecBranchError(f"texts[{number}] is {shown(text)}; expected text")
            add(f"texts[{number}]", iter([text] if text else []))
        if not tokens:
            given = ", ".join(map(str, paths[:5])) or "no files"
            raise SpecBranchError(f"the corpus is empty: expected a text, found no token in {given}")
        _check_memory(len(tokens))
        before("the index")
        try:
            index = SuffixIndex(tokens)
        except MemoryError:
            raise SpecBranchError(_too_large(len(tokens))) from None
        return Corpus(index, identify_vocabulary(tokenizer), tuple(Path(path).name for path in paths))

    def save(self, path: CorpusSource) -> None:
        """Write to a safetensors file, whole or not at all; a corpus there is replaced.

        Raises SpecBranchError for a file of something else, and OSError where nothing can be written.
        """
        file = Path(path)
        if file.is_file() and file.stat().st_size and not is_corpus(file):
            raise SpecBranchError(f"{file} is not a corpus: it stays as it is; choose another file")
        metadata = {
            "format": FORMAT,
            "tokenizer": self.tokenizer.name,
            "vocabulary": self.tokenizer.fingerprint,
            "tokens": str(len(self)),
            "files": json.dumps(self.files),
        }
        columns = {"tokens": self.index.tokens.cast("B"), "order": self.index.order.cast("B")}
        described = {
            name: {
                "dtype": "I32",
                "shape": [len(self)],
                "data_offsets": [len(self) * 4 * place, len(self) * 4 * (place + 1)],
            }
            for place, name in enumerate(columns)
        }
        write(file, tensors_header({"__metadata__": metadata, **described}), *columns.values())

    @staticmethod
    def load(path: CorpusSource) -> Corpus:
        """Map a file of `save` into memory: its tokens are read as they are looked up.

        Raises SpecBranchError for a file that is not one, or not whole.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                found = metadata.get("format", "")
                if found != FORMAT:
                    other = f"; this one is {found}: build it anew" if found.startswith(KIND) else ""
                    raise SpecBranchError(f"{path}: expected a corpus of the format {FORMAT}{other}")
                tokens, order = (file.get_tensor(name).numpy() for name in ("tokens", "order"))
                index = SuffixIndex.mapped(tokens, order)
                files = tuple(map(str, json.loads(metadata["files"])))
                tokenizer = ModelIdentity(metadata["tokenizer"], metadata["vocabulary"])
                if len(index) != int(metadata["tokens"]) or not len(index):
                    raise ValueError(f"it has {len(index)} tokens; expected {metadata['tokens']}")
                return Corpus(index, tokenizer, files, str(path))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, SpecBranchError):
                raise
            said = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise SpecBranchError(f"{path}: not a readable corpus: {said}") from error

    def check_vocabulary(self, own: ModelIdentity) -> None:
        """own: of the target's tokenizer. Raises SpecBranchError where that is another."""
        if own.fingerprint != self.tokenizer.fingerprint:
            raise SpecBranchError(
                f"corpus {self.name} has the tokens of {self.tokenizer.name}, whose vocabulary is not that of the "
                f"target's tokenizer, {own.name}: build it with the target's"
            )


def is_corpus(path: Path) -> bool:
    """Whether a file is one, by its head."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def corpora_of(given: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[Corpus]:
    """What an engine is given as corpus: one, the path of one or of a text file, or several of these; text files become
    one together. Raises SpecBranchError for anything else, and for tokens that are not the target's."""
    several: list[Corpus | CorpusSource] = list(given) if isinstance(given, (list, tuple)) else [given]
    for one in several:
        if not isinstance(one, (Corpus, str, os.PathLike)):
            raise SpecBranchError(f"corpus is {shown(one)}; expected a Corpus, the path of one or of a text file")
    if not several:
        raise SpecBranchError("corpus is an empty list; expected a Corpus, or the path of one or of a text file")
    if tokenizer is None:
        raise SpecBranchError("corpus needs the target's tokenizer: pass tokenizer=")
    texts = [one for one in several if not isinstance(one, Corpus) and _is_text(one)]
    found = [one if isinstance(one, Corpus) else Corpus.load(one) for one in several if one not in texts]
    own = identify_vocabulary(tokenizer) if found else None
    for corpus in found:
        assert own is not None
        corpus.check_vocabulary(own)
    return [*found, *([Corpus.build(texts, tokenizer)] if texts else [])]


def _is_text(given: CorpusSource) -> bool:
    """Whether it is anything but a file with the head of safetensors, which no text begins like."""
    try:
        if not os.path.isfile(given):  # of a pipe nothing is lost
            return True
        with open(given, "rb") as stream:
            head = stream.read(9)
    except OSError:
        return True  # reading it says why
    return b"\0" not in head[:8] or head[8:] != b"{"


def _size(path: CorpusSource) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise SpecBranchError(f"{path}: {error.strerror or error}") from None


@contextmanager
def _opened(path: CorpusSource) -> Iterator[TextIO]:
    """Whatever fails while it is read is a SpecBranchError that names the file."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise SpecBranchError(f"{path}: expected text in UTF-8 ({error.reason})") from None
    except OSError as error:
        raise SpecBranchError(f"{path}: {error.strerror or error}") from None


def _pieces(stream: TextIO, name: str) -> Iterator[str]:
    """They end with a line where lines are not too long: a word that is cut is one that nothing matches."""
    while piece := stream.read(PIECE):
        piece += stream.readline(PIECE)
        if "\0" in piece:
            raise SpecBranchError(f"{name}: expected text, found a NUL byte")
        yield piece


def _tokenized(name: str, pieces: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    while batch := list(islice(pieces, PIECES)):
        try:
            yield from tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
        except Exception as error:  # half a surrogate pair, for example, is no text
            raise SpecBranchError(f"{name}: cannot be tokenized: {error}") from error


def _check_memory(tokens: int) -> None:
    """Raises SpecBranchError where building an index takes more than there is."""
    if (free := available_memory()) is not None and tokens * BYTES_BUILT > free:
        raise SpecBranchError(_too_large(tokens))


def _too_large(tokens: int) -> str:
    free, needed = available_memory(), tokens * BYTES_BUILT / GIB
    there = "less is there" if free is None else f"{free / GIB:.2f} GiB are available"
    return f"the corpus has about {tokens} tokens; its index takes {needed:.2f} GiB while it is built, and {there}"


def available_memory() -> int | None:
    """Bytes that can be had without swapping, within the limit of a container; None where nobody says."""
    found: list[int] = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # ValueError: "max"
        pass
    return min(found, default=None)
