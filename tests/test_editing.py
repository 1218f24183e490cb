"""R-SFT and merge of a live model: the same weights as the hosts give, exact roll-back, and edits that stay."""

import pytest
import torch
from llamafactory_helpers import TRAINED, llamafactory_facts, train
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.knowedit.metrics import predict
from mm4ke_plugins.merging.equations import merge
from mm4ke_plugins.rsft.facts import encode_fact
from mm4ke_plugins.rsft.live import Editor, changed_tensors, train_facts
from mm4ke_plugins.rsft.settings import Settings

FACTS = [("Who rules Oz?", "Tark"), ("Where is Oz?", "Up"), ("What is Oz?", "A box")]
SETTINGS = Settings(layers=(1,), learning_rate=1e-2, loss_threshold=0.2, num_epochs=8, weight=0.8, density=0.8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), "qwen2", tie_word_embeddings=True)


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def codes(*facts, prompt_format="raw"):
    return [encode_fact(tiny_tokenizer(), *fact, prompt_format) for fact in facts]


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(before, after):
    return [name for name in before if not torch.equal(before[name], after[name])]


def expected_merge(base, trained, settings=SETTINGS):
    """Equation 6 on checkpoints, as the merging host does it."""
    return {
        name: merge(base[name], [trained[name]], [settings.weight], [settings.density], names=["base", "trained"])
        for name in base
    }


