"""A tokenizer as llguidance reads it: the bytes of every token, and which tokens end a text. Made once and kept as long
as the tokenizer."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from specbranch.core.checks import shown, whole
from specbranch.core.errors import SpecBranchError
from specbranch.core.extras import check_installed

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from tokenizers.normalizers import Normalizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


class Spelling:
    """The tokens of one tokenizer in a vocabulary of one size, with what ends a text."""

    def __init__(self, tokens: LLTokenizer, vocabulary: int, eos: frozenset[int]) -> None:
        self.tokens = tokens
        self.vocabulary = vocabulary
        self.eos = eos
        self.width = 4 * -(-vocabulary // 32)
        """Bytes of a mask."""
        self.ends = self._with_ends(bytes(self.width), True)
        """The mask of those tokens alone that end a text."""

    def mask(self, found: bytes, accepting: bool) -> bytes:
        """llguidance's mask, one word longer at times, as that of this vocabulary. A text may end exactly where it
        satisfies the grammar: llguidance also lets it where nothing else may follow, and where the grammar itself names
        a token that ends a text."""
        found = found[: self.width]
        if all((found[token >> 3] >> (token & 7)) & 1 == accepting for token in self.eos):
            return found
        return self._with_ends(found, accepting)

    def _with_ends(self, mask: bytes, allowed: bool) -> bytes:
        bits = bytearray(mask)
        for token in self.eos:
            if allowed:
                bits[token >> 3] |= 1 << (token & 7)
            else:
                bits[token >> 3] &= ~(1 << (token & 7))
        return bytes(bits)


_lock = threading.Lock()
_known: WeakKeyDictionary[PreTrainedTokenizerBase, dict[tuple[int, int, frozenset[int]], Spelling]] = (
    WeakKeyDictionary()
)


def spelling(tokenizer: PreTrainedTokenizerBase | None, vocabulary: int, eos: Iterable[int]) -> Spelling:
    """That of a tokenizer whose model has so many logits. The first call for a tokenizer takes seconds where it has
    100,000 tokens; what it made is dropped with the tokenizer.

    Raises SpecBranchError where there is no tokenizer, for one that is not of the library tokenizers, has more ids than
    the vocabulary or cannot be read byte by byte, and for tokens that cannot end a text; MissingPackageError without
    llguidance.
    """
    if tokenizer is None:
        raise SpecBranchError("a constraint needs a tokenizer: pass tokenizer=")
    vocabulary = whole("vocabulary", vocabulary, least=1)
    ends = frozenset(eos)
    if not ends:
        raise SpecBranchError("a constraint needs a token that ends the text: eos_token_id is not set")
    if beyond := [token for token in sorted(ends) if not 0 <= token < vocabulary]:
        raise SpecBranchError(f"eos_token_id is {beyond[0]}; expected an id of the vocabulary, 0 to {vocabulary - 1}")
    from transformers import PreTrainedTokenizerFast  # here, since a constraint is made without transformers

    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise SpecBranchError(
            f"the tokenizer is a {type(tokenizer).__name__}; for a constraint expected one of the library tokenizers"
            " (a fast one, with a tokenizer.json)"
        )
    key = len(tokenizer), vocabulary, ends  # tokens may have been added since
    with _lock:
        of_tokenizer = _known.setdefault(tokenizer, {})
        if key not in of_tokenizer:
            of_tokenizer[key] = Spelling(_read(tokenizer, vocabulary, ends), vocabulary, ends)
        return of_tokenizer[key]


def _read(tokenizer: PreTrainedTokenizerFast, vocabulary: int, eos: frozenset[int]) -> LLTokenizer:
    try:
        from llguidance import LLTokenizer
    except ImportError:
        check_installed("a constraint", "grammar")
        raise
    ids = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if ids > vocabulary:
        raise SpecBranchError(
            f"the tokenizer has {ids} ids, the model's vocabulary {vocabulary}: a constraint needs a row for each"
        )
    backend = copy.copy(tokenizer.backend_tokenizer)  # the original stays as it is
    backend.normalizer = _of_blanks(backend.normalizer)
    backend.no_padding()
    backend.no_truncation()
    try:
        return LLTokenizer(backend.to_str(), n_vocab=vocabulary, eos_token=sorted(eos))
    except Exception as error:  # of a tokenizer that has no bytes, or none that llguidance finds
        reason = shown(str(error).partition("\n")[0], 200)[1:-1]
        raise SpecBranchError(f"the tokenizer cannot be used for a constraint: {reason}") from error


def _of_blanks(normalizer: Normalizer | None) -> Normalizer | None:
    """The parts of a normalizer that say how blanks are written. One that composes characters (NFC) would have forced
    text that is not composed, such as a value of an enum, spelled as another text."""
    from tokenizers import normalizers

    parts: list[Normalizer | None] = [normalizer]
    if isinstance(normalizer, normalizers.Sequence):
        parts = [normalizer[place] for place in range(len(normalizer))]
    kept = [part for part in parts if isinstance(part, (normalizers.Prepend, normalizers.Replace))]
    return normalizers.Sequence(kept) if kept else None
