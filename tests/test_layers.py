"""The FFN of a layer is found in every dense family, and refused where the name would promise too much."""

import pytest
import torch
from tiny import FAMILIES, make_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.rsft.layers import ffn_parameter_names


@pytest.fixture(scope="module", params=FAMILIES)
def family_and_model(request, tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp(request.param), request.param)
    return request.param, AutoModelForCausalLM.from_pretrained(folder)


def test_ffn_of_every_family(family_and_model):
    family, model = family_and_model
    parts = ["gate_up_proj", "down_proj"] if family == "phi3" else ["gate_proj", "up_proj", "down_proj"]
    expected = [f"model.layers.{layer}.mlp.{part}.weight" for layer in (1, 3) for part in parts]
    assert ffn_parameter_names(model, [1, 3], ["ffn"]) == expected
    assert ffn_parameter_names(model, [0], ["down_proj"]) == ["model.layers.0.mlp.down_proj.weight"]
    assert set(expected) < set(dict(model.named_parameters()))


def test_layer_out_of_range_names_the_valid_range(family_and_model):
    with pytest.raises(MM4KEError, match=r"rsft_layers: 4 is out of range; \w+ForCausalLM has layers 0 to 3"):
        ffn_parameter_names(family_and_model[1], [4], ["ffn"])


def test_unknown_module_names_the_known_ones(family_and_model):
    with pytest.raises(
        MM4KEError, match=r"rsft_modules: fc1 is not in model.layers.1.mlp; choose ffn .*: .*down_proj$"
    ):
        ffn_parameter_names(family_and_model[1], [1], ["fc1"])


def test_mixture_of_experts_is_refused_but_its_dense_layers_are_not():
    config = AutoConfig.for_model(
        "qwen2_moe", vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, mlp_only_layers=[0],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert ffn_parameter_names(model, [0], ["down_proj"]) == ["model.layers.0.mlp.down_proj.weight"]
    with pytest.raises(MM4KEError, match="rsft_layers: 1: model.layers.1.mlp is a mixture of experts"):
        ffn_parameter_names(model, [1], ["ffn"])


def test_a_layer_without_a_known_ffn_is_refused():
    config = AutoConfig.for_model(
        "opt", vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2
    )
    with pytest.raises(MM4KEError, match="has no FFN called mlp, feed_forward, ffn; its parts are: .*fc1"):
        ffn_parameter_names(AutoModelForCausalLM.from_config(config), [0], ["ffn"])


def test_a_model_without_one_list_of_layers_is_refused():
    model = torch.nn.Module()
    model.config = AutoConfig.for_model("llama", num_hidden_layers=2)
    with pytest.raises(MM4KEError, match="expected one list of 2 decoder layers, found: none"):
        ffn_parameter_names(model, [0], ["ffn"])
