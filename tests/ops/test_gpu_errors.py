"""What is wrong with a GPU is said in one line, before anything is decoded. The GPU is made up."""

import pytest
import torch
from tiny import tiny_model
from transformers import PreTrainedModel

import specbranch_ext
from specbranch import SpecBranch, SpecBranchError
from specbranch.cli import doctor
from specbranch.runtime.loading import check_memory, load_model
from specbranch.runtime.placement import make_runner
from specbranch.runtime.support import check_supported

TOO_OLD = "the driver is for CUDA 12.4 and this build needs CUDA 13.0"
NOT_BUILT = (
    "it has compute capability 7.5 and this build is for 80,90; "
    "SPECBRANCH_CUDA_ARCHITECTURES=75 builds for it, =all for every release"
)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "device", property(lambda self: torch.device("cuda", 0)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A GPU")


@pytest.mark.parametrize("problem", [TOO_OLD, NOT_BUILT])
def test_a_driver_or_an_architecture_that_cannot_run_the_kernels(
    on_a_gpu: None, monkeypatch: pytest.MonkeyPatch, problem: str
) -> None:
    monkeypatch.setattr("specbranch.runtime.support.cuda_device_problem", lambda index: problem)
    with pytest.raises(SpecBranchError) as caught:
        check_supported(tiny_model(), "draft")
    assert str(caught.value) == f"draft model on cuda:0: specbranch cannot run there: {problem}"
    monkeypatch.setattr(specbranch_ext, "cuda_device_problem", lambda index: problem)
    monkeypatch.setattr(doctor, "_core", lambda: {"cuda": True})
    monkeypatch.setattr(doctor, "_cuda_runtime", lambda: "")
    assert f"A GPU: {problem}" in doctor._cuda()["why_not"]
    assert not doctor._cuda()["usable"]


@pytest.mark.parametrize(
    ("architectures", "capability", "noted"),
    [
        (["80"], (8, 0), False),
        (["80"], (8, 6), False),  # machine code runs on the later ones of its generation
        (["80"], (9, 0), True),
        (["80-virtual"], (8, 0), True),
        (["89", "90-real"], (8, 6), True),
        (["89", "90-real"], (9, 0), False),
        (["80", "90a", "120"], (12, 0), False),
        (["80", "90", "100"], (12, 1), True),
    ],
)
def test_kernels_that_come_from_ptx_are_noted(
    on_a_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
    architectures: list[str],
    capability: tuple[int, int],
    noted: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(specbranch_ext, "cuda_device_problem", lambda index: "")  # as the runtime says, of PTX too
    monkeypatch.setattr(doctor, "_core", lambda: {"cuda": True, "cuda_architectures": architectures})
    monkeypatch.setattr(doctor, "_cuda_runtime", lambda: "")
    found = doctor._cuda()
    assert found["usable"]
    assert len(found["notes"]) == noted
    if noted:
        asked = f"SPECBRANCH_CUDA_ARCHITECTURES={capability[0]}{capability[1]} "
        assert found["notes"][0].startswith("A GPU: its driver compiles the kernels from PTX (")
        assert asked in found["notes"][0]
        assert "=all for every release" in found["notes"][0]


def test_a_build_without_kernels(on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specbranch_ext, "build_info", lambda: {"cuda": False, "cuda_reason": "no compiler"})
    with pytest.raises(SpecBranchError, match="cannot run there: this build has no CUDA kernels: no compiler"):
        check_supported(tiny_model(), "target")


def test_another_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedModel, "device", property(lambda self: torch.device("xpu", 0)))
    with pytest.raises(SpecBranchError, match="target model on xpu:0: specbranch runs on the CPU and on CUDA devices"):
        check_supported(tiny_model(), "target")


def test_weights_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2 * 2**30))
    with pytest.raises(SpecBranchError, match=r"its weights take 0.0 GiB; 0.0 of 2.0 GiB are free on cuda:1"):
        check_memory(model, "target", torch.device("cuda", 1))
    check_memory(model, "target", torch.device("cpu"))
    with pytest.raises(SpecBranchError, match=r"^draft .*: its weights take"):
        load_model("bundled", "draft", "auto", "cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu_at_all() -> None:
    with pytest.raises(SpecBranchError, match="device 'cuda' cannot be used: "):
        load_model("bundled", "target", "auto", "cuda")


def test_a_priority_that_there_is_not() -> None:
    with pytest.raises(SpecBranchError, match="priority is 'both'; expected one of target, draft, none"):
        SpecBranch(tiny_model(), priority="both")
    with pytest.raises(SpecBranchError, match="priority"):
        make_runner(SpecBranch(tiny_model()).pair.target.model, True, "first")
