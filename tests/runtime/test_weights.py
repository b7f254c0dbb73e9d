"""Where weights may be, and the wrappers around a model."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model
from torch import nn

from specbranch import SpecBranch, SpecBranchError
from specbranch.runtime.weights import check_weights, execution_device, unwrapped


def test_a_weight_without_values_is_named() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.to("meta")
    for pair, role in (((model, tiny_model()), "target"), ((tiny_model(), model), "draft")):
        message = rf"{role} model LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj\.weight is on the meta device"
        with pytest.raises(SpecBranchError, match=message):
            SpecBranch(*pair)


def test_offloaded_weights_are_not_missing() -> None:
    model = tiny_model()
    model.to("meta")  # type: ignore[arg-type]
    assert execution_device(model).type == "meta"
    for module in (model.model, model.lm_head):
        aligner = SimpleNamespace(execution_device="cpu")
        vars(module)["_hf_hook"] = SimpleNamespace(hooks=[SimpleNamespace(execution_device=None), aligner])
    assert execution_device(model) == torch.device("cpu")
    check_weights(model, "target")
    del vars(model.lm_head)["_hf_hook"]
    with pytest.raises(SpecBranchError, match=r"lm_head\.weight"):
        check_weights(model, "target")


def test_of_a_model_with_adapters_the_model_within_is_taken() -> None:
    model = tiny_model()
    wrapper = nn.Module()
    config = SimpleNamespace(is_prompt_learning=False, peft_type=SimpleNamespace(value="LORA"))
    wrapper.peft_config, wrapper.get_base_model = {"default": config}, lambda: model  # type: ignore[assignment]
    assert unwrapped(wrapper, "target") is model
    assert unwrapped(model, "target") is model
    config.is_prompt_learning, config.peft_type.value = True, "PREFIX_TUNING"
    with pytest.raises(SpecBranchError, match="target adapter 'default' is PREFIX_TUNING"):
        unwrapped(wrapper, "target")