@pytest.mark.parametrize("threshold", [1.2, 0.3])
def test_same_weights_as_llamafactory(rsft_recipe, threshold):
    rsft_recipe["rsft_loss_threshold"] = threshold
    base = load_file(f"{rsft_recipe['model_name_or_path']}/model.safetensors")
    facts = llamafactory_facts(rsft_recipe)
    expected, statistics = train(rsft_recipe)
    model = load(rsft_recipe["model_name_or_path"])
    settings = Settings(layers=(1,), learning_rate=1e-2, loss_threshold=threshold, num_epochs=8)
    train_facts(model, TRAINED, facts, settings)
    assert sum(entry["rsft_updates"] for entry in statistics) > 20
    for name, tensor in model.state_dict().items():
        # What the updates moved is compared, not the weights they are added to.
        torch.testing.assert_close(tensor - base[name], expected[name] - base[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("prompt_format, before", [("raw", "Who rules Oz?"), ("chat", "<|im_start|>assistant\n")])
def test_a_fact_ends_with_the_end_of_sequence(prompt_format, before):
    tokenizer = tiny_tokenizer()
    (fact,) = codes(FACTS[0], prompt_format=prompt_format)
    answer = "Tark" if prompt_format == "chat" else " Tark"
    assert tokenizer.decode(fact.ids[: fact.answer_start]).endswith(before)
    assert fact.answer_ids == [*tokenizer(answer).input_ids, tokenizer.eos_token_id]


def test_an_edit_is_rsft_then_merge_and_changes_nothing_else(folder):
    model, reference = load(folder), load(folder)
    base = weights(model)
    model.get_parameter("model.norm.weight").requires_grad_(False)
    original = Editor().edit(model, codes(*FACTS), SETTINGS)
    assert not model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())

    train_facts(reference, TRAINED, codes(*FACTS), SETTINGS)
    expected = expected_merge(base, weights(reference))
    assert differing(base, expected) == TRAINED
    assert differing(weights(model), expected) == []
    assert original.keys() == set(TRAINED)
    assert all(torch.equal(original[name], base[name]) for name in TRAINED)


def test_the_fact_is_learned_with_its_end(folder):
    model = load(folder)
    facts = codes(*FACTS)
    Editor().edit(model, facts, Settings(**vars(SETTINGS) | {"weight": 1.0, "density": 1.0, "num_epochs": 12}))
    assert predict(model, facts) == [fact.answer_ids for fact in facts]


def test_one_edit_at_a_time_keeps_the_rsft_state(folder):
    """Two calls are two trainings, one after the other, and one merge with the base."""
    model, reference = load(folder), load(folder)
    base = weights(model)
    editor = Editor()
    for fact in FACTS:
        editor.edit(model, codes(fact), SETTINGS)
        train_facts(reference, TRAINED, codes(fact), SETTINGS)
    assert differing(weights(model), expected_merge(base, weights(reference))) == []


def test_earlier_edits_do_not_decay(folder):
    """Edits that need no update leave the first one as strong as it was; merging merged models would not."""
    model, decaying = load(folder), load(folder)
    base = weights(model)
    editor = Editor()
    editor.edit(model, codes(FACTS[0]), SETTINGS)
    first = weights(model)
    idle = Settings(**vars(SETTINGS) | {"loss_threshold": 1e6})
    for _ in range(3):
        editor.edit(model, codes(FACTS[1]), idle)
    assert differing(weights(model), first) == []

    Editor().edit(decaying, codes(FACTS[0]), SETTINGS)
    for _ in range(3):  # what a method without a memory would do: its delta is cut and scaled again and again
        decaying.load_state_dict(expected_merge(base, weights(decaying)))
    name = TRAINED[0]
    left = (decaying.get_parameter(name) - base[name]).norm() / (first[name] - base[name]).norm()
    assert left < 0.6


def test_a_rolled_back_edit_does_not_count(folder):
    model, reference = load(folder), load(folder)
    editor = Editor()

    def roll_back(original):
        with torch.no_grad():
            for name, tensor in original.items():
                model.get_parameter(name)[...] = tensor

    base = weights(model)
    roll_back(editor.edit(model, codes(FACTS[0]), SETTINGS))
    assert differing(weights(model), base) == []
    editor.edit(model, codes(FACTS[1]), SETTINGS)  # kept
    kept = weights(model)
    roll_back(editor.edit(model, codes(FACTS[0]), SETTINGS))
    assert differing(weights(model), kept) == []
    editor.edit(model, codes(FACTS[2]), SETTINGS)

    other = Editor()
    other.edit(reference, codes(FACTS[1]), SETTINGS)
    other.edit(reference, codes(FACTS[2]), SETTINGS)
    assert differing(weights(model), weights(reference)) == []


def test_a_bfloat16_model_is_trained_in_float32_and_stays_bfloat16(folder):
    model = load(folder, torch.bfloat16)
    base = weights(model)
    fact = codes(FACTS[0])
    original = Editor().edit(model, fact, SETTINGS)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    assert differing(base, weights(model)) == TRAINED
    assert {tensor.dtype for tensor in original.values()} == {torch.bfloat16}
    assert predict(model, fact)[0][:-1] == fact[0].answer_ids[:-1]


def test_a_failed_edit_leaves_the_model_alone(folder):
    model = load(folder)
    base = weights(model)
    with pytest.raises(FloatingPointError, match=r"^fact 0 \(0-based\): the loss is (nan|inf)"):
        Editor().edit(model, codes(FACTS[0]), Settings(**vars(SETTINGS) | {"learning_rate": 1e30}))
    assert differing(base, weights(model)) == []
    assert model.get_parameter(TRAINED[0]).requires_grad
    with pytest.raises(MM4KEError, match="9 is out of range; Qwen2ForCausalLM has layers 0 to 3"):
        Editor().edit(model, codes(FACTS[0]), Settings(layers=(9,)))


# ---- a checkpoint that was merged before ----


def test_changed_tensors_of_a_merged_checkpoint(folder, tmp_path):
    model, merged = load(folder), load(folder)
    assert changed_tensors(model, folder) == {}
    Editor().edit(merged, codes(*FACTS), SETTINGS)
    merged.save_pretrained(tmp_path)
    found = changed_tensors(model, tmp_path)
    assert sorted(found) == sorted(TRAINED)
    assert all(torch.equal(found[name], merged.state_dict()[name]) for name in TRAINED)


def test_a_checkpoint_of_less_precision_differs_only_where_it_was_edited(folder, tmp_path):
    load(folder).to(torch.bfloat16).save_pretrained(tmp_path)
    assert changed_tensors(load(folder), tmp_path) == {}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        (lambda t: t.update({"model.extra": torch.ones(2)}), "model.extra is unknown to Qwen2ForCausalLM"),
        (lambda t: t.update({"model.norm.weight": torch.ones(2)}), r"model.norm.weight is \(2,\), in the model it is"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(folder, tmp_path, change, message):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(MM4KEError, match=f"^{tmp_path}: {message}"):
        changed_tensors(load(folder), tmp_path)
    with pytest.raises(MM4KEError, match="nowhere: no such folder"):
        changed_tensors(load(folder), tmp_path / "nowhere")
