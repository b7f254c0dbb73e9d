"""`specbranch chat`: a line a message from a pipe, and a terminal with Ctrl-C."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from serving import TEMPLATE, chat_template

from specbranch import SpecBranch, bundled
from specbranch.cli import main as cli
from specbranch.cli.chat import Chat
from specbranch.together import Together

PAIR = ["--target", "bundled", "--draft", "bundled", "--dtype", "float32", "--threads", "1"]
ALONE = ["--target", "bundled", "--method", "autoregressive", "--threads", "1"]
PROMPT = bundled.prompts()[0]["prompt"].strip().splitlines()[0]


@pytest.fixture
def template(tmp_path: Path) -> str:
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    return str(file)


@pytest.fixture
def engine(bundled_pair: SpecBranch) -> Iterator[SpecBranch]:
    with chat_template(bundled_pair):
        yield bundled_pair


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def chat(engine: SpecBranch, system: str | None = None, **options: object) -> Chat:
    return Chat(engine, system, {"max_new_tokens": 8, **options})


# ---- from a pipe


def test_each_line_is_answered_with_all_before_it(capsys, monkeypatch, engine, template):
    """The text is what the engine says to the whole conversation."""
    system, messages, said = {"role": "system", "content": "Python"}, ["def f(x):", "def g(x):"], []
    history = [system]
    for message in messages:
        said.append(engine.generate([*history, user(message)], max_new_tokens=8).text)
        history += [user(message), assistant(said[-1])]
    fresh = engine.generate([system, user("x = 1")], max_new_tokens=8).text
    lines = [*messages, "", "/clear", "x = 1", "/exit", "never read"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    options = ["--chat-template", template, "--system", "Python", "--max-new-tokens", "8"]
    assert cli.main(["chat", *PAIR, *options]) == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(f"{text}\n" for text in (*said, fresh))
    assert captured.err == "specbranch: cut off after 8 tokens, which --max-new-tokens sets\n" * 3


@pytest.mark.parametrize(("options", "reuses"), [([], True), (["--prompt-cache", "0"], False)])
def test_the_next_answer_reads_what_is_new_only(capsys, monkeypatch, template, options, reuses):
    monkeypatch.setattr(sys, "stdin", io.StringIO("def f(x):\n/stats\ndef g(x):\n/stats\n"))
    assert cli.main(["chat", *PAIR, "--chat-template", template, "--max-new-tokens", "8", *options]) == 0
    out = capsys.readouterr().out
    first, second = (int(found) for found in re.findall(r"^reused tokens: (\d+)$", out, re.MULTILINE))
    assert first == 0
    assert (second > 4) == reuses


def test_commands(capsys, monkeypatch, engine):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/stats\n/help\n{PROMPT}\n/stats\n/nothing\n/usr/bin\n"))
    talk = chat(engine)
    assert talk.run() is False
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "no answer yet"
    assert [line.split()[0] for line in lines[1:5]] == ["/help", "/stats", "/clear", "/exit"]
    prompt = len(engine.encode([user(PROMPT)]))
    assert {"method specbranch, ended by length", f"prompt tokens: {prompt}", "new tokens: 8"} <= {*lines}
    assert "specbranch: unknown command /nothing: /help lists them; a message may begin with a space\n" in captured.err
    assert [message["content"] for message in talk.messages[::2]] == [PROMPT, "/usr/bin"]


def test_a_message_that_fails_is_reported_and_the_others_go_on(capsys, monkeypatch, engine, template):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'word ' * 3000}\n{PROMPT}\n"))
    assert cli.main(["chat", *PAIR, "--chat-template", template, "--max-new-tokens", "8"]) == 1
    captured = capsys.readouterr()
    assert captured.out == f"\n{engine.generate([user(PROMPT)], max_new_tokens=8).text}\n"
    first = captured.err.splitlines()[0]
    assert first.startswith("specbranch: error: prompt and new tokens together are ")
    assert first.endswith("context holds 1024; your message is not part of the conversation")


def test_without_a_limit_an_answer_has_room(capsys, engine):
    talk = chat(engine, max_new_tokens=None)
    question = "x = 1\n" * 220
    room = 1024 - len(engine.encode([user(question)]))
    assert 0 < room < 200
    talk.answer(question)
    assert talk.last is not None
    assert (len(talk.last.tokens) == room) == (talk.last.finish_reason == "length")
    assert talk.last.text == engine.generate([user(question)], max_new_tokens=room).text


def test_a_model_without_a_template_is_refused_by_name(capsys):
    assert cli.main(["chat", *PAIR]) == 1
    expected = "specbranch: error: --target bundled has no chat template: use generate, or pass --chat-template\n"
    assert capsys.readouterr().err == expected


# ---- Ctrl-C and failures


def raising_in_round(monkeypatch: pytest.MonkeyPatch, number: int, error: type[BaseException]) -> None:
    verify, calls = Together.verify, iter(range(10_000))

    def raising(self, texts):
        if next(calls) == number:
            raise error
        return verify(self, texts)

    monkeypatch.setattr(Together, "verify", raising)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("held_back", [False, True])
@pytest.mark.parametrize(("error", "fault"), [(KeyboardInterrupt, "interrupted"), (RuntimeError, "error: ")])
def test_the_text_so_far_is_kept(capsys, monkeypatch, engine, error, fault, held_back):
    """Also what was not shown yet, since a stop string may begin with it."""
    whole = engine.generate([user(PROMPT)], max_new_tokens=60).text
    talk = chat(engine, max_new_tokens=60, stop=whole + "." if held_back else None)
    with monkeypatch.context() as patch:
        raising_in_round(patch, 5, error)
        assert talk.answer(PROMPT) is False
    captured = capsys.readouterr()
    question, answer = talk.messages
    assert question == user(PROMPT)
    assert whole.startswith(answer["content"])
    assert 0 < len(answer["content"]) < len(whole)
    assert captured.out == answer["content"] + "\n"
    assert captured.err.startswith(f"specbranch: {fault}")
    following = engine.generate([*talk.messages, user("x")], max_new_tokens=60).text
    assert talk.answer("x") is True
    assert talk.messages[-1] == assistant(following)


@pytest.mark.usefixtures("terminal")
def test_a_message_without_an_answer_is_forgotten(capsys, monkeypatch, engine):
    talk = chat(engine)
    with monkeypatch.context() as patch:
        raising_in_round(patch, 0, KeyboardInterrupt)
        assert talk.answer(PROMPT) is False
    assert talk.messages == []
    assert "interrupted; your message is not part of the conversation" in capsys.readouterr().err


def test_in_a_script_ctrl_c_ends_the_chat(capsys, monkeypatch, engine, template):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n{PROMPT}\n"))
    raising_in_round(monkeypatch, 5, KeyboardInterrupt)
    assert cli.main(["chat", *PAIR, "--chat-template", template, "--max-new-tokens", "60"]) == 130
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert captured.err == "specbranch: interrupted\n"


class Pty:
    """The command at a terminal."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "dumb"
            os.execv(sys.executable, [sys.executable, "-m", "specbranch.cli.main", "chat", *ALONE, *arguments])
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        time.sleep(0.2)  # Python does not see one that comes while a prompt is being set up
        self.type("\x03")

    def wait(self, condition: Callable[[str], bool]) -> str:
        """What was shown since the last time, when it has come to this."""
        end = time.monotonic() + 60
        while not condition(self.shown):
            assert time.monotonic() < end, self.shown
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self._master, 4096).decode(errors="replace").replace("\r", "")
                except OSError:  # it has ended
                    break
        shown, self.shown = self.shown, ""
        return shown

    def status(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@contextmanager
def at_terminal(*arguments: str) -> Iterator[Pty]:
    terminal = Pty(*arguments)
    try:
        yield terminal
    finally:
        try:
            os.kill(terminal.pid, signal.SIGKILL)
            os.waitpid(terminal.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def prompt(shown: str) -> bool:
    return shown.endswith("> ")


def test_at_a_terminal_ctrl_c_ends_the_answer_and_ctrl_d_the_chat(template):
    with at_terminal("--chat-template", template, "--max-new-tokens", "900") as terminal:
        terminal.wait(prompt)
        terminal.type("half a line")
        terminal.wait(lambda shown: shown.endswith("half a line"))
        terminal.interrupt()
        terminal.wait(prompt)
        terminal.type("def f(x):\n")
        terminal.wait(lambda shown: len(shown) > 40)
        terminal.interrupt()
        assert "specbranch: interrupted\n> " in terminal.wait(prompt)
        terminal.type("/stats\n")
        assert "ended by interrupted" in terminal.wait(prompt)
        terminal.type("\x04")
        assert terminal.status() == 0
