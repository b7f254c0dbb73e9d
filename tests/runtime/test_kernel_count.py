"""How many kernels a captured step has outside the model: each costs a GPU a launch, and between two draft steps they
are all that there is."""

from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from recording_device import RecordingDevice
from tiny import tiny_model

from specbranch.runtime.cache import TREE_ROWS, BranchCache
from specbranch.runtime.fused.count import count_kernels
from specbranch.runtime.graphs.runner import DRAFT_ROWS, CapturedRunner
from specbranch.runtime.model import CachedModel
from specbranch.runtime.support import meta_twin

META = torch.device("meta")


def on_meta() -> CapturedRunner:
    """A captured runner whose model, cache and static memory hold nothing."""
    runner = CapturedRunner(CachedModel(meta_twin(tiny_model(), torch.float32), "draft"), RecordingDevice())
    runner.model.cache = BranchCache.alone(runner.model.layers, 2 * TREE_ROWS, META)
    runner._prepare()
    return runner


@torch.inference_mode()
def test_a_draft_step_has_two_kernels_outside_the_model() -> None:
    runner = on_meta()
    run = runner._draft_memory(candidates=4, vocabulary=30).run
    for n in DRAFT_ROWS:
        with runner.model.attached():
            run(n)  # what is set up lazily
            step = count_kernels(partial(run, n))
            forward = count_kernels(partial(runner.model.forward, runner.inputs.of(n)))
        assert step - forward == Counter({"specbranch.draft_sample": 1, "specbranch.advance": 1})
        assert not forward - step


@pytest.mark.parametrize("inference", [False, True])
def test_what_counts(inference: bool) -> None:
    x, weight = torch.empty(4, 6, device=META), torch.empty(3, 6, device=META)

    def count(run: Callable[[], object]) -> dict[str, int]:
        with torch.inference_mode(inference), torch.no_grad():
            return dict(count_kernels(run))

    assert count(lambda: x.view(2, 12).t()[1:].unsqueeze(0).expand(3, -1, -1).squeeze(0).unflatten(-1, (2, 1))) == {}
    assert count(lambda: [part.transpose(0, 1) for part in x.split(2)] + [torch.empty_like(x), x.new_empty(3)]) == {}
    assert count(lambda: x.contiguous().to(x.dtype).reshape(-1)) == {}
    assert count(lambda: x.t().reshape(-1)) == {"aten.clone": 1}
    assert count(lambda: x.t().contiguous()) == {"aten.clone": 1}
    assert count(lambda: x.half()) == {"aten._to_copy": 1}
    assert count(lambda: torch.nn.functional.linear(x, weight)) == {"aten.mm": 1}
    assert count(lambda: (x + 1, x.add_(1), x.zero_())) == {"aten.add": 1, "aten.add_": 1, "aten.zero_": 1}
    assert count(lambda: torch.cat([x, x]).softmax(-1)) == {"aten.cat": 1, "aten._softmax": 1}
