"""`specbranch bench --plot`: the picture, and what is refused before a model is loaded."""

from __future__ import annotations

import json

import pytest

from specbranch import bundled
from specbranch.cli import main as cli
from specbranch.cli.bench import plot
from specbranch.cli.bench.report import summarize
from specbranch.core.stats import CAUSES

PAIR = ["--target", "bundled", "--draft", "bundled", "--threads", "1"]
SIGNATURES = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


def records(task: str, *names: str) -> list[dict]:
    stats = {"drafted_tokens": 9, "new_tokens": 8, "tokens_per_target_forward": 2.0, "wasted_tokens": 6}
    stats |= dict(zip(CAUSES, (1, 2, 3, 0), strict=True))
    stats |= dict.fromkeys(("acceptance_rate", "hit_rate", "rollback_rate"), 0.5)
    return [
        {
            "name": name,
            "task": task,
            "id": id,
            "error": None,
            "new_tokens": 8,
            "tokens_per_second": speed,
            "decode_tokens_per_second": speed,
            "prefill_seconds": 0.1,
            "stats": stats if name == "specbranch" else None,
            "same_tokens": True,
            "first_difference": None,
            "memory_over_bytes": None,
        }
        for name in names
        for id, speed in (("a", 2.0), ("b", 3.0))
    ]


@pytest.mark.parametrize("suffix", SIGNATURES)
def test_picture_of_a_run(capsys, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    prompts, out = tmp_path / "p.jsonl", tmp_path / f"out.{suffix}"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in bundled.prompts()[:2]))
    options = ["--max-new-tokens", "8", "--peers", "none", "--plot", str(out)]
    assert cli.main(["bench", *PAIR, "--prompts", str(prompts), *options]) == 0
    assert out.read_bytes().startswith(SIGNATURES[suffix])
    assert plot.is_plot(out)  # so that the next run may replace it
    assert sorted(tmp_path.iterdir()) == [out, prompts]


def test_other_pictures_are_told_from_ours(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    for suffix in SIGNATURES:
        figure = Figure()
        figure.subplots().plot([1, 2])
        figure.savefig(tmp_path / f"out.{suffix}")
        assert not plot.is_plot(tmp_path / f"out.{suffix}")


def test_bars_and_whiskers_are_the_rows_figures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    shown = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (shown.append(figure), path.touch()))
    rows = summarize([*records("x", "specbranch", "autoregressive"), *records("y", "specbranch", "autoregressive")])
    plot.plot(str(tmp_path / "out.png"), rows, "title")
    (figure,) = shown
    speeds, rollbacks, causes = (figure.axes[first : first + 3] for first in (0, 3, 6))  # tasks x, y and all
    assert [axes.get_title() for axes in speeds] == ["x (2 prompts)", "y (2 prompts)", "all (4 prompts)"]
    assert [tick.get_text() for tick in speeds[0].get_yticklabels()] == ["specbranch", "autoregressive"]
    assert [tick.get_text() for tick in causes[0].get_yticklabels()] == ["specbranch"]
    assert [bar.get_width() for bar in speeds[0].patches] == [1.0, 1.0]
    assert [bar.get_width() for bar in rollbacks[1].patches] == [0.5]
    assert [(bar.get_x(), bar.get_width()) for bar in causes[2].patches] == [(0, 1 / 8), (1 / 8, 2 / 8), (3 / 8, 3 / 8)]


def test_a_run_without_drafts_has_speeds_only(tmp_path):
    pytest.importorskip("matplotlib")
    plot.plot(str(tmp_path / "out.png"), summarize(records("x", "autoregressive", "greedy")), "title")
    assert (tmp_path / "out.png").read_bytes().startswith(SIGNATURES["png"])


@pytest.mark.parametrize(
    ("name", "missing", "expected"),
    [
        ("out.json", False, "the name must end in one of .png, .svg"),
        ("out", False, "the name must end in one of .png, .svg"),
        ("out.png", True, "--plot needs matplotlib: pip install 'specbranch[plot]'"),
        ("missing/out.png", False, "No such file or directory"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_loaded(
    capsys, monkeypatch, tmp_path, name, missing, expected
):
    monkeypatch.setattr("specbranch.cli.bench.command.load_engine", lambda args: pytest.fail("loaded"))
    monkeypatch.setattr(
        "specbranch.core.extras.find_spec", lambda name: None if missing and name == "matplotlib" else object()
    )
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps(bundled.prompts()[0]))
    assert cli.main(["bench", *PAIR, "--prompts", str(prompts), "--plot", str(tmp_path / name)]) == 1
    assert expected in capsys.readouterr().err
