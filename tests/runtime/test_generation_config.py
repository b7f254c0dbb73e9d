"""A checkpoint's generation_config: it counts as in transformers, and what the engine lacks is named once."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import copy_of_target
from tiny import tiny_model
from transformers import GenerationConfig, PreTrainedModel

from specbranch import SpecBranch, SpecBranchError, SpecBranchWarning
from specbranch.cli import main as cli
from specbranch.core.sampling import Sampling
from specbranch.text.generation_config import (
    LACKING,
    PROCESSED,
    PROCESSED_IN_SAMPLING,
    lacking,
    new_tokens,
    processed,
    sampling,
)
from specbranch.text.vocabulary import end_of_sequence

PROMPT = [3, 17, 9, 4]
HONOURED = {"temperature", "top_k", "top_p", "min_p", "do_sample"}
HONOURED |= {"max_new_tokens", "max_length", "eos_token_id", "stop_strings"}
# Fields that change no text of a decoder-only model that is decoded without beams and assistants.
HARMLESS = {
    "early_stopping", "length_penalty", "diversity_penalty",  # of beams
    "use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type",  # of assistants
    "use_cache", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory", "compile_config",
    "disable_compile", "continuous_batching_config",  # how it is computed
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "pad_token_id", "bos_token_id", "decoder_start_token_id", "transformers_version",
    "renormalize_logits", "remove_invalid_values",  # scores in the same order
}  # fmt: skip


def test_every_field_is_known() -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    processed = PROCESSED.keys() | PROCESSED_IN_SAMPLING.keys()
    assert not fields - HONOURED - HARMLESS - LACKING.keys() - processed


# ---- what the engine has


CONFIGS: list[dict[str, Any]] = [
    {},
    {"do_sample": False, "temperature": 0.6, "top_k": 20},
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.6},
    {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"do_sample": True, "top_k": 0, "min_p": 0.05},
    {"do_sample": True, "top_p": 1.0, "top_k": 50.0},
    {"top_p": 0.9, "temperature": 0.9},
]
ASKED: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0.5},
    {"temperature": 1.0, "top_k": 0},
    {"temperature": 1.2, "top_p": 0.5, "min_p": 0.1},
    {"top_k": 7},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_sampling_is_what_transformers_resolves(config: dict[str, Any], asked: dict[str, Any]) -> None:
    model: Any = tiny_model()
    model.generation_config = GenerationConfig(**config)
    theirs = dict(asked)
    if "temperature" in asked:  # which says do_sample too, where transformers must be told
        theirs["do_sample"] = asked["temperature"] > 0
        if not theirs["do_sample"]:
            del theirs["temperature"]
    resolved, rest = model._prepare_generation_config(None, **theirs)
    assert not rest
    ours = sampling(model.generation_config, **asked)
    if not resolved.do_sample:
        assert ours.temperature == 0
        return
    expected = Sampling(resolved.temperature, resolved.top_k, resolved.top_p, resolved.min_p or 0.0)
    assert ours == expected


def test_odd_values_of_transformers_count_as_there() -> None:
    assert sampling(GenerationConfig(do_sample=True, top_p=1.5)).top_p == 1
    only_best = sampling(GenerationConfig(do_sample=True, top_p=0.0))
    engine = SpecBranch(tiny_model())
    assert engine.generate(PROMPT, max_new_tokens=8, method="autoregressive").tokens == (
        engine.generate(
            PROMPT, max_new_tokens=8, method="autoregressive", temperature=1, top_k=0, top_p=only_best.top_p
        ).tokens
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_sample": "yes"}, "do_sample is 'yes'; expected True or False"),
        ({"do_sample": True, "temperature": "hot"}, "temperature is 'hot'; expected a number"),
        ({"do_sample": True, "top_k": 2.5}, "top_k is 2.5; expected an integer"),
        ({"do_sample": True, "top_k": -1}, "top_k is -1"),
    ],
)
def test_values_that_cannot_be_used_are_the_checkpoint_s(config: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecBranchError, match=f"generation_config: {message}"):
        sampling(type("Config", (), config)())


def test_lengths_are_what_transformers_takes() -> None:
    """In new tokens: max_new_tokens, else max_length with the prompt, else our own default within the context."""
    assert new_tokens(GenerationConfig(), None, 10, None) == 128
    assert new_tokens(GenerationConfig(), None, 10, 100) == 90
    assert new_tokens(GenerationConfig(), 7, 10, 100) == 7
    for config, expected in (
        ({"max_new_tokens": 6}, 6),
        ({"max_length": 9}, 5),
        ({"max_new_tokens": 6, "max_length": 9}, 6),
    ):
        model = tiny_model()
        model.generation_config = GenerationConfig(**config)
        assert new_tokens(model.generation_config, None, len(PROMPT), 256) == expected
        assert new_tokens(model.generation_config, 3, len(PROMPT), 256) == 3
        theirs: Any = model.generate(torch.tensor([PROMPT]))  # type: ignore[operator]
        assert theirs.shape[1] - len(PROMPT) == expected
        assert len(SpecBranch(model).generate(PROMPT, method="autoregressive").tokens) == expected
    with pytest.raises(SpecBranchError, match=r"the prompt has 9 tokens, and .* max_length 9: pass max_new_tokens"):
        new_tokens(GenerationConfig(max_length=9), None, 9, 256)


def test_ends_of_sequence_are_those_of_the_generation_config_alone() -> None:
    model = tiny_model(eos_token_id=5)
    assert end_of_sequence(model) == {5}
    for eos, expected in ((None, set()), (7, {7}), ([7, 9], {7, 9}), (7.0, {7}), (torch.tensor([7]), {7})):
        model.generation_config.eos_token_id = eos
        assert end_of_sequence(model) == expected
    model.generation_config.eos_token_id = ["</s>"]
    with pytest.raises(SpecBranchError, match="generation_config: eos_token_id is '</s>'; expected an integer"):
        end_of_sequence(model)


def test_stop_strings_of_the_checkpoint_end_a_text(bundled_pair: SpecBranch, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "def area(width, height):\n"
    whole = bundled_pair.generate(prompt, max_new_tokens=32)
    stop = whole.text[10:13]
    monkeypatch.setattr(bundled_pair.target.generation_config, "stop_strings", [stop])
    assert bundled_pair.generate(prompt, max_new_tokens=32).text == whole.text[: whole.text.index(stop)]
    assert bundled_pair.generate(prompt, max_new_tokens=32, stop=()).text == whole.text


# ---- rules, and what it lacks: a value that acts, and whether a tiny model shows it


ACTING: dict[str, tuple[Any, bool]] = {
    "repetition_penalty": (5.0, True),
    "encoder_repetition_penalty": (100.0, True),
    "no_repeat_ngram_size": (1, True),
    "encoder_no_repeat_ngram_size": (1, True),
    "bad_words_ids": ("best", True),
    "sequence_bias": ("bias", True),
    "suppress_tokens": ("flat", True),
    "begin_suppress_tokens": ("flat", True),
    "forced_bos_token_id": (2, False),
    "forced_eos_token_id": (2, True),
    "min_length": (40, True),
    "min_new_tokens": (10, True),
    "exponential_decay_length_penalty": ((1, 100.0), True),
    "max_time": (1e-9, True),
    "guidance_scale": (3.0, True),
    "watermarking_config": ({"bias": 100.0}, True),
    "num_beams": (3, True),
    "token_healing": (True, False),
    "num_beam_groups": (2, False),
    "num_return_sequences": (2, False),
    "constraints": ([1], False),
    "force_words_ids": ([[1]], False),
    "penalty_alpha": (0.6, False),
    "dola_layers": ("low", False),
    "cache_implementation": ("quantized", False),
    "top_h": (0.5, False),
    "typical_p": (0.5, False),
    "epsilon_cutoff": (0.1, False),
    "eta_cutoff": (0.1, False),
}
NEUTRAL: dict[str, list[Any]] = {
    "repetition_penalty": [1.0, 1],
    "encoder_repetition_penalty": [1.0],
    "no_repeat_ngram_size": [0],
    "bad_words_ids": [[]],
    "min_length": [0],
    "num_beams": [1],
    "guidance_scale": [1.0, 1],
    "typical_p": [1.0],
    "epsilon_cutoff": [0.0, 1.0],
    "penalty_alpha": [0.0],
    "cache_implementation": ["static", "dynamic"],
}


def test_the_examples_are_of_all_fields() -> None:
    assert ACTING.keys() == LACKING.keys() | PROCESSED.keys() | PROCESSED_IN_SAMPLING.keys()


def greedy(model: PreTrainedModel, **options: Any) -> list[int]:
    prompt = torch.arange(2, 30)[None]
    made: Any = model.generate(prompt, max_new_tokens=8, do_sample=False, **options)  # type: ignore[operator]
    return [int(token) for token in made[0, prompt.shape[1] :]]


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
@pytest.mark.parametrize("name", ACTING)
def test_what_changes_transformers_text_is_known(name: str) -> None:
    value, shows = ACTING[name]
    model = tiny_model()
    plain = greedy(model)
    value = {"best": [[plain[0]]], "flat": [plain[0]], "bias": [[[plain[0]], -100.0]]}.get(str(value), value)
    if name in ("min_length", "min_new_tokens", "exponential_decay_length_penalty"):  # they are about its end
        eos = plain[1] if name.startswith("min") else next(token for token in range(2, 32) if token not in plain)
        model.generation_config.eos_token_id = eos
        plain = greedy(model)
    if shows:
        assert greedy(model, **{name: value}) != plain
    config = type("Config", (), {name: value})()
    assert lacking(config) | processed(config, sampled=True) == {name: value}
    assert (name in lacking(config)) is (name in LACKING)
    assert (name in processed(config, sampled=False)) is (name in PROCESSED)


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values_are_not_named(name: str) -> None:
    for value in [*NEUTRAL[name], None]:
        config = type("Config", (), {name: value})()
        assert lacking(config) | processed(config, sampled=True) == {}
    assert lacking(GenerationConfig()) | processed(GenerationConfig(), sampled=True) == {}


def test_the_warning_comes_once_an_engine_and_names_the_fields() -> None:
    target = tiny_model()
    target.generation_config.num_beams = 3
    target.generation_config.penalty_alpha = 0.6
    for _ in range(2):
        engine = SpecBranch(target, method="autoregressive")
        with pytest.warns(
            SpecBranchWarning, match=r"num_beams 3, penalty_alpha 0\.6, which specbranch does not have: the text will"
        ) as seen:
            engine.generate(PROMPT, max_new_tokens=2)
        assert len(seen) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine.generate(PROMPT, max_new_tokens=2)
            list(engine.stream(PROMPT, max_new_tokens=2))


def test_filters_without_a_temperature_are_warned_of(bundled_pair: SpecBranch) -> None:
    with pytest.warns(SpecBranchWarning, match="no effect at temperature 0: top_k, top_p"):
        bundled_pair.generate(PROMPT, max_new_tokens=2, top_k=5, top_p=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bundled_pair.generate(PROMPT, max_new_tokens=2, top_k=0, top_p=1.0, min_p=0.0, seed=3)


# ---- the command line


def run(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[list[int], str]:
    command = ["generate", "--target", str(folder), "--method", "autoregressive", "--threads", "1", "--json"]
    assert cli.main([*command, "--prompt", "def f(x):", *options]) == 0
    captured = capsys.readouterr()
    tokens: list[int] = json.loads(captured.out)["tokens"]
    return tokens, captured.err


def test_the_command_line_takes_what_is_not_given_from_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bundled_pair: SpecBranch
) -> None:
    folder = copy_of_target(tmp_path)
    config = {"do_sample": True, "temperature": 0.8, "top_k": 20, "max_new_tokens": 9, "eos_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(config))

    def expected(**options: Any) -> list[int]:
        options = {"max_new_tokens": 9, "method": "autoregressive", **options}
        return bundled_pair.generate("def f(x):", **options).tokens

    own = expected(temperature=0.8, top_k=20, seed=3)
    assert run(folder, capsys, "--seed", "3") == (own, "")
    assert run(folder, capsys, "--temperature", "0") == (expected(temperature=0), "")
    assert run(folder, capsys, "--top-k", "5", "--seed", "3")[0] == expected(temperature=0.8, top_k=5, seed=3)
    ignored = "specbranch: warning: no effect at temperature 0: --min-p, --seed\n"
    assert run(folder, capsys, "--temperature", "0", "--min-p", "0.5", "--seed", "3") == (
        expected(temperature=0),
        ignored,
    )


def test_the_bundled_pair_is_greedy(bundled_pair: SpecBranch) -> None:
    for model in (bundled_pair.target, bundled_pair.draft):
        assert model is not None
        assert sampling(model.generation_config) == Sampling()
        assert lacking(model.generation_config) | processed(model.generation_config, True) == {}
