"""The stand-in for a GPU keeps a GPU's rules: what would go wrong there goes wrong here."""

import pytest
import torch
from recording_device import NotCapturable, RecordingDevice


def test_work_is_done_when_it_is_waited_for() -> None:
    device = RecordingDevice()
    source, to = torch.ones(3), torch.zeros(3)
    device.copy(to, source)
    mark = device.mark()
    assert to.tolist() == [0, 0, 0]  # too early
    mark.wait()
    assert to.tolist() == [1, 1, 1]


def test_host_memory_that_is_refilled_too_early_goes_wrong() -> None:
    device = RecordingDevice()
    host, first, second = torch.ones(1), torch.zeros(1), torch.zeros(1)
    device.copy(first, host)
    host.fill_(2.0)
    device.copy(second, host)
    device.mark().wait()
    assert (first.item(), second.item()) == (2, 2)


def test_questions_make_progress() -> None:
    device = RecordingDevice()
    device.copy(torch.zeros(1), torch.ones(1))
    mark = device.mark()
    assert any(mark.done() for _ in range(100))


def test_a_graph_works_on_the_memory_it_was_captured_on() -> None:
    device = RecordingDevice()
    static, out = torch.zeros(2), torch.zeros(2)
    graph = device.capture(lambda: out.copy_(static.view(2, 1).mul(3).flatten() + 1))
    for value in (1.0, 5.0):
        static.fill_(value)
        graph.replay()
        device.mark().wait()
        assert out.tolist() == [3 * value + 1] * 2


def test_numbers_of_the_host_are_baked_in() -> None:
    device = RecordingDevice()
    numbers, out = iter((1, 2, 3)), torch.zeros(1)
    graph = device.capture(lambda: out.fill_(next(numbers)))
    for _ in range(2):
        graph.replay()
        device.mark().wait()
        assert out.item() == 1


def test_capturing_leaves_no_result_behind() -> None:
    device = RecordingDevice()
    static, results = torch.ones(2), []
    device.capture(lambda: results.append(static * 2))
    assert results[0].isnan().all()


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x + torch.tensor([1.0, 2.0]),
    ],
    ids=["item", "bool", "nonzero", "mask", "tensor"],
)
@pytest.mark.parametrize("inference", [False, True])
def test_a_step_that_needs_the_host_is_refused(step, inference) -> None:
    x = torch.ones(2)
    with torch.inference_mode(inference), pytest.raises(NotCapturable):
        RecordingDevice().capture(lambda: step(x))
