"""The random-number contract: Philox4x32-10, and Gumbel noise that is a pure function of (seed, position, token)."""

import math
from typing import Any

import pytest
import torch
from implementations import on_cpu

from specbranch_ext import gumbel_noise, reference
from specbranch_ext.reference import gumbel_noise as noise_reference
from specbranch_ext.reference.noise import GUMBEL, gumbel, noise_words, philox

pytestmark = pytest.mark.usefixtures("implementation")

# Known answers published with Random123 (kat_vectors, philox4x32 with 10 rounds): counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[Any, ...]:
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    assert philox(words(counter), words(key)) == words(expected)


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 4, 7, 8, 31, 33, 1000, 20_001])
def test_noise_has_the_bits_of_the_reference(vocabulary):
    positions = torch.tensor([0, 1, 2**31, 2**32 + 5, 2**40])
    for seed in (0, 1, 2**32, 2**62 + 12345, -1):
        assert torch.equal(
            gumbel_noise(positions, vocabulary, seed=seed), noise_reference(positions, vocabulary, seed=seed)
        )


def test_noise_tail_words_have_the_bits_of_the_reference():
    positions, vocabulary, seed = torch.arange(4), 300_000, 11
    tail = noise_words(positions, vocabulary, seed, GUMBEL) < 65536
    assert tail.sum() >= 8  # one word in 65536 needs a second one
    noise = gumbel_noise(positions, vocabulary, seed=seed)
    assert torch.equal(noise[tail], noise_reference(positions, vocabulary, seed=seed)[tail])
    assert noise[tail].min() > math.log(65536) - 0.01


def test_noise_is_finite_and_uncut_at_both_ends():
    top, zero = torch.tensor(2**32 - 1), torch.tensor(0)
    assert gumbel(top, zero).item() == pytest.approx(-math.log(33 * math.log(2)), abs=1e-5)
    assert gumbel(zero, zero).item() == pytest.approx(65 * math.log(2), abs=1e-4)
    assert gumbel(zero, torch.tensor(2**31)).item() == pytest.approx(33 * math.log(2), abs=1e-4)


@pytest.mark.parametrize("word", [2**16, 2**20, 2**28, 2**30 - 1, 2**30, 2**31, 3 * 2**30, 2**32 - 2**20])
def test_noise_is_accurate(word):
    v = (word + 0.5) / 2**32
    exact = -math.log(-math.log1p(-v))
    assert gumbel(torch.tensor(word), torch.tensor(0)).item() == pytest.approx(exact, rel=4e-7, abs=4e-7)


def test_noise_has_the_gumbel_law():
    noise = gumbel_noise(torch.arange(20), 50_000, seed=3).flatten().double().sort().values
    law = torch.exp(-torch.exp(-noise))
    count = len(noise)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    distance = torch.maximum((steps[1:] - law).abs().max(), (law - steps[:-1]).abs().max()).item()
    assert distance < 1.95 / math.sqrt(count)  # Kolmogorov-Smirnov at 0.1 %


def test_noise_belongs_to_the_token_position_and_seed():
    positions = torch.tensor([7, 8])
    noise = gumbel_noise(positions, 1000, seed=5)
    assert torch.equal(gumbel_noise(positions, 1013, seed=5)[:, :1000], noise)  # padding the vocabulary
    assert torch.equal(gumbel_noise(positions.flip(0), 1000, seed=5), noise.flip(0))
    assert torch.equal(gumbel_noise(positions, 1000, seed=torch.tensor(5)), noise)
    for other in (gumbel_noise(positions, 1000, seed=6), gumbel_noise(positions + 2**32, 1000, seed=5)):
        assert not (other == noise).any()


def test_noise_touches_no_global_generator():
    before = torch.get_rng_state()
    gumbel_noise(torch.arange(3), 100, seed=1)
    reference.gumbel_noise(torch.arange(3), 100, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@on_cpu
@pytest.mark.parametrize(
    ("positions", "vocabulary", "seed", "name"),
    [
        (torch.zeros(2), 4, 0, "positions"),
        (torch.zeros(2, 2, dtype=torch.int64), 4, 0, "positions"),
        (torch.zeros(2, dtype=torch.int64), 0, 0, "vocabulary"),
        (torch.zeros(2, dtype=torch.int64), 4, torch.zeros(1, dtype=torch.int64), "seed"),
        (torch.zeros(2, dtype=torch.int64), 4, 2**64, "seed"),
    ],
)
def test_bad_input_is_named(positions, vocabulary, seed, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        gumbel_noise(positions, vocabulary, seed=seed)


def test_opcheck():
    torch.library.opcheck(torch.ops.specbranch.gumbel_noise.default, (torch.arange(3), 17, torch.tensor(3)))
