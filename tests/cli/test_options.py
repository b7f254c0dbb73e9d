"""Every option of every method has a switch, and none is ignored without a word."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from specbranch import METHODS, bundled
from specbranch.cli import main as cli
from specbranch.cli.arguments import sampling_options
from specbranch.cli.bench import command as bench
from specbranch.cli.drafting import defaults, drafting_options, options_by_name, switch
from specbranch.policies.methods import make_policy, options_of

GENERATE = ["generate", "--target", "bundled", "--draft", "bundled", "--prompt", "x"]
PROMPTS = str(bundled.path("target").parent / "prompts.jsonl")
BENCH = ["bench", "--target", "bundled", "--draft", "bundled", "--prompts", PROMPTS]
RECORD = ["record", "--target", "bundled", "--draft", "bundled", "--prompts", "p.jsonl", "--out", "r.safetensors"]
TRAIN = ["train-hrad", "--target", "bundled", "--draft", "bundled", "--prompts", "p.jsonl", "--out", "hrad"]
OPTIONS = options_by_name()
EVERY = [(method, option) for method in METHODS for option in options_of(method)]


def field_of(option: str):
    return next(iter(OPTIONS[option].values()))


def parse(*arguments: str) -> argparse.Namespace:
    return cli.build_parser().parse_args(arguments)


def written(option: str) -> list[tuple[list[str], object]]:
    """Ways to give an option on the command line, each with the value that it means."""
    field, flag = field_of(option), switch(option)
    if isinstance(field.default, bool):
        return [([flag], True), ([flag.replace("--", "--no-", 1)], False)]
    if field.metadata["choices"]:
        return [([flag, choice], choice) for choice in field.metadata["choices"]]
    ends = [end for end in (field.metadata["least"], field.metadata["most"]) if end is not None]
    kind = type(field.default)
    return [([flag, str(kind(end))], kind(end)) for end in [*ends, field.default]]


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    try:
        status = cli.main(arguments)
    except SystemExit as exit:
        status = int(exit.code or 0)
    assert status in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("specbranch: error: ")
    assert error.count("\n") == 1
    return error


# ---- every option has a switch


@pytest.mark.parametrize("command", [GENERATE, BENCH], ids=lambda command: command[0])
@pytest.mark.parametrize(("method", "option"), EVERY)
def test_every_option_of_every_method_has_a_switch(command, method, option):
    for given, value in written(option):
        options = drafting_options(parse(*command, *given))
        assert options == {option: value}
        assert type(options[option]) is type(field_of(option).default)
        assert getattr(make_policy(method, options), option) == value


@pytest.mark.parametrize("command", [RECORD, TRAIN], ids=lambda command: command[0])
def test_commands_that_decode_with_specbranch_have_its_options(capsys, command):
    for option in options_of("specbranch"):
        for given, value in written(option):
            assert drafting_options(parse(*command, *given)) == {option: value}
    assert "unrecognized arguments: --length 3" in one_line(capsys, *command, "--length", "3")


def test_options_of_one_name_differ_in_their_defaults_only():
    for fields in OPTIONS.values():
        assert len({(type(field.default), *map(str, field.metadata.values())) for field in fields.values()}) == 1


def test_nothing_is_passed_on_that_was_not_given():
    assert drafting_options(parse(*GENERATE)) == {}
    assert parse(*GENERATE, "--limit", "3").limit == 3  # of prompts
    assert drafting_options(parse(*GENERATE, "--limit", "3")) == {}


def test_help_names_methods_and_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    shown = " ".join(re.sub(r"-\n +", "-", capsys.readouterr().out).split())
    for option, fields in OPTIONS.items():
        assert f"{', '.join(fields)}: {field_of(option).metadata['help']} (default: " in shown
    assert "(default: any; specbranch-paper: point)" in shown
    assert "--verify-tail, --no-verify-tail" in shown


def test_the_page_of_settings_has_every_option_with_its_methods_and_default():
    """A line of the table is: switch, name in Python, methods, what it does, default."""
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(--[^`]*)` \| `(\w+)` \| ([^|]*) \| [^|]* \| ([^|]*) \|$", page, re.MULTILINE)
    assert {name: flag.split()[0] for flag, name, *_ in rows} == {name: switch(name) for name in OPTIONS}
    for _, name, methods, default in rows:
        assert re.findall(r"[\w-]+", methods) == list(OPTIONS[name])
        assert default == defaults(OPTIONS[name])


# ---- ranges


@pytest.mark.parametrize("option", [name for name in OPTIONS if field_of(name).metadata["least"] is not None])
def test_ranges_are_checked_when_the_arguments_are_parsed(capsys, option):
    low, high = field_of(option).metadata["least"], field_of(option).metadata["most"]
    expected = f"argument {switch(option)}: must be at least {low}" + ("" if high is None else f" and at most {high}")
    for bad in (low - 1, *([] if high is None else [high + 1])):
        assert f"{expected}, found {bad} " in one_line(capsys, *GENERATE, switch(option), str(bad))


def test_values_of_another_kind_are_refused(capsys):
    assert "--k-max: must be a whole number, found '1.5'" in one_line(capsys, *GENERATE, "--k-max", "1.5")
    assert "--epsilon: must be at least 0 and at most 1, found nan" in one_line(capsys, *GENERATE, "--epsilon", "nan")
    assert "--hedge: invalid choice: 'all'" in one_line(capsys, *GENERATE, "--hedge", "all")
    assert "--no-verify-tail: ignored explicit argument" in one_line(capsys, *GENERATE, "--verify-tail=yes")


# ---- options without effect


NOT_TAKEN = [(method, option) for method in METHODS for option in OPTIONS if option not in options_of(method)]


@pytest.fixture
def no_models(monkeypatch):
    for module in ("generate", "bench.command"):
        monkeypatch.setattr(f"specbranch.cli.{module}.load_engine", lambda args: pytest.fail("loaded"))


@pytest.mark.parametrize(("method", "option"), NOT_TAKEN)
def test_an_option_that_the_method_does_not_take_is_refused(capsys, no_models, method, option):
    expected = f"{switch(option)} has no effect with {method}; it is an option of {', '.join(OPTIONS[option])}\n"
    for given, _ in written(option):
        assert one_line(capsys, *GENERATE, "--method", method, *given) == f"specbranch: error: {expected}"


def test_bench_refuses_only_what_no_method_takes(capsys, monkeypatch, no_models):
    error = one_line(capsys, *BENCH, "--methods", "pearl,speculative", "--epsilon", "0.5")
    assert (
        "--epsilon has no effect with pearl, speculative, autoregressive; it is an option of specbranch-paper, "
        in error
    )
    loaded = []
    monkeypatch.setattr(bench, "load_engine", lambda args: loaded.append(drafting_options(args)) or 1 / 0)
    assert cli.main([*BENCH, "--methods", "pearl,specbranch-paper", "--epsilon", "0.5"]) == 1
    assert loaded == [{"epsilon": 0.5}]


@pytest.mark.parametrize(
    ("options", "used"),
    [
        (["--method", "pearl"], False),
        (["--method", "ssd"], False),
        (["--method", "specbranch-paper"], True),
        (["--method", "specbranch"], True),
        (["--no-calibrate"], False),
        (["--no-calibrate", "--decide-by-forecast"], True),
    ],
)
def test_hrad_needs_a_method_that_uses_it(capsys, monkeypatch, options, used):
    loaded = []
    monkeypatch.setattr("specbranch.cli.generate.load_engine", lambda args: loaded.append(args.hrad) or 1 / 0)
    assert cli.main([*GENERATE, "--hrad", "my-hrad", *options]) == 1
    assert loaded == (["my-hrad"] if used else [])
    assert ("--hrad has no effect with " in capsys.readouterr().err) is not used


def test_plan_takes_row_with_ratio_only(capsys):
    assert "--row has no effect without --ratio" in one_line(capsys, "plan", "no-such-record", "--row", "0.02")


# ---- devices, drafts and sampling without effect


RETRIEVED = ["generate", "--target", "bundled", "--draft", "retrieval", "--prompt", "x"]
ON = ["generate", "--target", "bundled", "--retrieval", "on", "--prompt", "x"]
ALONE = ["generate", "--target", "bundled", "--method", "autoregressive", "--prompt", "x"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([*ALONE, "--draft-device", "cpu"], "--draft-device has no effect without --draft"),
        ([*ALONE, "--device", "cpu", "--device-map", "auto"], "--device has no effect with --device-map\n"),
        (
            [*GENERATE, "--device", "cpu", "--device-map", "auto", "--draft-device", "cpu"],
            "--device has no effect with --device-map and --draft-device\n",
        ),
        ([*RECORD, "--device", "cpu", "--device-map", "auto", "--draft-device", "cpu"], "--device has no effect with"),
        ([*ALONE, "--overlap", "on"], "--overlap has no effect with autoregressive; it is for pearl, ssd, "),
        ([*GENERATE, "--method", "speculative", "--overlap", "off"], "--overlap has no effect with speculative"),
        ([*BENCH, "--methods", "speculative", "--overlap", "on"], "--overlap has no effect with speculative, auto"),
        ([*RETRIEVED, "--draft-device", "cpu"], "--draft-device has no effect with --draft retrieval\n"),
        ([*RETRIEVED, "--draft-weights", "int4"], "--draft-weights has no effect with --draft retrieval\n"),
        ([*RETRIEVED, "--draft-arithmetic", "fast"], "--draft-arithmetic has no effect with --draft retrieval\n"),
        ([*RETRIEVED, "--draft-context", "all"], "--draft-context has no effect with --draft retrieval\n"),
        ([*RETRIEVED, "--overlap", "on"], "--overlap has no effect with --draft retrieval\n"),
        ([*RETRIEVED, "--hrad", "my-hrad"], "--hrad has no effect with --draft retrieval\n"),
        ([*RETRIEVED, "--device", "cpu", "--device-map", "auto"], "--device has no effect with --device-map\n"),
        ([*ON, "--draft-weights", "int4"], "--draft-weights has no effect without --draft\n"),
        ([*ON, "--overlap", "off"], "--overlap has no effect without --draft\n"),
        (
            [*ALONE, "--draft-context", "all"],
            "--draft-context has no effect with autoregressive; it is for methods that",
        ),
    ],
)
def test_choices_of_devices_and_overlap_without_effect_are_refused(capsys, monkeypatch, tmp_path, arguments, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    monkeypatch.setattr("specbranch.cli.loading.load_pair", lambda *args, **options: pytest.fail("loaded"))
    assert expected in one_line(capsys, *arguments)


@pytest.mark.parametrize("command", [GENERATE, BENCH, RECORD, TRAIN], ids=lambda command: command[0])
@pytest.mark.parametrize("value", ["0", "0+0", "half", "", "-1+4", "4+-1", "1.5+2", "256", "+128"])
def test_bad_contexts_of_the_draft_are_one_line(capsys, command, value):
    expected = (
        f"draft_context is {value!r}; expected 'auto', 'all' or 'H+N', the first H tokens of a prompt and its last N"
    )
    assert expected in one_line(capsys, *command, f"--draft-context={value}")


def test_more_context_than_the_draft_has_positions_is_one_line(capsys):
    error = one_line(capsys, *GENERATE, "--draft-context", "100000+5")
    assert re.search(
        r"draft_context is 100000\+5; expected at most \d+ tokens together, the draft model's context", error
    )


def loaded_options(monkeypatch, *arguments: str) -> dict[str, object]:
    """What would be loaded."""
    loaded: list[dict[str, object]] = []

    def load(target, draft, **options):
        loaded.append({"target": target, "draft": draft, **options})
        raise ValueError("enough")

    monkeypatch.setattr("specbranch.cli.loading.load_pair", load)
    assert cli.main(arguments) == 1
    return loaded[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"device": "cpu", "draft_device": None}),
        (["--device", "cuda"], {"device": "cuda"}),
        (["--device-map", "auto", "--device", "cuda"], {"device": "cuda", "device_map": "auto"}),  # the draft's
        (["--overlap", "on"], {"overlap": True}),
        ([], {"draft_context": "auto"}),
        (["--draft-context", "all"], {"draft_context": "all"}),
        (["--draft-context", "256+128"], {"draft_context": "256+128"}),
        (["--trust-remote-code"], {"trust_remote_code": True}),
        (["--priority", "draft", "--no-cuda-graphs", "--device", "cuda"], {"priority": "draft", "cuda_graphs": False}),
    ],
)
def test_choices_with_effect_pass_without_a_word(capsys, monkeypatch, options, expected):
    found = loaded_options(monkeypatch, *GENERATE, *options)
    assert found["draft"] == "bundled"
    assert found.items() >= expected.items()
    assert capsys.readouterr().err == "specbranch: error: enough\n"


# ---- retrieval


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            [*ALONE, "--retrieval", "on"],
            "--retrieval has no effect with autoregressive; it is for speculative, adaptive, ",
        ),
        ([*ALONE, "--retrieval", "off"], "--retrieval has no effect with autoregressive; it is for speculative, "),
        (
            [*GENERATE, "--method", "specbranch-paper", "--retrieval", "on"],
            "--retrieval has no effect with specbranch-p",
        ),
        (
            [*BENCH, "--methods", "specbranch-paper", "--retrieval", "on"],
            "--retrieval has no effect with specbranch-pap",
        ),
        (
            [*RETRIEVED, "--retrieval", "off"],
            "--retrieval off leaves no draft with --draft retrieval; expected auto or on",
        ),
        (
            [*RETRIEVED, "--method", "specbranch-paper"],
            "--draft retrieval is no draft for specbranch-paper; it is for speculative, adaptive, pearl, ssd, spec",
        ),
        ([*ALONE, "--corpus", "f.txt"], "--corpus has no effect with autoregressive and --retrieval auto; it is for "),
        (
            [*GENERATE, "--corpus", "f.txt", "--retrieval", "off"],
            "--corpus has no effect with specbranch and --retrieval",
        ),
        (
            [*GENERATE, "--corpus", "f.txt", "--method", "pearl"],
            "--corpus has no effect with pearl and --retrieval auto; it is for --retrieval on with speculative, ",
        ),
        (
            [*GENERATE, "--corpus", "f.txt", "--no-thrifty"],
            "--corpus has no effect with specbranch and --retrieval auto",
        ),
        ([*ON, "--method", "specbranch-paper"], "--retrieval has no effect with specbranch-paper"),
        (["generate", "--target", "bundled", "--prompt", "x"], "--method specbranch needs --draft\n"),
        ([*RECORD, "--draft", "retrieval"], "record needs a draft model; --draft retrieval has none\n"),
        ([*TRAIN, "--draft", "retrieval"], "train-hrad needs a draft model; --draft retrieval has none\n"),
        (
            [*BENCH, "--draft", "retrieval", "--peers", "greedy,assisted"],
            "--peers assisted needs a draft model; --draft ",
        ),
        (["doctor", "--target", "bundled", "--draft", "retrieval"], "--draft retrieval is no model that could be exam"),
    ],
)
def test_retrieval_without_effect_is_refused(capsys, monkeypatch, tmp_path, arguments, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{number}"}}\n' for number in range(20)))
    monkeypatch.setattr("specbranch.cli.loading.load_pair", lambda *args, **options: pytest.fail("loaded"))
    assert f"specbranch: error: {expected}" in one_line(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (GENERATE, {"draft": "bundled", "retrieval": "auto", "corpus": None}),
        ([*GENERATE, "--retrieval", "off"], {"draft": "bundled", "retrieval": False, "corpus": None}),
        ([*GENERATE, "--corpus", "a", "b"], {"draft": "bundled", "retrieval": "auto", "corpus": ["a", "b"]}),
        ([*GENERATE, "--method", "pearl", "--retrieval", "on", "--corpus", "a"], {"retrieval": True, "corpus": ["a"]}),
        (RETRIEVED, {"draft": "retrieval", "retrieval": "auto"}),
        ([*RETRIEVED, "--method", "speculative", "--corpus", "a"], {"draft": "retrieval", "corpus": ["a"]}),
        (ON, {"draft": None, "retrieval": True}),
    ],
)
def test_retrieval_is_passed_on(monkeypatch, arguments, expected):
    assert loaded_options(monkeypatch, *arguments).items() >= expected.items()


def test_bench_leaves_out_the_peers_that_need_a_draft_model(monkeypatch):
    found = []
    monkeypatch.setattr(bench, "load_engine", lambda args: found.append(args.peers) or 1 / 0)
    assert cli.main([*BENCH, "--draft", "retrieval"]) == 1
    assert found == [("greedy", "prompt-lookup")]


def test_switches_for_gpus_are_warned_of_on_a_cpu(capsys, monkeypatch):
    loaded_options(monkeypatch, *GENERATE, "--priority", "draft", "--no-cuda-graphs")
    warning = "specbranch: warning: no effect on a CPU: --no-cuda-graphs, --priority draft\n"
    assert capsys.readouterr().err == warning + "specbranch: error: enough\n"


def test_a_draft_is_not_loaded_where_nothing_is_drafted(capsys, monkeypatch):
    assert loaded_options(monkeypatch, *GENERATE, "--method", "autoregressive")["draft"] is None
    warning = "specbranch: warning: no effect with --method autoregressive: --draft\n"
    assert capsys.readouterr().err == warning + "specbranch: error: enough\n"


def test_what_greedy_decoding_ignores_is_warned_of_and_left_out(capsys):
    arguments = parse(*RECORD, "--top-k", "5", "--top-p", "0.5", "--min-p", "0.1", "--seed", "3")
    neutral = {"max_new_tokens": 128, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    assert sampling_options(arguments) == neutral
    warning = "specbranch: warning: no effect at temperature 0: --top-k, --top-p, --min-p, --seed\n"
    assert capsys.readouterr().err == warning
    sampled = parse(*RECORD, "--temperature", "1", "--top-k", "5", "--seed", "3")
    assert sampling_options(sampled) == {**neutral, "temperature": 1.0, "top_k": 5, "seed": 3}
    assert capsys.readouterr().err == ""


def test_only_generate_takes_its_defaults_from_the_checkpoint():
    for command in (BENCH, RECORD, TRAIN):
        assert parse(*command).temperature == 0.0
    found = parse(*GENERATE)
    assert {found.temperature, found.top_k, found.top_p, found.min_p, found.max_new_tokens} == {None}
