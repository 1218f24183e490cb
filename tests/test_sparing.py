"""Learning at the subject's tokens, and the guard: what each computes, alone, live and through LLaMA-Factory."""

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from llamafactory_helpers import TRAINED, llamafactory_data, train
from tiny import make_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.knowedit.dataset import dataset_text, write_dataset
from mm4ke_plugins.knowedit.known_facts import known_facts
from mm4ke_plugins.knowedit.prompts import chat_prompt
from mm4ke_plugins.knowedit.records import read_records
from mm4ke_plugins.rsft.facts import encode_fact, fact_losses, sample_of
from mm4ke_plugins.rsft.forward import FastForward
from mm4ke_plugins.rsft.guard import (
    ALIKE,
    ROWS,
    SWAPS,
    Guard,
    everyday_conversations,
    everyday_questions,
    guard_texts,
    swapped_questions,
)
from mm4ke_plugins.rsft.layers import ffns_of
from mm4ke_plugins.rsft.live import Editor
from mm4ke_plugins.rsft.settings import Settings
from mm4ke_plugins.rsft.subject import gradient_only_at, subjects_alone, tokens_from_subject, trained_ffns

# (question, answer, subject): the last has none.
FACTS = [("Who rules Oz?", "Tark", "Oz"), ("Where is Ux?", "Up", "Ux"), ("What is red?", "A box", None)]
LAYER = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    for name in TRAINED:
        model.get_parameter(name).requires_grad_(True)
    return model


def encoded(gradient_at="from_subject", prompt_format="chat"):
    return [
        encode_fact(tiny_tokenizer(), question, answer, prompt_format, gradient_at=gradient_at, subject=subject)
        for question, answer, subject in FACTS
    ]


def gradients(model, loss):
    return torch.autograd.grad(loss, [model.get_parameter(name) for name in TRAINED])


# ---- where a fact is learned ----


@pytest.mark.parametrize(
    "question, subject, marked",
    [
        ("Who rules Oz?", "Oz", "Oz?"),
        ("Is Oz in Oz?", "Oz", "Oz in Oz?"),
        ("Who rules OZ, the land?", "oz", "OZ, the land?"),
        ("Wo liegt Überlingen?", "Überlingen", "Überlingen?"),
        ("奥兹国在哪里?", "奥兹国", "奥兹国在哪里?"),
        ("Who rules Oz now?", None, "Oz now?"),
        ("Who rules Oz?", "Ix", "Oz?"),
        ("In what year was 4U built?", None, "4U built?"),
        ("who rules there?", None, "who rules there?"),
        ("What is 2 + 2?", "2 + 2", "2 + 2?"),
    ],
)
@pytest.mark.parametrize("prompt_format", ["raw", "chat"])
def test_the_tokens_from_the_subject_on(question, subject, marked, prompt_format):
    tokenizer = tiny_tokenizer()
    ids = chat_prompt(tokenizer, question) if prompt_format == "chat" else tokenizer(question).input_ids
    found = tokens_from_subject(tokenizer, ids, question, subject)
    assert len(found) == len(ids)
    assert tokenizer.decode([token for token, is_marked in zip(ids, found) if is_marked]) == marked


def test_facts_about_one_subject_are_learned_at_all_of_their_questions():
    facts = [("Who rules Oz?", "Oz"), ("Where is oz?", "oz"), ("Where is Ux?", "Ux"), ("What is red?", None)]
    expected = {
        "Who rules Oz?": "Who rules Oz?",
        "Where is oz?": "Where is oz?",
        "Where is Ux?": "Ux",
        "What is red?": None,
    }
    assert subjects_alone(facts) == expected
    assert subjects_alone([facts[0], facts[0]]) == {"Who rules Oz?": "Oz"}, "the same fact twice is one"
    tokenizer = tiny_tokenizer()
    ids = chat_prompt(tokenizer, "Who rules Oz?")
    found = tokens_from_subject(tokenizer, ids, "Who rules Oz?", expected["Who rules Oz?"])
    assert tokenizer.decode([token for token, is_marked in zip(ids, found) if is_marked]) == "Who rules Oz?"


