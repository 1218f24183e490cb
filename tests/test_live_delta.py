"""`apply_delta` where what it encloses does not end well: deltas left on, exceptions."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mm4ke_plugins.delta.format import KnowledgeDelta, load_delta, save_delta
from mm4ke_plugins.delta.live import LiveDelta, apply_delta, on_models

UP, DOWN = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("up", "down"))


@pytest.fixture
def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": 20}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_key_value_heads=2, **sizes))


def delta_of(model, path, *names: str) -> KnowledgeDelta:
    base = {name: model.get_parameter(name).detach() for name in names}
    save_delta(path, base, {name: tensor + torch.randn_like(tensor) for name, tensor in base.items()})
    return load_delta(path)


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal_states(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize("error", [None, KeyError("the user's"), KeyboardInterrupt()])
def test_what_is_put_on_within_and_left_on_goes_too(model, tmp_path, error):
    outer, inner, third = (delta_of(model, tmp_path / name, UP, *more) for name, more in zip("123", ((), (DOWN,), ())))
    before = state(model)
    left_on = [LiveDelta(model, inner), apply_delta(model, third)]
    caught = None
    try:
        with apply_delta(model, outer):
            left_on[0].set()
            left_on[1].__enter__()
            if error:
                raise error
    except (KeyError, KeyboardInterrupt) as found:
        caught = found
    assert caught is error  # and not one of ours
    assert equal_states(state(model), before) and not on_models[model]
    left_on[0].remove()
    left_on[1].__exit__(None, None, None)
    assert equal_states(state(model), before)
    with apply_delta(model, inner):
        assert not equal_states(state(model), before)
    assert equal_states(state(model), before)


def test_no_delta_stays_for_good_within_another(model, tmp_path):
    before = state(model)
    with apply_delta(model, delta_of(model, tmp_path / "1", UP)):
        live = LiveDelta(model, delta_of_base(before, tmp_path / "2"))
        live.set()
        with pytest.raises(RuntimeError, match="another delta is on this model, which would take this one off"):
            live.keep()
    assert equal_states(state(model), before)


def delta_of_base(base, path) -> KnowledgeDelta:
    save_delta(path, {UP: base[UP]}, {UP: base[UP] + 1})
    return load_delta(path)
