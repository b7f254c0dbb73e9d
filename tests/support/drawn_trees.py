"""Hypothesis strategies for what a tree holds."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from specbranch.core.suffix_index import Continuations, SuffixIndex, continuations
from specbranch.core.tree import Proposals, Signals

CHANCES = st.one_of(st.sampled_from((0.0, 0.25, 0.5, 1.0)), st.floats(0, 1, allow_subnormal=False))  # ties are common
SIGNALS = st.builds(
    Signals,
    st.floats(0, 1),
    st.floats(0, 12),
    st.one_of(st.floats(0, 40), st.just(math.inf)),
    st.integers(0, 40),
    st.floats(-7, 7),
    st.floats(-7, 7),
)


@st.composite
def proposals(draw: st.DrawFn) -> Proposals:
    tokens = draw(st.lists(st.integers(-3, 9), min_size=1, max_size=5, unique=True))
    return Proposals(tuple(tokens), tuple(draw(CHANCES) for _ in tokens), draw(st.none() | SIGNALS))


TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=24)  # which repeat themselves


@st.composite
def found_tokens(draw: st.DrawFn) -> Continuations:
    """What followed the end of a text, of which some is drafted, in itself and in another text."""
    text, drafted = draw(TEXTS), draw(st.lists(st.integers(0, 3), max_size=2))
    near = draw(st.none() | st.tuples(st.integers(0, 1), st.integers(0, 9), st.integers(9, 24)))
    limits = {"depth": draw(st.integers(1, 8)), "most_nodes": draw(st.integers(1, 12))}
    return continuations(
        [SuffixIndex(text), SuffixIndex(draw(TEXTS))], [*text, *drafted], len(drafted), near=near, **limits
    )