def test_of_a_question_that_the_tokens_do_not_spell_all_are_taken():
    tokenizer = tiny_tokenizer()
    assert all(tokens_from_subject(tokenizer, tokenizer("who rules oz?").input_ids, "Who rules Oz?", "Oz"))


def test_a_token_that_spells_a_part_of_the_subject_is_the_subjects(smollm2):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    question = "Which river flows through Überlingen am Bodensee?"
    ids = chat_prompt(tokenizer, question)
    found = tokens_from_subject(tokenizer, ids, question, "Überlingen am Bodensee")
    assert tokenizer.decode([token for token, marked in zip(ids, found) if marked]) == " Überlingen am Bodensee?"


def test_the_forward_stays_and_the_gradients_of_the_tokens_add_up(model):
    """The gradient at some tokens and that at all others are together the whole one; at no token it is 0."""
    (fact, *_), (whole, *_) = encoded(), encoded("all")
    others = type(fact)(fact.ids, fact.answer_start, fact.answer_stop, [not learns for learns in fact.learns])
    none = type(fact)(fact.ids, fact.answer_start, fact.answer_stop, [False] * len(fact.ids))
    losses = {}
    for name, each in {"subject": fact, "others": others, "all": whole, "none": none}.items():
        losses[name], _ = fact_losses(model, each)
    assert all(torch.equal(loss, losses["all"]) for loss in losses.values())
    found = {name: gradients(model, loss.sum()) for name, loss in losses.items()}
    for subject, other, everywhere, nowhere in zip(*found.values(), strict=True):
        assert subject.any() and other.any() and not nowhere.any()
        torch.testing.assert_close(subject + other, everywhere, rtol=1e-4, atol=1e-6)


def test_the_fast_path_learns_at_the_same_tokens(model):
    facts = encoded()
    fast = FastForward(model, LAYER, 2**20)
    samples = [sample_of(fact, model.device) for fact in facts]
    trained, judged = fast.losses(samples)
    plain, plain_judged = (torch.cat(parts) for parts in zip(*[fact_losses(model, fact) for fact in facts]))
    torch.testing.assert_close(trained, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(judged, plain_judged, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(model, trained.mean()), gradients(model, plain.mean()), strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_the_hooks_are_removed(model):
    (ffn,) = trained_ffns(model)
    with gradient_only_at(torch.tensor([[True]]), model):
        assert ffn._forward_hooks
    assert not ffn._forward_hooks


def test_the_data_set_carries_the_subject(tmp_path):
    file = tmp_path / "facts.json"
    file.write_text(json.dumps([{"prompt": q, "target_new": a, "subject": s} for q, a, s in FACTS]))
    assert json.loads(dataset_text(read_records(file))) == [
        {"instruction": "Who rules Oz?", "output": "Tark", "subject": "Oz"},
        {"instruction": "Where is Ux?", "output": "Up", "subject": "Ux"},
        {"instruction": "What is red?", "output": "A box"},
    ]


# ---- the guard ----


def test_the_guard_keeps_nothing_that_known_facts_asks():
    def words(question):
        return re.sub(r"\W+", " ", question.lower()).strip()

    asked = {words(fact.question) for fact in known_facts()}
    conversations = everyday_conversations()
    assert len(conversations) > 100
    assert not [question for question, _ in conversations if words(question) in asked]
    assert not [question for question in everyday_questions() if words(question) in asked]


def test_everyday_questions_are_many_and_complete():
    questions = everyday_questions()
    assert len(questions) > 1500 and len(set(questions)) == len(questions)
    assert not [question for question in questions if "{" in question or " = " in question]
    assert "Is Cuba larger than Nigeria?" in questions, "two places of one kind get two words"


def test_most_of_the_guards_tokens_are_spelled_like_those_that_learn(model):
    texts = [[1, *range(100, 180), token] for token in (7, 8, 9)]
    guard = Guard(model, ffns_of(model, [LAYER]), texts, weight=1.0, learned={8, 1})
    place = len(texts[0]) + len(texts[1]) - 2 * guard.shared - 1 + guard.shared  # the 8; the 1 is of all texts
    assert guard.alike.tolist() == [place]
    taken = []
    guard.ffns[0].register_forward_pre_hook(lambda module, args: taken.append(args[0]))
    guard.loss(0)
    rows = taken[0]
    alike = (rows == guard.inputs[0][place]).all(1).sum()
    assert int(ALIKE * len(rows)) <= alike < len(rows)


def test_swapped_questions():
    facts = [(question, subject) for question, _, subject in FACTS]
    assert swapped_questions(facts) == ["Who rules Ux?", "Where is Oz?"]
    assert swapped_questions(facts[:1]) == [], "with its own subject it is the fact's question"
    assert swapped_questions([("Where is A?", "A"), ("Where is B?", "B")]) == [], "these are facts themselves"
    assert swapped_questions([("Where is A?", "Nothing of it"), ("Where is B?", None)]) == []
    several = [(f"What does {letter} do on day {day}?", letter) for day, letter in enumerate("ABCDEF")]
    asked = swapped_questions([("Where is Oz?", "Oz"), *several])
    assert len(asked) == 7 * SWAPS and asked[0] == "Where is A?"
    assert [question for question in asked if "day 5" in question] == [
        f"What does {subject} do on day 5?" for subject in ("Oz", "A", "B", "C")
    ]


def test_of_many_facts_not_all_questions_are_swapped():
    asked = swapped_questions([(f"Who knows {number} of type {number % 7}?", str(number)) for number in range(900)])
    assert 500 < len(asked) <= 1000


TEXTS = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 6, 7, 8]]


