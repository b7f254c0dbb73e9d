"""What look-ups in texts cost: building an index, a text that grows, and a look-up, at 10^6 and 10^7 tokens.

    python benchmarks/bench_retrieval.py [--sizes 1000000 10000000]

The text is made up, with the same seed each time: phrases of a book, some much likelier than others, of words that are
distributed by Zipf's law. It prints a line of JSON for each size. Bytes a token are those of the process after and
while the index is built, with what the allocator has kept for later.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from specbranch.core.suffix_index import SuffixIndex, continuations

VOCABULARY, PHRASES, LONGEST = 50_000, 300_000, 8
GROWTH, LOOKUPS, DRAFTED = 50_000, 2000, 3

Tokens = npt.NDArray[np.int32]


def zipf(count: int, power: float) -> npt.NDArray[np.float64]:
    weights = np.arange(1, count + 1) ** -power
    return np.asarray(weights / weights.sum())


def text(size: int, random: np.random.Generator) -> Tokens:
    lengths = random.integers(1, LONGEST + 1, PHRASES)
    begins = lengths.cumsum() - lengths
    book = random.choice(VOCABULARY, lengths.sum(), p=zipf(VOCABULARY, 1.05)).astype(np.int32)
    picks = random.choice(PHRASES, size // 3, p=zipf(PHRASES, 0.9))
    places = begins[picks] - (lengths[picks].cumsum() - lengths[picks])
    tokens = book[np.repeat(places, lengths[picks]) + np.arange(lengths[picks].sum())]
    assert len(tokens) >= size
    return np.asarray(tokens[:size])


def processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(": ")[2] if names else platform.machine()


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(size: int) -> dict[str, object]:
    random = np.random.default_rng(0)
    whole = text(size + GROWTH, random)
    tokens, more = whole[:size].copy(), whole[size:].tolist()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = resident()
    start = time.perf_counter()
    index = SuffixIndex(tokens)
    build = time.perf_counter() - start
    found: dict[str, object] = {
        "processor": processor(),
        "tokens": size,
        "build_seconds": round(build, 3),
        "bytes_a_token": round((resident() - before) / size, 1),
        "bytes_a_token_at_the_peak": round((peak() - before) / size, 1),
    }
    looked_up, grown = [], []
    for end in random.integers(100, size - 100, LOOKUPS).tolist():
        context = tokens[end - 61 : end + DRAFTED].tolist()
        start = time.perf_counter()
        continuations([index], context, DRAFTED)
        looked_up.append(1e6 * (time.perf_counter() - start))
    for token in more:
        start = time.perf_counter()
        index.extend([token])
        grown.append(1e6 * (time.perf_counter() - start))
    return found | {
        "look_up_us_median": round(statistics.median(looked_up), 1),
        "look_up_us_99th_percentile": round(statistics.quantiles(looked_up, n=100)[-1], 1),
        "extend_us_mean": round(statistics.mean(grown), 2),
        "extend_us_worst": round(max(grown), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 10_000_000])
    for size in parser.parse_args().sizes:
        print(json.dumps(measure(size)), flush=True)


if __name__ == "__main__":
    main()
