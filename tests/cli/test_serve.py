"""`specbranch serve` as a process: its address, its end, and what it needs."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest

from specbranch import SpecBranch, bundled
from specbranch.cli import main as cli

ALONE = ["--target", "bundled", "--method", "autoregressive", "--dtype", "float32", "--threads", "1"]
PROMPT = bundled.prompts()[0]["prompt"]
LONG = {"prompt": PROMPT, "max_tokens": 900}  # seconds, in which the others come
SHORT = {"prompt": PROMPT, "max_tokens": 20, "temperature": 1}


class Process:
    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "specbranch.cli.main", "serve", *ALONE, "--port", "0", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.line = self.process.stdout.readline()
        assert self.line, self.process.communicate()
        self.url = self.line.rstrip("\n").split(" at ")[1]

    def post(self, body: dict) -> httpx.Response:
        return httpx.post(f"{self.url}/completions", json=body, timeout=120)

    def health(self) -> dict:
        return httpx.get(f"{self.url.removesuffix('/v1')}/health", timeout=60).json()

    def wait_for(self, **expected: int) -> None:
        end = time.monotonic() + 60
        while any(self.health()[name] != value for name, value in expected.items()):
            assert time.monotonic() < end
            time.sleep(0.01)

    def end(self) -> tuple[int, list[str]]:
        """Its status, and the lines of its stderr."""
        out, errors = self.process.communicate(timeout=60)
        assert out == ""
        return self.process.returncode, errors.splitlines()


@contextmanager
def serving(*arguments: str) -> Iterator[Process]:
    served = Process(*arguments)
    try:
        yield served
    finally:
        served.process.kill()
        served.process.wait()
        served.process.stdout.close()
        served.process.stderr.close()


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["serve", *ALONE, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


# ---- constraints


def test_whitespace_in_json_where_the_server_allows_it(bundled_pair):
    """A bias makes the model want it."""
    (newline,) = bundled_pair.encode("\n")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    with serving("--json-whitespace") as server:
        body = {"prompt": "x", "max_tokens": 4, "response_format": wanted, "logit_bias": {str(newline): 100}}
        assert server.post(body).json()["choices"][0]["text"].startswith("{\n")


# ---- the end


def test_sigterm_ends_it_when_all_have_their_answers(bundled_pair):
    with serving("--max-requests", "1") as server, ThreadPoolExecutor() as pool:
        assert server.line.startswith("specbranch: serving bundled at http://127.0.0.1:")
        posted = [pool.submit(server.post, LONG)]
        server.wait_for(running=1)
        posted += [pool.submit(server.post, {**SHORT, "seed": seed}) for seed in (1, 2)]
        server.wait_for(running=1, waiting=2)
        server.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 30
        while server.health()["status"] != "shutting down":
            assert time.monotonic() < end
        refused = server.post(LONG)
        assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the server is shutting down")
        assert not posted[-1].done()
        texts = [answer.result().json()["choices"][0]["text"] for answer in posted]
        ended, lines = server.end()
    long, *short = texts
    assert long == bundled_pair.generate(PROMPT, max_new_tokens=900).text
    assert short == [bundled_pair.generate(PROMPT, max_new_tokens=20, seed=n, temperature=1).text for n in (1, 2)]
    assert ended == 0
    told = "specbranch: shutting down: 3 requests are still answered; a second signal ends at once"
    lines.remove(told)  # a tenth of a second after the signal, so that the refusal may come first
    assert sorted(line.split(", ")[-1] for line in lines) == ["length"] * 3 + ["the server is shutting down"]


def test_a_second_signal_ends_it_at_once():
    with serving() as server, ThreadPoolExecutor() as pool:
        posted = pool.submit(server.post, LONG)
        server.wait_for(running=1)
        server.process.send_signal(signal.SIGTERM)
        while server.health()["status"] != "shutting down":
            pass
        server.process.send_signal(signal.SIGTERM)
        status, _ = server.end()
        assert status == -signal.SIGTERM
        with pytest.raises(httpx.TransportError):
            posted.result()


# ---- what it is told


def test_a_name_a_template_a_limit_and_a_cache_of_its_own(tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    options = ["--served-model-name", "mine", "--chat-template", str(template), "--max-new-tokens", "5", "--quiet"]
    with serving(*options) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["mine"]
        answer = client.chat.completions.create(model="mine", messages=[{"role": "user", "content": PROMPT}])
        plain = SpecBranch.from_pretrained("bundled", dtype="float32", method="autoregressive")
        assert answer.choices[0].message.content == plain.generate(PROMPT, max_new_tokens=5).text
        longer = PROMPT + "    x = 1\n"
        again = client.chat.completions.create(model="mine", messages=[{"role": "user", "content": longer}])
        assert again.choices[0].message.content == plain.generate(longer, max_new_tokens=5).text
        assert (again.usage.prompt_tokens_details.cached_tokens or 0) > 5
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="bundled", prompt="x")
        server.process.send_signal(signal.SIGINT)
        told = "specbranch: shutting down: 0 requests are still answered; a second signal ends at once"
        assert server.end() == (130, [told])


def test_a_port_that_is_in_use_is_one_line(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        message = f"specbranch: error: cannot listen on 127.0.0.1, port {port}: Address already in use\n"
        assert failure(capsys, "--port", str(port)) == message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid, port 8000: "),
        (["--chat-template", "no-such-file"], "--chat-template no-such-file: No such file or directory"),
        (["--method", "specbranch"], "--method specbranch needs --draft"),
        (["--length", "3"], "--length has no effect with autoregressive"),
    ],
)
def test_what_cannot_run_fails_on_one_line(capsys, arguments, expected):
    assert f"specbranch: error: {expected}" in failure(capsys, *arguments)


@pytest.mark.parametrize("content", [b"", b"\xff"])
def test_a_template_that_is_none_is_named(capsys, tmp_path, content):
    file = tmp_path / "chat.jinja"
    file.write_bytes(content)
    assert f"--chat-template {file}" in failure(capsys, "--port", "0", "--chat-template", str(file))


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_without_the_extra_it_says_what_to_install(capsys, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    expected = f"specbranch: error: specbranch serve needs {missing}: pip install 'specbranch[serve]'\n"
    assert failure(capsys) == expected