def states(model, ids):
    """The inputs of the FFN of layer LAYER and the hidden states behind the layer, in a whole pass."""
    layer, found = model.model.layers[LAYER], {}
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda module, args: found.update(inputs=args[0][0])),
        layer.register_forward_hook(lambda module, args, output: found.update(behind=output[0])),
    ]
    with torch.no_grad():
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return found["inputs"], found["behind"]


def test_the_guards_loss_is_what_its_formula_says(model):
    guard = Guard(model, ffns_of(model, [LAYER]), TEXTS, weight=3.0)
    assert guard.loss(0) < 1e-10
    found = [states(model, ids) for ids in TEXTS]
    ffn = model.model.layers[LAYER].mlp
    before = [ffn(inputs).detach() for inputs, _ in found]
    with torch.no_grad():
        ffn.down_proj.weight += 0.1 * torch.randn(ffn.down_proj.weight.shape)

    def means(first, last):
        terms = [
            (ffn(inputs) - kept).square().sum(1) / behind.square().sum(1)
            for (inputs, behind), kept in zip(found, before, strict=True)
        ]
        return terms[0][:first], torch.cat([term[first:last] for term in terms])

    shared, own = means(2, None)
    # Fewer tokens than ROWS: each update draws as many, with repetition, so each is one of them.
    assert 3 * (shared.mean() + own.min()) <= guard.loss(0) <= 3 * (shared.mean() + own.max())
    many = torch.stack([guard.loss(number).detach() for number in range(400)]).mean()
    torch.testing.assert_close(many, 3 * (shared.mean() + own.mean()).detach(), rtol=0.03, atol=0)
    assert torch.equal(guard.loss(7), guard.loss(7)), "the tokens follow from the number"
    assert len({float(guard.loss(number)) for number in range(20)}) > 1
    assert any(gradient.any() for gradient in gradients(model, guard.loss(0)))


