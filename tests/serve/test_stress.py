"""Many requests of all lengths, that come and go as they like."""

from __future__ import annotations

import random
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serving import served

from specbranch import SpecBranch, bundled

PROMPTS = [each["prompt"] for each in bundled.prompts()]
LENGTHS = (1, 3, 17, 40, 90)
PATH = "/v1/completions"


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.nightly)])
def test_every_finished_text_is_right_and_memory_is_flat(bundled_pair: SpecBranch, count: int) -> None:
    engine = SpecBranch(bundled_pair.target, bundled_pair.draft, tokenizer=bundled_pair.tokenizer, prompt_cache=3)
    chance = random.Random(count)
    asked = [
        {
            "prompt": chance.choice(PROMPTS[:12])[: chance.choice((40, 200, 2000))],
            "max_tokens": chance.choice(LENGTHS),
            "temperature": chance.choice((0, 0.8)),
            "seed": chance.randrange(3),
        }
        for _ in range(count)
    ]
    patience = [chance.choice((None, None, 0.02, 0.2, 1.0)) for _ in asked]
    arrivals = [chance.expovariate(40.0) for _ in asked]
    finished, left, lock = dict[int, str](), list[int](), threading.Lock()
    seen: list[int] = []

    def ask(number: int) -> None:
        body, limit = asked[number], patience[number]
        try:
            answer = httpx.post(f"{server.url}{PATH}", json=body, timeout=limit or 300)
        except httpx.TimeoutException:
            with lock:
                left.append(number)
            return
        assert answer.status_code == 200, answer.text
        with lock:
            finished[number] = answer.json()["choices"][0]["text"]

    with served(engine, at_once=8, most_waiting=count) as server, ThreadPoolExecutor(32) as pool:
        futures = []
        for number in range(count):
            time.sleep(arrivals[number])
            futures.append(pool.submit(ask, number))
            seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        for future in futures:
            future.result()
        server.wait(lambda: server.idle)
    assert len(finished) + len(left) == count
    assert len(finished) > count // 3
    assert left
    texts: dict[str, str] = {}
    for number, text in finished.items():
        body = dict(asked[number])
        key = repr(body)
        if key not in texts:
            prompt, most = body.pop("prompt"), body.pop("max_tokens")
            texts[key] = bundled_pair.generate(prompt, max_new_tokens=most, method="autoregressive", **body).text
        assert text == texts[key]
    assert seen[-1] - seen[count // 2] < 64 * 1024  # KiB: what half of them needed is enough for all
