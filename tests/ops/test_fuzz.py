"""Any call of any op gives the reference's result or raises one line that names the argument.

SPECBRANCH_FUZZ_CALLS says how many calls of each implementation are made, and SPECBRANCH_FUZZ_SEED which ones; a fault
is printed with the command that makes its call again.
"""

import os

import fuzz_checks
import fuzz_worker
import pytest
import torch
from fuzz_batches import run_batches
from fuzz_calls import CPU_ONLY, OPS
from fuzz_values import EXAMPLES, ODD, Call, Ints, Odd
from implementations import on_cpu
from torch import Tensor

import specbranch_ext

pytestmark = pytest.mark.usefixtures("implementation")

EVERY_DAY = {"cpu": 10_000, "emulated": 1_200, "cuda": 400}
BY_NIGHT = {"cpu": 1_000_000, "emulated": 100_000, "cuda": 10_000}
SEED = int(os.environ.get("SPECBRANCH_FUZZ_SEED", "0"))


def fuzz(implementation: str, calls: dict[str, int], seed: int) -> None:
    count = int(os.environ.get("SPECBRANCH_FUZZ_CALLS", calls[implementation]))
    found = run_batches(implementation, count, seed)
    print(f"{found.total()} calls: {dict(found)}")
    assert 0.8 * count <= found.total() <= count
    if count < 400:
        return
    for op in OPS.keys() - (CPU_ONLY if implementation != "cpu" else set()):
        assert found[f"{op} returned"], f"no call of {op} returned"
        assert found[f"{op} raised"], f"no call of {op} raised"


def test_calls_return_the_references_result_or_raise_one_line(implementation: str) -> None:
    fuzz(implementation, EVERY_DAY, SEED)


@pytest.mark.nightly
def test_many_calls(implementation: str) -> None:
    fuzz(implementation, BY_NIGHT, SEED + 1)


@on_cpu
def test_a_call_that_ends_the_process_is_named() -> None:
    abort = "import os, specbranch_ext; specbranch_ext.linear = lambda **arguments: os.abort()"
    with pytest.raises(AssertionError, match=r"^exit -6 in\n.* cpu --replay \"Call\(op='linear', arguments={'input'"):
        run_batches("cpu", 1500, prelude=abort)


CALL = Call("gumbel_noise", {"positions": Ints((5, 6)), "vocabulary": 7, "seed": 3})


def test_a_call_is_made_again_from_its_text(implementation: str, capsys: pytest.CaptureFixture[str]) -> None:
    fuzz_worker.main(implementation, "--replay", repr(CALL))
    assert capsys.readouterr().out == "returned\n"
    fuzz_worker.main(implementation, "--replay", repr(Call("ancestor_mask", {"parents": Odd("nan")}, valid=False)))
    assert capsys.readouterr().out == "raised\n"


@on_cpu
@pytest.mark.parametrize(
    ("fault", "found"),
    [
        (lambda positions, vocabulary, seed: torch.zeros(2, 7), "instead of"),
        (lambda positions, vocabulary, seed: positions.zero_(), "wrote into an argument"),
        (lambda positions, vocabulary, seed: int("seed: expected x"), "a valid call raised|no argument is named"),
    ],
)
def test_faults_are_found(fault, found, monkeypatch):
    fuzz_checks.check(CALL, on_cpu=True)
    monkeypatch.setattr(specbranch_ext, "gumbel_noise", fault)
    with pytest.raises(AssertionError, match=found):
        fuzz_checks.check(CALL, on_cpu=True)


@on_cpu
@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("seed: expected an int\nand more", "more than one line"),
        ("something is wrong", "no argument is named"),
        ("rows: expected int64", "rows is no argument"),
        ("seed: expected an int", "a valid call raised"),
    ],
)
def test_errors_that_say_too_little_are_found(line, found, monkeypatch):
    def refuse(**arguments: Tensor) -> None:
        raise ValueError(line)

    monkeypatch.setattr(specbranch_ext, "gumbel_noise", refuse)
    with pytest.raises(AssertionError, match=found):
        fuzz_checks.check(CALL, on_cpu=True)


def test_an_odd_value_in_every_place(implementation: str) -> None:
    """All pairs of an argument and an odd value, on one call of each op."""
    for call in EXAMPLES:
        if call.op in CPU_ONLY and implementation != "cpu":
            continue
        assert fuzz_checks.check(call, implementation == "cpu") is not None
        for name in call.arguments:
            for odd in ODD:
                changed = Call(call.op, {**call.arguments, name: Odd(odd)}, valid=False)
                fuzz_checks.check(changed, implementation == "cpu")
