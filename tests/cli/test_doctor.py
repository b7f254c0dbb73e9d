"""`specbranch doctor`: what is installed, what can run, and the same refusals as those of generate."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Change, copy_of_target, settings, several, tensors
from tiny import tiny_model
from transformers import AutoConfig, MambaConfig

from specbranch import bundled
from specbranch.cli import doctor
from specbranch.cli import main as cli


def test_doctor_reports_what_can_run(capsys):
    # By itself: other tests may have loaded libraries with an OpenMP of their own.
    command = [sys.executable, "-m", "specbranch.cli.main", "doctor", "--json", "--load"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    findings = json.loads(done.stdout)
    assert findings["ready"]
    assert findings["problems"] == []
    assert findings["versions"]["torch"]
    assert findings["core"]["isa"] in findings["core"]["isa_levels"]
    assert set(findings["bundled_pair"]) == {"target", "draft"}
    assert findings["cuda"]["usable"] or findings["cuda"]["why_not"]
    assert findings["cuda_graphs"] == {"target": "can be captured", "draft": "can be captured"}
    loaded = findings["loaded"]
    assert loaded.pop("fused") == ["16 of 16", "2 of 2"]
    assert loaded == {"device": "cpu", "weights": ["float32", "float32"], "warnings": [], "same_tokens": True}
    for role, layers in (("target", 16), ("draft", 2)):
        fused = findings["fused_layers"][role]
        assert (fused["layers"], fused["as_they_are"]) == (f"{layers} of {layers}", [])
        assert 10 * layers < fused["kernels"]["fused"] <= 10 * layers + 16 < fused["kernels"]["as_they_are"] / 2
    if sys.platform.startswith("linux"):
        assert findings["openmp"]["shared"], findings["openmp"]["runtimes"]
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "bundled pair" in shown
    assert "no: --load looks at weights" in shown


def test_doctor_says_why_a_model_cannot_be_captured(capsys, tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    tiny_model(rope_parameters=rope).config.save_pretrained(tmp_path)
    assert cli.main(["doctor", "--json", "--target", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)["cuda_graphs"]
    assert found["target"].startswith("eager: its rotary embedding (dynamic) chooses its frequencies")


def test_doctor_names_what_of_a_model_is_not_fused(capsys, tmp_path):
    config = AutoConfig.for_model("granite", num_hidden_layers=2, hidden_size=32, intermediate_size=48, vocab_size=32)
    config.save_pretrained(tmp_path)
    assert cli.main(["doctor", "--json", "--target", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)["fused_layers"]["target"]
    assert found["layers"] == "0 of 2"
    assert found["as_they_are"] == ["GraniteDecoderLayer"]  # its parts are fused
    assert found["kernels"]["fused"] < found["kernels"]["as_they_are"]


def test_doctor_is_not_ready_for_a_model_that_is_refused(capsys, tmp_path):
    MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=8).save_pretrained(tmp_path)
    assert cli.main(["doctor", "--json", "--target", str(tmp_path), "--draft", str(tmp_path / "nowhere")]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert not findings["ready"]
    target, draft = findings["problems"]
    assert target.startswith("target model MambaForCausalLM")
    assert draft == f"draft {tmp_path / 'nowhere'}: there is no such directory"


def test_doctor_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(bundled, "path", lambda name: Path("missing") / name)
    assert cli.main(["doctor", "--json"]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert findings["problems"][0] == "bundled_pair: the bundled target lacks config.json"


def test_a_draft_alone_is_no_pair(capsys):
    assert cli.main(["doctor", "--draft", "bundled"]) == 1
    assert capsys.readouterr().err == "specbranch: error: --draft needs --target\n"


def test_doctor_says_what_is_refused_on_cuda_alone(capsys, tmp_path):
    tiny_model(head_dim=576).config.save_pretrained(tmp_path)
    assert cli.main(["doctor", "--json", "--target", str(tmp_path)]) == 0
    wide = "heads 576 wide; on a CUDA device expected at most 512"
    assert json.loads(capsys.readouterr().out)["cuda_graphs"] == {
        "target": f"refused on CUDA: target model LlamaForCausalLM has {wide}"
    }


# ---- With --load: what generate says


FAULTS: dict[str, Change] = {
    "a missing tensor": tensors(lambda weights: weights.pop("model.norm.weight")),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "values that are none": tensors(lambda weights: weights["model.norm.weight"].fill_(float("nan"))),
    "another vocabulary": several(
        settings("tokenizer_config.json", extra_special_tokens=["<|other|>"]),
        lambda folder: _renamed_token(folder / "tokenizer.json"),
    ),
}


def _renamed_token(file: Path) -> None:
    tokenizer: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    word = next(word for word in vocabulary if word.isalpha())
    vocabulary[word + "\u0001"] = vocabulary.pop(word)
    file.write_text(json.dumps(tokenizer), encoding="utf-8")


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("role", ["target", "draft"])
def test_doctor_and_generate_refuse_in_the_same_words(capsys, tmp_path, name, role):
    folder = copy_of_target(tmp_path)
    FAULTS[name](folder)
    target, draft = (str(folder), "bundled") if role == "target" else ("bundled", str(folder))
    pair = ["--target", target, "--draft", draft]
    drafting = ["--method", "speculative"]  # the default may leave alone a draft that does not pay
    assert cli.main(["generate", *pair, *drafting, "--prompt", "x", "--max-new-tokens", "8"]) == 1
    said = capsys.readouterr().err
    (problem,) = doctor.examine(target, draft, load="cpu")["problems"]
    assert said == f"specbranch: error: {problem}\n"
    assert doctor.examine(target, draft)["problems"] == []


def test_doctor_warns_of_what_generate_warns_of(tmp_path):
    folder = copy_of_target(tmp_path)
    settings("generation_config.json", num_beams=3)(folder)
    findings = doctor.examine(str(folder), "bundled", load="cpu")
    assert findings["ready"]
    (warning,) = findings["loaded"]["warnings"]
    assert "num_beams" in warning
