"""Which counters a launch gets: nothing that may run at the same time shares any. The device is made up."""

from types import SimpleNamespace

import pytest
import torch

from specbranch_ext.ops import _library, _tickets


class Device:
    """Its current stream and what that stream captures; sets that were made while it captured are remembered."""

    def __init__(self) -> None:
        self.stream, self.capture, self.synchronised = 1, 0, 0
        self.made_in_capture: list[torch.Tensor] = []
        self.tensor = SimpleNamespace(is_cpu=False, device=SimpleNamespace(index=0))

    def zeros(self, sets: int, device: int) -> torch.Tensor:
        made = torch.zeros(sets, _tickets.COUNT, dtype=torch.int32)
        if self.capture:
            self.made_in_capture.append(made)
        return made

    def synchronize(self) -> None:
        self.synchronised += 1

    def tickets(self, stream: int, capture: int = 0) -> int:
        self.stream, self.capture = stream, capture
        return _tickets.tickets(self.tensor).data_ptr()  # type: ignore[arg-type]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    for name in ("_streams", "_captures", "_spare"):
        monkeypatch.setattr(_tickets, name, {})
    monkeypatch.setattr(_tickets, "RESERVE", 3)
    monkeypatch.setattr(_tickets, "_zeros", device.zeros)
    monkeypatch.setattr(_library, "launch_handle", lambda tensor: device.stream)
    monkeypatch.setattr(_library, "core", SimpleNamespace(emulated=False, capture_id=lambda stream: device.capture))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: device)
    return device


def test_a_stream_keeps_its_set_and_shares_it_with_nobody(device: Device) -> None:
    assert device.tickets(1) == device.tickets(1) != device.tickets(2)
    assert device.synchronised == 1  # for the sets in reserve


def test_every_capture_has_a_set_of_its_own_for_good(device: Device) -> None:
    used = {device.tickets(1)}
    for capture in (5, 6, 7):
        own = device.tickets(1, capture)
        assert own == device.tickets(1, capture)
        assert own not in used
        used.add(own)
    assert not device.made_in_capture
    device.tickets(1)  # the reserve is used up, and made anew outside a capture
    assert device.tickets(1, 8) not in used
    assert not device.made_in_capture


def test_streams_of_one_capture_do_not_share_a_set(device: Device) -> None:
    device.tickets(1)
    assert device.tickets(1, 5) != device.tickets(2, 5)


def test_without_a_reserve_the_graph_clears_its_own_set(device: Device) -> None:
    own = device.tickets(1, 5)
    assert [made.data_ptr() for made in device.made_in_capture] == [own]


def test_on_the_cpu_only_the_emulated_kernels_have_any() -> None:
    assert _tickets.tickets(torch.zeros(1)) is None
