"""Which models' steps can be captured, found out on the meta device, and what a pair then runs on."""

from typing import Any

import pytest
import torch
from tiny import FAMILIES, tiny_model

from specbranch import SpecBranch
from specbranch.runtime.attention import TreeContext
from specbranch.runtime.cache import BranchCache, Buffers
from specbranch.runtime.device import Host
from specbranch.runtime.graphs.probe import why_not_captured
from specbranch.runtime.graphs.runner import CapturedRunner
from specbranch.runtime.model import CachedModel
from specbranch.runtime.placement import make_runner, make_workers
from specbranch.runtime.workers import Threads

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_supported_family_can_be_captured(family: str) -> None:
    assert why_not_captured(tiny_model(family.split("-")[0], **FAMILIES[family])) is None


def test_a_model_that_asks_for_values_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    kind = type(model.model.norm)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, states: forward(self, states + float(states.mean() > 1e9)))
    reason = why_not_captured(model)
    assert reason is not None
    assert reason.startswith("a step on the meta device raised RuntimeError: Tensor.item()")


def test_a_model_whose_angles_depend_on_the_length_of_the_text_cannot() -> None:
    reason = "its rotary embedding (dynamic) chooses its frequencies by the length of the text"
    assert why_not_captured(tiny_model(rope_parameters=DYNAMIC)) == reason


def test_a_model_on_several_devices_cannot() -> None:
    model = tiny_model()
    vars(model)["hf_device_map"] = {"model.layers.0": 0, "model.layers.1": 1}
    assert why_not_captured(model) == "its layers lie on several devices (0, 1)"


def test_asking_leaves_the_model_alone() -> None:
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert why_not_captured(model) is None
    assert model.device.type == "cpu"
    assert model.config._attn_implementation == "eager"
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_on_the_cpu_everything_is_eager_and_overlaps_by_threads() -> None:
    runner = make_runner(CachedModel(tiny_model(), "target"), cuda_graphs=True)
    assert isinstance(runner.device, Host)
    assert runner.note == "eager"
    assert isinstance(make_workers(runner, None, 2, None), Threads)


@pytest.mark.cuda
def test_on_a_gpu_steps_are_captured_unless_they_cannot_be_or_must_not() -> None:
    cases: list[tuple[bool, dict[str, Any], str]] = [
        (True, {}, "captured"),
        (False, {}, "eager: CUDA graphs are switched off"),
        (True, {"rope_parameters": DYNAMIC}, "eager: its rotary embedding (dynamic)"),
    ]
    for cuda_graphs, options, note in cases:
        model = tiny_model(**options)
        model.cuda()  # type: ignore[call-arg]
        runner = make_runner(CachedModel(model, "target"), cuda_graphs)
        assert runner.note.startswith(note)
        assert isinstance(runner, CapturedRunner) == (note == "captured")


def test_a_layer_on_another_device_is_given_its_rows_and_ancestors_there() -> None:
    """The meta device stands for a second GPU."""
    meta, buffers = torch.device("meta"), Buffers(2, 16)
    buffers.rows = torch.arange(3)
    assert buffers.rows_on(torch.device("cpu")) is buffers.rows
    assert buffers.rows_on(meta).device == meta
    for layer, device in zip(buffers.layers, ("cpu", "meta"), strict=True):
        states = torch.ones(1, 2, 3, 8, device=device)
        keys, values = layer.update(states, states)
        assert (keys.device.type, values.shape) == (device, (1, 2, 16, 8))
    rows = torch.zeros(3, dtype=torch.int64)
    context = TreeContext(torch.tensor([4]), torch.ones(3, 1, dtype=torch.int64), starts=rows[:1], sequence=rows)
    assert context.on(torch.device("cpu"))[1] is context.ancestors
    assert [part.device for part in context.on(meta) if part is not None] == [meta] * 4
    assert TreeContext(torch.tensor(4)).on(meta)[1:] == (None, None, None)


def test_commits_move_rows_on_every_device() -> None:
    cache = BranchCache.alone(2, 16)
    for layer, device in zip(cache.buffers.layers, ("cpu", "meta"), strict=True):
        cache.buffers.rows = torch.arange(6)
        states = torch.arange(6.0, device=device).view(1, 1, 6, 1).expand(1, 1, 6, 8).contiguous()
        layer.update(states, states)
    cache.length, cache.nodes, cache.ancestors = 2, [0, 1, 2, 3], [1, 3, 5, 11]
    cache.commit([0, 2], {3: 0})
    keys = cache.buffers.layers[0].keys
    assert keys is not None
    assert keys[0, 0, :5, 0].tolist() == [0, 1, 2, 4, 5]
    assert (cache.length, cache.nodes) == (4, [0])


def test_stats_say_how_the_steps_ran() -> None:
    pair = SpecBranch(tiny_model(), tiny_model(seed=1))
    stats = pair.generate([1, 2, 3], max_new_tokens=4).stats.as_dict()
    assert (stats["target_runner"], stats["draft_runner"]) == ("eager", "eager")
    alone = pair.generate([1, 2, 3], max_new_tokens=4, method="autoregressive").stats.as_dict()
    assert (alone["target_runner"], alone["draft_runner"]) == ("eager", "")
