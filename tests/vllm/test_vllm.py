"""Our draft inside vLLM, with vLLM: the bundled pair behind vLLM's server, beside vLLM without a draft."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from specbranch import bundled

pytestmark = pytest.mark.vllm

TARGET = str(bundled.path("target"))
NEW = 64
MOST = 6
SAMPLES = 1500
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
SPECULATIVE = {
    "method": "custom_class",
    "model": "specbranch.integrations.vllm.SpecBranchProposer",
    "num_speculative_tokens": MOST,
}
# Whatever a step of so small a model takes here: it is to draft.
OURS = {"draft": "bundled", "policy": {"thrifty": False, "epsilon": 0.3}}


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    lines = (Path(TARGET).parent / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines[:16]]


# vLLM alone, greedy; then with our draft, sampled. One process for both saves the time of its imports.
ENGINES = """
import json, sys
import torch
from vllm import LLM, SamplingParams
from vllm.v1.sample import rejection_sampler

def spread(x, ends, tokens, replace_from=0, replace_to=0):
    # What vLLM 0.32.0 means to do; on a CPU it does that to a copy.
    found = x.repeat_interleave(torch.diff(ends, prepend=ends.new_zeros(1)).long())
    return torch.where(found == replace_from, replace_to, found) if replace_from != replace_to else found

given = json.load(sys.stdin)
setup = {"dtype": "float32", "enforce_eager": True, "disable_log_stats": False}
greedy = SamplingParams(temperature=0, max_tokens=given["new"])
plain = LLM(given["target"], max_num_seqs=16, **setup).generate(given["prompts"], greedy, use_tqdm=False)

rejection_sampler.expand_batch_to_tokens = spread
llm = LLM(given["target"], max_num_seqs=64, seed=1, speculative_config=given["speculative"],
          additional_config={"specbranch": given["ours"]}, **setup)
sampling = SamplingParams(temperature=0.9, max_tokens=2, ignore_eos=True)
texts = llm.generate([given["prompts"][0]] * given["samples"], sampling, use_tqdm=False)
drafted = sum(each.value for each in llm.get_metrics() if each.name == "vllm:spec_decode_num_draft_tokens")
print("\\n" + json.dumps({
    "greedy": [list(text.outputs[0].token_ids) for text in plain],
    "sampled": [text.outputs[0].token_ids[1] for text in texts],
    "drafted": drafted,
}))
"""


@pytest.fixture(scope="module")
def engines(prompts: list[str]) -> dict[str, Any]:
    """What those two gave."""
    given: dict[str, Any] = {"target": TARGET, "speculative": SPECULATIVE, "ours": OURS, "prompts": prompts}
    given |= {"samples": SAMPLES, "new": NEW}
    environment = {**os.environ, **ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-c", ENGINES]
    done = subprocess.run(command, input=json.dumps(given), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"greedy')))
    return found


@pytest.fixture(scope="module")
def expected(engines: dict[str, Any]) -> list[list[int]]:
    """vLLM's own greedy texts, as token ids."""
    texts: list[list[int]] = engines["greedy"]
    return texts


class Server:
    """vLLM's, with our draft."""

    def __init__(self, log: Path, **options: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [
            # What `vllm serve` runs; the command itself wants a distribution named vllm, and the CPU build is vllm-cpu.
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", TARGET),
            *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "bundled"),
            *("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16", "--return-tokens-as-token-ids"),
            *("--speculative-config", json.dumps(SPECULATIVE)),
            *("--additional-config", json.dumps({"specbranch": {**OURS, **options}})),
        ]
        self._log = log
        self.url = f"http://127.0.0.1:{port}"
        with log.open("w") as to:
            self._process = subprocess.Popen(
                command, env={**os.environ, **ENVIRONMENT}, stdout=to, stderr=to, start_new_session=True
            )

    def wait(self) -> None:
        until = time.monotonic() + 300
        while time.monotonic() < until:
            assert self._process.poll() is None, self.said
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.5)
        raise AssertionError(self.said[-3000:])

    @property
    def said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def complete(self, prompt: str, **options: Any) -> list[list[int]]:
        """Token ids of every choice."""
        request = {"model": "bundled", "prompt": prompt, "logprobs": 0, "max_tokens": NEW, "temperature": 0, **options}
        answer = httpx.post(f"{self.url}/v1/completions", json=request, timeout=300)
        assert answer.status_code == 200, answer.text
        return [ids(choice) for choice in answer.json()["choices"]]

    def count(self, name: str) -> float:
        """A counter of vLLM's metrics."""
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(value) for value in re.findall(rf"^vllm:{name}_total{{.*}} (\S+)$", text, re.MULTILINE))

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait()