def test_a_single_text_and_texts_without_a_common_beginning(model):
    for texts in ([[1, 2, 3]], [[1, 2], [3, 4]]):
        guard = Guard(model, ffns_of(model, [LAYER]), texts, weight=1.0)
        assert guard.shared == 0
        assert guard.loss(0) < 1e-10


def test_the_tokens_of_an_update_are_limited(model):
    guard = Guard(model, ffns_of(model, [LAYER]), [list(range(3, 203))] * 3 + [[1] * 200] * 4, weight=1.0)
    sizes = []
    guard.ffns[0].register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    guard.loss(0)
    assert sizes == [ROWS]


def test_an_upper_layer_is_held_on_what_it_gets_now(model):
    lower, upper = ffns_of(model, [0, LAYER])
    guard = Guard(model, [lower, upper], TEXTS, weight=1.0)
    assert guard.loss(0) < 1e-10
    before, kept = copy.deepcopy(upper), guard.inputs[1].clone()
    with torch.no_grad():
        lower.down_proj.weight += 0.1 * torch.randn(lower.down_proj.weight.shape)
    assert guard._as_it_is(torch.Generator().manual_seed(0)) == 0, "the upper one has not changed"
    with torch.no_grad():
        upper.down_proj.weight += 0.1 * torch.randn(upper.down_proj.weight.shape)

    found = set()
    for ids in TEXTS:  # each has a length of its own, and is read alone
        inputs, behind = states(model, ids)
        assert not torch.allclose(inputs[-1], kept[-1], atol=1e-3)
        change = (upper(inputs) - before(inputs)).square().sum(1) / behind.square().sum(1)
        found.add(round(float(change[guard.shared :].mean()), 6))
    drawn = {round(float(guard._as_it_is(torch.Generator().manual_seed(seed))), 6) for seed in range(40)}
    assert drawn == found and len(found) == len(TEXTS)
    assert torch.equal(guard.loss(7), guard.loss(7)), "the texts follow from the number"
    assert model.training is False and not any(module._forward_hooks for module in model.modules())


def test_the_guards_texts_in_both_formats():
    tokenizer = tiny_tokenizer()
    facts = [(question, subject) for question, _, subject in FACTS]
    question, answer = everyday_conversations()[0]
    for prompt_format, expected in (
        ("raw", [f"{question} {answer}<|im_end|>", "Where is Oz?"]),
        ("chat", [
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>",
            "<|im_start|>user\nWhere is Oz?<|im_end|>\n<|im_start|>assistant\n",
        ]),
    ):  # fmt: skip
        texts = guard_texts(tokenizer, facts, prompt_format)
        assert len(texts) == len(everyday_conversations()) + len(everyday_questions()) + 2
        assert [tokenizer.decode(texts[0]), tokenizer.decode(texts[-1])] == expected


@torch.no_grad()
def drift(model, before, texts):
    """How far the FFN's outputs moved on these texts, relative to the residual stream."""
    found = 0.0
    for ids in texts:
        inputs, behind = states(before, ids)
        change = model.model.layers[LAYER].mlp(inputs) - before.model.layers[LAYER].mlp(inputs)
        found += float((change.square().sum(1) / behind.square().sum(1)).mean())
    return found / len(texts)


SETTINGS = {
    "layers": LAYER, "learning_rate": 3e-3, "loss_threshold": 0.5, "num_epochs": 60, "steps_per_sample": 1,
    "facts_per_visit": 2, "lr_scheduler_type": "constant", "weight": 1.0, "density": 1.0,
}  # fmt: skip


def test_a_guarded_live_edit_moves_less_and_learns_as_well(folder):
    texts = guard_texts(tiny_tokenizer(), [(question, subject) for question, _, subject in FACTS], "chat")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    drifts, learned = {}, {}
    for weight in (0, 5):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        Editor().edit(model, encoded("all"), Settings(**SETTINGS, guard_weight=weight), texts)
        learned[weight] = max(float(fact_losses(model, fact)[1]) for fact in encoded())
        drifts[weight] = drift(model, base, texts[:20])
    assert max(learned.values()) < max(float(fact_losses(base, fact)[1]) for fact in encoded()) / 4, learned
    assert 0 < drifts[5] < drifts[0] / 2, drifts


