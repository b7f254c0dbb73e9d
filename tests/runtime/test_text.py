"""Text as it comes: whole characters, stop strings across tokens, the same text whether streamed or not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specbranch import SpecBranch
from specbranch.text.detokenizer import TextBuilder
from specbranch.text.encoding import encode


def build(pair: SpecBranch, text: str, **options: object) -> tuple[TextBuilder, list[str]]:
    builder = TextBuilder(pair.tokenizer, **options)  # type: ignore[arg-type]
    pieces = []
    for token in encode(pair.tokenizer, text):
        over = builder.add(token)
        pieces.append(builder.fresh())
        if over:
            break
    pieces.append(builder.fresh(final=True))
    return builder, pieces


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=120))
def test_pieces_join_to_the_text(bundled_pair: SpecBranch, text: str) -> None:
    builder, pieces = build(bundled_pair, text)
    assert "".join(pieces) == builder.text == text


def test_never_half_a_character(bundled_pair: SpecBranch) -> None:
    text = "print('naïve ☕ 👩‍🚀 done')" * 4
    _, pieces = build(bundled_pair, text)
    assert sum(bool(piece) for piece in pieces) > 10
    assert all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) == text


@pytest.mark.parametrize("stop", ["\nclass ", "# end", "   "])
def test_a_stop_string_ends_the_text_and_is_never_shown(bundled_pair: SpecBranch, stop: str) -> None:
    before = "def f(x):\n  return x\n# en\n"
    builder, pieces = build(bundled_pair, before + stop + "more text", stop=[stop])
    assert builder.stopped
    assert builder.text == "".join(pieces) == before
    assert len(builder.tokens) < len(encode(bundled_pair.tokenizer, before + stop + "more text"))


def test_the_earliest_of_several_stop_strings_counts(bundled_pair: SpecBranch) -> None:
    builder, _ = build(bundled_pair, "one two three", stop=["three", "two"])
    assert builder.text == "one "


def test_an_end_of_sequence_token_stays_and_is_not_shown(bundled_pair: SpecBranch) -> None:
    assert bundled_pair.tokenizer is not None
    eos = bundled_pair.tokenizer.eos_token_id
    builder = TextBuilder(bundled_pair.tokenizer, frozenset([eos]))
    tokens = [*encode(bundled_pair.tokenizer, "x = 1"), eos]
    assert [builder.add(token) for token in tokens] == [False] * (len(tokens) - 1) + [True]
    assert builder.text == "x = 1"
    assert builder.tokens[-1] == eos