def ids(choice: dict[str, Any]) -> list[int]:
    return [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, expected: list[list[int]]) -> Iterator[Server]:
    """expected: made before, so that two engines do not start at once."""
    running = Server(tmp_path_factory.mktemp("vllm") / "log")
    try:
        running.wait()
        yield running
        faults = [line for line in running.said.splitlines() if "no more" in line or "Traceback" in line]
        assert faults == []
    finally:
        running.close()


def test_greedy_texts_are_vllms_own(server: Server, prompts: list[str], expected: list[list[int]]) -> None:
    before = server.count("spec_decode_num_accepted_tokens")
    for prompt, tokens in zip(prompts[:4], expected[:4], strict=True):
        assert server.complete(prompt) == [tokens]
    assert server.count("spec_decode_num_accepted_tokens") - before > NEW
    assert "SpecBranch drafts with bundled" in server.said


def test_sixteen_at_once(server: Server, prompts: list[str], expected: list[list[int]]) -> None:
    before = server.count("spec_decode_num_accepted_tokens")
    with ThreadPoolExecutor(16) as pool:
        assert [text for (text,) in pool.map(server.complete, prompts)] == expected
    assert server.count("spec_decode_num_accepted_tokens") - before > 4 * NEW


def test_aborted_requests(server: Server, prompts: list[str], expected: list[list[int]]) -> None:
    """Clients that leave in the middle of a text, while others stay."""

    def leave(prompt: str) -> None:
        request = {"model": "bundled", "prompt": prompt, "max_tokens": 400, "temperature": 0, "stream": True}
        request["ignore_eos"] = True
        with httpx.stream("POST", f"{server.url}/v1/completions", json=request, timeout=300) as stream:
            for number, _ in enumerate(stream.iter_lines()):
                if number > 4:
                    break

    with ThreadPoolExecutor(16) as pool:
        leaving = [pool.submit(leave, prompt) for prompt in prompts[:8]]
        assert [text for (text,) in pool.map(server.complete, prompts[8:])] == expected[8:]
        for each in leaving:
            each.result()
    assert server.complete(prompts[0]) == [expected[0]]


def test_what_this_vllm_cannot_do_is_said(server: Server) -> None:
    assert "this vLLM loses temperatures and filters when it verifies drafts" in server.said


def test_sampled_tokens_have_the_targets_law(engines: dict[str, Any], prompts: list[str]) -> None:
    """The second token comes out of a verification: its frequencies are those of all first tokens together."""
    assert engines["drafted"] > SAMPLES / 2
    found, law = Counter(engines["sampled"]), second_token_law(prompts[0])
    likely = [token for token in law.argsort(descending=True).tolist() if law[token] * SAMPLES >= 8]
    chances = [float(law[token]) for token in likely]
    cells = [(found[token], chance) for token, chance in zip(likely, chances, strict=True)]
    cells.append((SAMPLES - sum(found[token] for token in likely), 1 - sum(chances)))
    statistic = sum((count - SAMPLES * chance) ** 2 / (SAMPLES * chance) for count, chance in cells)
    degrees = len(cells) - 1
    assert degrees >= 5
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5 + 6


def second_token_law(prompt: str) -> torch.Tensor:
    """[V]: chances of the second token after a prompt, at the temperature."""
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(TARGET), AutoModelForCausalLM.from_pretrained(TARGET)
    text = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        first = (model(text).logits[0, -1] / 0.9).softmax(-1)
        law = torch.zeros_like(first)
        for tokens in (first > 1e-6).nonzero()[:, 0].split(64):
            texts = torch.cat([text.expand(len(tokens), -1), tokens[:, None]], 1)
            law += (first[tokens, None] * (model(texts).logits[:, -1] / 0.9).softmax(-1)).sum(0)
    return law / law.sum()
