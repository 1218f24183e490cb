"""The fast paths against the whole model: the same losses, the same gradients, the same updates."""

import logging

import pytest
import torch
from tiny import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from mm4ke_plugins.rsft.forward import FastForward, active_dropout, frozen_ffn
from mm4ke_plugins.rsft.layers import decoder_layers, ffn_parameter_names
from mm4ke_plugins.rsft.losses import answer_losses, samples_of
from mm4ke_plugins.rsft.visitor import Visitor

LAYER = 2
TAU = 1.5
# Architectures whose layers and attentions are called, or return their results, in another way than Llama's.
OTHERS = {
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "gpt_neox": {},
    "bloom": {},
    "falcon": {},
    "gemma2": {"head_dim": 8},
    "opt": {"dropout": 0.0, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "qwen3_5_text": {},
}


@pytest.fixture(autouse=True)
def quiet_transformers(caplog):
    """LLaMA-Factory, in an earlier test of the same process, has the library log what it does."""
    caplog.set_level(logging.WARNING, logger="transformers")


def make_model(family: str, **config) -> torch.nn.Module:
    sizes = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | config)).train()
    model.requires_grad_(False)
    return model


def make_batch(*lengths: int, answer: int = 5, seed: int = 0) -> dict[str, torch.Tensor]:
    """Samples of these lengths, padded on the right to a multiple of 8 as LLaMA-Factory does."""
    tokens = -(-max(lengths) // 8) * 8
    torch.manual_seed(seed)
    ids = torch.randint(3, 260, (len(lengths), tokens))
    mask = (torch.arange(tokens)[None] < torch.tensor(lengths)[:, None]).long()
    places = torch.arange(tokens)[None] - torch.tensor(lengths)[:, None]
    labels = torch.where((places < 0) & (places >= -answer), ids, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def own_of(batch):
    """The answers' own tokens: all but the last two that are trained."""
    known = batch["labels"] != -100
    return known & known.roll(-2, 1)


def plain_losses(model, batch):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return answer_losses(logits, batch["labels"], own_of(batch))


def gradients(loss: torch.Tensor, parameters) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_same_losses_and_gradients_in_every_architecture(family):
    model = make_model(family, **FAMILIES.get(family, OTHERS.get(family)))
    _, layers = decoder_layers(model)
    ffn = next(child for name, child in layers[LAYER].named_children() if name in ("mlp", "fc2"))
    parameters = [parameter.requires_grad_(True) for parameter in ffn.parameters()]
    batch = make_batch(21, 14, 40)
    samples = samples_of(batch, model.device, own_of(batch))
    fast = FastForward(model, LAYER, 2**20)
    expected, expected_judged = plain_losses(model, batch)
    for _ in range(2):  # the second time with prefixes from memory
        losses, judged = fast.losses(samples)
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(judged, expected_judged, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(losses.mean(), parameters), gradients(expected.mean(), parameters), strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    # The model is left as it was.
    assert torch.equal(plain_losses(model, batch)[0], expected)


def test_huggingface_loss_is_ours():
    model = make_model("llama")
    batch = make_batch(21)
    torch.testing.assert_close(plain_losses(model, batch)[0][0], model(**batch).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family, replaced", [("llama", 1), ("qwen2", 1), ("phi3", 0), ("gemma", 0), ("gpt2", 0)])
def test_frozen_ffns_above_are_replaced_where_they_have_the_form(family, replaced):
    model = make_model(family, **FAMILIES.get(family, OTHERS.get(family, {})) | {"hidden_size": 64})
    for name in ffn_parameter_names(model, [LAYER], ["ffn"]):
        model.get_parameter(name).requires_grad_(True)
    assert len(FastForward(model, LAYER, 2**20).ffns) == replaced


@pytest.mark.parametrize("rows", [8, 16, 48, 120])
def test_a_frozen_ffn_computes_the_same(rows):
    model = make_model("llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=1, initializer_range=0.02)
    ffn = model.model.layers[0].mlp
    x = torch.randn(1, rows, 576, requires_grad=True)
    expected, ours = ffn(x), frozen_ffn(ffn)(x)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    gradient = torch.randn_like(x)
    gradients = [torch.autograd.grad(y, x, gradient)[0] for y in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    assert frozen_ffn(ffn.requires_grad_(True)) is None
    assert frozen_ffn(ffn.requires_grad_(False).to(torch.bfloat16)) is None


def test_what_lies_below_is_computed_once_and_the_head_for_the_answer_only():
    model = make_model("llama")
    calls, rows = [], []
    model.model.layers[0].register_forward_hook(lambda module, args, output: calls.append(args[0].shape[:2]))
    attention = model.model.layers[0].self_attn.q_proj
    computed = []
    attention.register_forward_hook(lambda module, args, output: computed.append(args[0].shape[0]))
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape))
    samples = samples_of(make_batch(21, 14, 40), "cpu")
    fast = FastForward(model, LAYER, 2**20)
    for _ in range(3):
        fast.losses(samples)
    assert computed == [1, 1, 1]
    assert rows == [(1, 3 * 8, 264)] * 3


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_the_cache_keeps_to_its_budget(kept):
    model = make_model("llama")
    samples = samples_of(make_batch(16, 16, 16), "cpu")
    size = 2 * 16 * 32 * 4  # two tensors, 16 tokens, hidden size 32, float32
    fast = FastForward(model, LAYER, kept * size)
    for _ in range(2):
        for sample in samples:
            fast.losses([sample])
            fast.losses([sample])  # again in the same visit
            assert len(fast.cache.passing) <= 1
    assert len(fast.cache.kept) == kept
    assert fast.cache.used == kept * size


def test_layer_0_has_only_its_attention_below():
    model = make_model("llama")
    batch = make_batch(20)
    fast = FastForward(model, 0, 2**20)
    torch.testing.assert_close(fast.losses(samples_of(batch, "cpu", own_of(batch))), plain_losses(model, batch))


def test_another_batch_needs_the_whole_model():
    batch = make_batch(21, 14)
    assert samples_of(batch | {"position_ids": batch["input_ids"]}, "cpu") is None
    left = {key: value.flip(1) for key, value in batch.items()}
    assert samples_of(left, "cpu") is None
    assert samples_of(batch | {"labels": torch.full_like(batch["labels"], -100)}, "cpu") is None


@pytest.mark.parametrize(
    "length, answer, expected", [(21, 5, (12, 20)), (21, 9, (4, 20)), (6, 2, (0, 8)), (8, 7, (0, 8))]
)
def test_rows_end_with_the_answer_and_are_a_multiple_of_8(length, answer, expected):
    (sample,) = samples_of(make_batch(length, answer=answer), "cpu")
    assert (sample.rows.start, sample.rows.stop) == expected
    assert sample.targets.tolist().count(-100) == len(sample.rows) - answer


def train(model, fast: FastForward | None, batches) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Ten epochs; the trained parameters afterwards, and how many updates each visit took."""
    trained = {name: model.get_parameter(name) for name in ffn_parameter_names(model, [LAYER], ["ffn"])}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0)
    visitor = Visitor(fast, loss_threshold=TAU, steps_per_sample=4)
    samples = [samples_of(batch, "cpu", own_of(batch)) for batch in batches]
    steps = []
    for _ in range(10):
        for index, batch in enumerate(batches):

            def losses(indices, batch=batch):
                return plain_losses(model, {key: value[indices] for key, value in batch.items()})

            visited = visitor.visit(
                samples[index],
                number=0,
                plain_losses=losses,
                backward=torch.Tensor.backward,
                step=optimizer.step,
                zero_grad=optimizer.zero_grad,
            )
            steps.append(visited.updates)
    return {name: parameter.detach() for name, parameter in trained.items()}, steps


def assert_same(ours, plain):
    (weights, steps), (expected, expected_steps) = ours, plain
    assert steps == expected_steps
    assert {0, 4} < set(steps)  # some visits ended at once, midway and at K
    for name in expected:
        difference = (weights[name] - expected[name]).norm() / expected[name].norm()
        assert difference < 1e-6, name


BATCHES = [make_batch(length, seed=length) for length in (21, 14, 40, 9, 33)]
PAIRS = [make_batch(21, 14), make_batch(40, 9, seed=1), make_batch(33, seed=2)]


@pytest.mark.parametrize("batches", [BATCHES, PAIRS], ids=["one by one", "two at once"])
@pytest.mark.parametrize("budget", [2**20, 1])
def test_same_updates_and_weights_as_the_plain_loop(batches, budget, caplog):
    plain = train(make_model("llama"), None, batches)
    model = make_model("llama")
    ours = train(model, FastForward(model, LAYER, budget), batches)
    assert_same(ours, plain)
    assert not caplog.records


class ShortOfMemory(FastForward):
    """Runs out of memory in its n-th forward, or in the backward of that one."""

    calls = 0
    fails_at = 7
    where = "forward"

    def losses(self, samples):
        self.calls += 1
        losses = super().losses(samples)
        if self.calls == self.fails_at:
            if self.where == "forward":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            losses[0].register_hook(self.fail)
        return losses

    def fail(self, gradient):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 8 bytes.")


@pytest.mark.parametrize("where, fails_at", [("forward", 1), ("forward", 7), ("backward", 7), ("forward", 30)])
def test_out_of_memory_goes_on_plainly_with_one_warning(where, fails_at, caplog):
    plain = train(make_model("llama"), None, BATCHES)
    model = make_model("llama")
    fast = ShortOfMemory(model, LAYER, 2**20)
    fast.where, fast.fails_at = where, fails_at
    assert_same(train(model, fast, BATCHES), plain)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "memory" in record.getMessage()
    assert fast.calls == fails_at


def test_another_error_is_not_swallowed():
    model = make_model("llama")
    fast = FastForward(model, LAYER, 2**20)
    train(model, fast, BATCHES[:1])

    def fail(samples):
        raise RuntimeError("mat1 and mat2 must have the same dtype")

    visitor = Visitor(fast, loss_threshold=0.5, steps_per_sample=4)
    visitor.checked = True
    fast.losses = fail
    with pytest.raises(RuntimeError, match="same dtype"):
        visitor.visit(
            samples_of(BATCHES[0], "cpu"), number=0, plain_losses=None, backward=None, step=None, zero_grad=None
        )


def test_a_model_that_hands_on_more_than_hidden_states_is_computed_whole(caplog):
    """A layer that remembers something of its own input, which it no longer gets."""

    def make():
        model = make_model("llama")
        seen = {}
        model.register_forward_pre_hook(lambda module, args: seen.clear())
        model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: seen.update(first=output))
        model.model.layers[3].mlp.register_forward_hook(lambda module, args, output: output + seen.get("first", 0))
        return model

    plain = train(make(), None, BATCHES)
    model = make()
    assert_same(train(model, FastForward(model, LAYER, 2**20), BATCHES), plain)
    (record,) = caplog.records
    assert "can't be computed in parts (the loss of the first fact is" in record.getMessage()


def test_dropout_is_found():
    assert active_dropout(make_model("llama")) is None
    assert (
        active_dropout(make_model("llama", attention_dropout=0.25))
        == "model.layers.0.self_attn.attention_dropout: 0.25"
    )
    assert active_dropout(make_model("gpt2")) == "transformer.drop.p: 0.1"
    assert active_dropout(make_model("gpt2", **OTHERS["gpt2"])) is None
