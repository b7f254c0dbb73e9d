"""Tables at any width: no line is too long, names fold, and every figure is there in one piece."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from rich.cells import cell_len

from specbranch.cli import demo, doctor, plan, train_hrad
from specbranch.cli.bench import report
from specbranch.cli.tables import FoldedTable, figures, key
from specbranch.cli.terminal import output_console

NAMES = ["specbranch-paper", "a-contender-whose-name-is-longer-than-any-that-there-is", "\u8349\u7a3f\u6a21\u578b" * 6]
TASK = "a-task-with-a-rather-long-name"


def bench() -> list[Any]:
    row = {
        "task": TASK,
        "tokens_per_second": 123456.78,
        "ratio_to_greedy": 1234.56,
        "ratio_to_greedy_interval": (1234.51, 1234.62),
        "ratio_to_autoregressive": 987.65,
        "decode_tokens_per_second": 7654321.09,
        "decode_ratio_to_greedy": 2345.67,
        "same_tokens": False,
        "prompts_with_same_tokens": 1004,
        "prompts": 1119,
        "tokens_per_target_forward": 12.57,
        "acceptance_rate": 0.93,
        "hit_rate": 0.82,
        "rollback_rate": 0.71,
        "wasted_per_token": 1023.46,
    }
    return list(report.tables([{**row, "name": name} for name in NAMES], "bfloat16, threads: 2, new tokens: 128"))


def plans() -> list[Any]:
    values: dict[str, Any] = {"mode": "overlapped", "tokens_per_second": 123456.78, "speedup": 1234.56}
    values |= {"tokens_per_target_forward": 12.57, "rollback_rate": 0.71, "wasted_per_token": 1023.46}
    values |= {"draft": True, "retrieval": True}
    rows: list[Any] = [
        SimpleNamespace(**values, method=name, settings={"epsilon": 0.625, "k_max": 16}) for name in NAMES
    ]
    return [plan.table(rows, "costs as measured")]


def scores() -> list[Any]:
    score: Any = SimpleNamespace(
        accuracy=0.871, recall=(0.93, 0.82, 0.71), loss=1234.567, confusion=[[123456, 0, 7]] * 3
    )
    classes = ("none", "some", "all")
    table = train_hrad.score_table(dict.fromkeys(NAMES, score), classes, 12, 3456)
    return [table, train_hrad.confusion_table(score, classes)]


def medians() -> list[Any]:
    stats = {"tokens_per_second": 123456.0, "tokens_per_target_forward": 12.57}
    stats |= {"acceptance_rate": 0.93, "drafted_tokens": 5}
    text: Any = SimpleNamespace(stats=SimpleNamespace(as_dict=lambda: stats))
    return [demo._summary([dict.fromkeys(demo.NAMES, text)])]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        (bench, "123456.78 1234.56 1234.51-1234.62 987.65 7654321.09 2345.67 12.57 0.93 0.82 0.71 1023.46"),
        (plans, "123456.78 1234.56 12.57 0.71 1023.46 epsilon=0.625 k_max=16"),
        (scores, "0.871 0.93 0.82 0.71 1234.567 123456"),
        (medians, "123456 1.00x 12.57 0.93"),
    ],
)
def test_tables_fold_and_never_cut_a_figure(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tables: Callable[[], list[Any]],
    expected: str,
    width: int,
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for table in tables():
        output_console().print(table)
    printed = capsys.readouterr().out
    assert max(map(cell_len, printed.splitlines())) <= width
    assert "\u2026" not in printed
    for figure in expected.split():
        assert re.search(rf"(?<!\S){re.escape(figure)}(?!\S)", printed), figure
    if tables is bench:
        assert printed.count("1004 of 1119") == len(NAMES)
    if width >= 60 and tables is not medians:  # our own names stay whole
        assert NAMES[0] in printed


def test_a_table_goes_on_below_under_the_same_names(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    table = FoldedTable("title", [key("name", ["a", "b"])], [figures(f"column {i}", [f"{i}.5", "-"]) for i in range(9)])
    assert [len(part) for part in table.parts(80)] == [7, 2]
    assert [len(part) for part in table.parts(60)] == [5, 4]
    assert [len(part) for part in table.parts(1)] == [1] * 9
    monkeypatch.setenv("COLUMNS", "60")
    output_console().print(table)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.strip()].count("name") == 2
    assert lines[0].strip() == "title"


def test_doctor_folds_and_cuts_nothing() -> None:
    path = "/" + "a-folder/" * 20
    lines = [*doctor._lines({"core": {"isa": "amx"}, "bundled_pair": {"target": path}, "cuda_graphs": {}}, 60)]
    assert max(map(len, lines)) <= 60
    assert path in "".join(line.strip() for line in lines)
    assert lines[-1] == "cuda graphs"


def test_output_that_is_no_terminal_is_as_wide_as_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, width in (("60", 60), ("", 100), ("wide", 100), ("0", 100)):
        monkeypatch.setenv("COLUMNS", columns)
        assert output_console().width == width