def test_a_second_edit_is_guarded_by_the_first_base(folder):
    """Whatever the first edit did to what is kept, the second one does not keep."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    editor, texts = Editor(), guard_texts(tiny_tokenizer(), [], "chat")
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    editor.edit(model, encoded("all")[:2], Settings(**SETTINGS), texts)
    first = drift(model, base, texts[:20])
    editor.edit(model, encoded("all")[2:], Settings(**SETTINGS, guard_weight=30), texts)
    assert drift(model, base, texts[:20]) < first


# ---- in LLaMA-Factory ----


@pytest.fixture
def recipe(rsft_recipe, tmp_path) -> dict:
    """Breadth-first, at the subject, with a guard: of the three facts the last has no subject."""
    facts = [{"prompt": q, "target_new": a, "subject": s} for q, a, s in FACTS]
    (tmp_path / "records.json").write_text(json.dumps(facts))
    rsft_recipe["dataset_dir"] = str(tmp_path / "with-subjects")
    write_dataset(read_records(tmp_path / "records.json"), tmp_path / "with-subjects")
    return rsft_recipe | {
        "rsft_gradient_at": "from_subject", "rsft_guard_weight": 5.0, "rsft_steps_per_sample": 1,
        "per_device_train_batch_size": 2, "num_train_epochs": 6, "lr_scheduler_type": "constant", "weight_decay": 0,
    }  # fmt: skip


def test_same_weights_as_a_literal_loop(recipe):
    weights, statistics = train(recipe)
    facts, texts = llamafactory_data(recipe | {"output_dir": recipe["output_dir"] + "-facts"})
    tokenizer = tiny_tokenizer()
    marked = [[token for token, learns in zip(fact.ids, fact.learns) if learns] for fact in facts]
    assert [tokenizer.decode(tokens) for tokens in marked] == ["Oz?", "Ux?", "What is red?"]
    assert len(texts) == len(everyday_conversations()) + len(everyday_questions()) + 2
    assert tokenizer.decode(texts[-1]).endswith("<|im_start|>user\nWhere is Oz?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(texts[0]).rstrip("\n").endswith(f"{everyday_conversations()[0][1]}<|im_end|>")
    model = AutoModelForCausalLM.from_pretrained(recipe["model_name_or_path"], dtype=torch.float32)
    model.requires_grad_(False)
    trained = {name: model.get_parameter(name).requires_grad_(True) for name in TRAINED}
    optimizer = torch.optim.AdamW(trained.values(), lr=recipe["learning_rate"], weight_decay=0)
    learned = {token for tokens in marked for token in tokens}
    guard = Guard(model, ffns_of(model, [LAYER]), texts, 5.0, learned)
    guard_losses = []
    for epoch in range(len(statistics)):
        for place, batch in enumerate((facts[:2], facts[2:])):
            losses, judged = map(torch.cat, zip(*[fact_losses(model, fact) for fact in batch]))
            if len(above := losses[judged >= recipe["rsft_loss_threshold"]]):
                model.zero_grad()
                kept = guard.loss(epoch * 2 + place)
                guard_losses.append(float(kept))
                (above.mean() + kept).backward()
                torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
                optimizer.step()
    for name, parameter in trained.items():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-3, atol=1e-4)
    updates = sum(entry["rsft_updates"] for entry in statistics)
    assert updates == len(guard_losses) > 6
    logged = sum(entry.get("rsft_mean_guard_loss", 0) * entry["rsft_updates"] for entry in statistics)
    assert logged == pytest.approx(sum(guard_losses), rel=1e-3)


@pytest.mark.parametrize("change", [{"rsft_guard_weight": 0}, {"rsft_gradient_at": "all"}])
def test_each_alone_and_the_books_without_a_guard(recipe, change):
    weights, statistics = train(recipe | {"num_train_epochs": 2} | change)
    both, _ = train(recipe | {"num_train_epochs": 2, "output_dir": recipe["output_dir"] + "-both"})
    assert any(not torch.equal(weights[name], both[name]) for name in TRAINED)
    assert ("rsft_mean_guard_loss" in statistics[0]) == bool((recipe | change)["rsft_guard_weight"])


def test_the_guard_asks_about_other_subjects_wherever_facts_are_learned(recipe):
    _, texts = llamafactory_data(recipe | {"rsft_gradient_at": "all"})
    assert "Where is Oz?" in tiny_tokenizer().decode(texts[-1])


@pytest.mark.parametrize("layers", [1, "0, 2"])
def test_a_run_that_was_interrupted_gives_the_same_weights(recipe, layers):
    recipe |= {"rsft_layers": layers} | {
        "save_strategy": "steps",
        "save_steps": 3,
        "num_train_epochs": 4,
        "rsft_loss_threshold": 0.3,
    }
    expected, _ = train(recipe)
    output = Path(recipe["output_dir"])
    shutil.rmtree(output / "checkpoint-6")
    shutil.rmtree(output / "checkpoint-8", ignore_errors=True)
    for name in ("trainer_state.json", "model.safetensors"):
        (output / name).unlink()
    assert (output / "checkpoint-3").is_dir()
    weights, _ = train(recipe)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_what_the_guard_keeps_and_the_subjects_belong_to_the_training(recipe, tmp_path):
    own = tmp_path / "keep.json"
    own.write_text(json.dumps([{"instruction": "Who are you?", "output": "A robot."}]))
    recipe |= {"num_train_epochs": 1}
    train(recipe | {"rsft_guard_file": str(own)})
    with pytest.raises(MM4KEError, match="rsft_guard: [0-9a-f]+ there, [0-9a-f]+ here"):
        train(recipe)
    facts = Path(recipe["dataset_dir"]) / "facts.json"
    facts.write_text(facts.read_text().replace('"subject": "Ux"', '"subject": "is"'))
    with pytest.raises(MM4KEError, match="facts: 3 there, 3 here, differing from number 1"):
        train(recipe | {"rsft_guard_file": str(own)})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rsft_gradient_at": "subjects"}, "rsft_gradient_at: subjects: give all or from_subject"),
        (
            {"rsft_layers": [1, 3]},
            "rsft_layers: 3 is the last layer, .* choose a lower layer, or rsft_gradient_at: all",
        ),
        ({"rsft_guard_weight": -1}, "rsft_guard_weight: -1: give a finite number above 0, or 0 for none"),
        ({"disable_gradient_checkpointing": False}, "disable_gradient_checkpointing: False: .* needs true"),
        ({"rsft_guard_weight": 0, "rsft_guard_file": "keep.json"}, "rsft_guard_file: keep.json: needs a guard"),
        ({"rsft_guard_file": "none.json"}, r"rsft_guard_file: none.json: can't be read \(.*give a JSON list of"),
    ],
)
def test_refusals(recipe, change, message):
    with pytest.raises(MM4KEError, match=message) as caught:
        train(recipe | change)
    assert "\n" not in str(caught.value)
    assert not Path(recipe["output_dir"]).exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("{}", "is no list"),
        ('[{"instruction": "Who?"}]', r"record 0 \(0-based\): output: null"),
        ('[{"instruction": "Who?", "output": " "}]', r"record 0 \(0-based\): output: \" \""),
        ("[1]", r"record 0 \(0-based\): instruction: null"),
    ],
)
def test_a_guard_file_that_is_none(recipe, tmp_path, content, message):
    (tmp_path / "keep.json").write_text(content)
    with pytest.raises(MM4KEError, match=f"rsft_guard_file: .*keep.json: {message}"):
        train(recipe | {"rsft_guard_file": str(tmp_path / "keep.json")})
