"""The metrics against one-by-one reimplementations, and against EasyEdit's own function."""

import json
from types import SimpleNamespace

import pytest
import torch
from knowedit_helpers import RECORDS, easyedit_function
from tiny import FAMILIES, make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mm4ke_plugins.knowedit.metrics import (
    METRICS,
    answer,
    mean_scores,
    perplexity,
    predict,
    question_scores,
    questions_of,
)
from mm4ke_plugins.knowedit.prompts import PROMPT_FORMATS, Encoded, Question, chat_prompt, encode
from mm4ke_plugins.knowedit.records import read_records


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("facts") / "facts.json"
    path.write_text(json.dumps(RECORDS), encoding="utf-8")
    return questions_of(read_records(path))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load(make_tiny_model(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model with the same tokenizer that predicts something else about as often as not."""
    folder = tmp_path_factory.mktemp("other")
    model, tokenizer = load(make_tiny_model(folder))
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight += 0.03 * torch.randn_like(layer.mlp.down_proj.weight)
    return model, tokenizer


def naive_predictions(model, code):
    """One question, nothing cut off, nothing cached, nothing padded."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([code.ids])).logits[0]
    return [int(logits[position - 1].argmax()) for position in range(code.answer_start, len(code.ids))]


# ---- questions and tokens ----


def test_questions_follow_the_records(questions):
    first = [question for question in questions if question.record == 0]
    assert [(question.metric, question.axis, question.prompt, question.answer) for question in first] == [
        ("edit_success", "", "Who founded Arnholt?", "tlohnrA the Old"),
        ("generalization", "", "Arnholt was founded by", "tlohnrA the Old"),
        ("portability", "Reasoning", "The century in which Arnholt was founded:", "the twelfth"),
        ("portability", "Reasoning", "The founder of Arnholt was born in", "Oslo"),
        ("portability", "Subject_Aliasing", "Who started Arn.?", "tlohnrA"),
        ("locality", "Relation_Specificity", "Arnholt lies in", "Norway"),
        ("locality", "Relation_Specificity", "The river of Arnholt is called the", "Long and Winding Water"),
    ]
    assert len(questions) == 7 * len(RECORDS)


def test_every_rephrased_prompt_is_asked_and_their_mean_counts(tmp_path):
    records = [RECORDS[0] | {"rephrase_prompt": ["In other words?", "Again?"]}, RECORDS[1]]
    (tmp_path / "facts.json").write_text(json.dumps(records), encoding="utf-8")
    asked = [q for q in questions_of(read_records(tmp_path / "facts.json")) if q.metric == "generalization"]
    assert [q.prompt for q in asked] == ["In other words?", "Again?", "Brevik was founded by"]
    assert mean_scores(asked, [1.0, 0.5, 0.25])["generalization"] == 0.5


def test_raw_format_is_prompt_space_answer(tiny):
    _, tokenizer = tiny
    code = encode(tokenizer, Question(0, "edit_success", "", "Who founded Brevik?", "Ingrid"), "raw")
    assert tokenizer.decode(code.ids) == "Who founded Brevik? Ingrid"
    assert tokenizer.decode(code.answer_ids) == " Ingrid"


def test_chat_format_puts_the_answer_into_the_assistants_turn(tiny):
    _, tokenizer = tiny
    code = encode(tokenizer, Question(0, "edit_success", "", "Who founded Brevik?", "Ingrid"), "chat")
    assert tokenizer.decode(code.ids) == (
        "<|im_start|>user\nWho founded Brevik?<|im_end|>\n<|im_start|>assistant\nIngrid"
    )
    assert tokenizer.decode(code.answer_ids) == "Ingrid"


# ---- teacher forcing ----


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_equal_those_one_by_one(family, questions, tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path, family))
    for form in PROMPT_FORMATS:
        codes = [encode(tokenizer, question, form) for question in questions]
        expected = [naive_predictions(model, code) for code in codes]
        assert len({token for tokens in expected for token in tokens}) > 10  # the model says different things
        for batch_size in (1, 3, 16, 1000):
            assert predict(model, codes, batch_size=batch_size) == expected


def test_progress_counts_every_question(tiny, questions):
    model, tokenizer = tiny
    counts = []
    predict(model, [encode(tokenizer, question, "raw") for question in questions], batch_size=9, advance=counts.append)
    assert sum(counts) == len(questions)


def test_a_models_own_continuation_scores_1_and_each_wrong_token_counts(tiny):
    model, _ = tiny
    ids = [5, 6, 7, 8]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    question = Question(0, "edit_success", "", "", "")
    right = Encoded(ids, 4)
    wrong = Encoded([*ids[:-1], ids[-1] + 1], 4)
    predicted = predict(model, [right, wrong])
    assert question_scores([question] * 2, [right, wrong], predicted, predicted) == [1.0, 5 / 6]


def test_locality_is_agreement_with_the_base_model(tiny, other, questions):
    model, tokenizer = tiny
    codes = [encode(tokenizer, question, "raw") for question in questions]
    before, after = predict(model, codes), predict(other[0], codes)
    same = mean_scores(questions, question_scores(questions, codes, before, before))
    assert same["locality"] == 1.0
    assert same["edit_success"] < 0.5

    changed = mean_scores(questions, question_scores(questions, codes, after, before))
    of_records = []
    for record in range(len(RECORDS)):
        probes = []
        for question, code in zip(questions, codes):
            if question.record == record and question.metric == "locality":
                tokens, base_tokens = naive_predictions(other[0], code), naive_predictions(model, code)
                probes.append(sum(map(int.__eq__, tokens, base_tokens)) / len(tokens))
        of_records.append(sum(probes) / len(probes))
    assert 0 < changed["locality"] < 1
    assert changed["locality"] == pytest.approx(sum(of_records) / len(of_records), abs=1e-12)


def test_means_are_over_probes_then_axes_then_records():
    entries = [
        ((0, "edit_success", ""), 1.0),
        ((0, "portability", "Reasoning"), 1.0),
        ((0, "portability", "Reasoning"), 0.0),
        ((0, "portability", "Subject_Aliasing"), 1.0),
        ((1, "edit_success", ""), 0.5),
        ((1, "portability", "Reasoning"), 0.0),
        ((2, "edit_success", ""), 0.0),
        ((2, "portability", "Reasoning"), None),  # an answer without a token of its own
    ]
    questions = [Question(*key, "", "") for key, _ in entries]
    means = mean_scores(questions, [score for _, score in entries])
    assert means == {"edit_success": 0.5, "generalization": None, "portability": 0.375, "locality": None}
    assert tuple(means) == METRICS


def test_an_answer_that_melts_into_the_prompt_has_no_score(tiny):
    model, _ = tiny
    codes = [Encoded([5, 6, 7], 3), Encoded([5, 6, 7, 8], 3)]
    predicted = predict(model, codes)
    assert predicted == [[], naive_predictions(model, codes[1])]
    question = Question(0, "edit_success", "", "", "")
    assert question_scores([question] * 2, codes, predicted, predicted)[0] is None


# ---- perplexity and free generation ----


def test_perplexity_of_a_model_that_knows_nothing_is_the_size_of_its_vocabulary(tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path))
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, tokenizer, "Rivers run to the sea.") == pytest.approx(264)


def test_perplexity_equals_the_mean_over_windows(tiny):
    model, tokenizer = tiny
    text = "A river begins wherever water finds a slope and keeps to it."
    ids = tokenizer(text).input_ids
    losses = []
    for begin in range(0, len(ids), 16):
        part = ids[begin : begin + 16]
        for end in range(1, len(part)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([part[:end]])).logits[0, -1]
            losses.append(-logits.log_softmax(-1)[part[end]].item())
    expected = torch.tensor(losses).mean().exp().item()
    assert perplexity(model, tokenizer, text, window=16) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, tokenizer, text) != pytest.approx(expected, rel=1e-5)


def greedy(model, tokenizer, prompt, count):
    ids = chat_prompt(tokenizer, prompt)
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


def test_free_answers_are_greedy_and_say_when_they_did_not_end(tiny):
    model, tokenizer = tiny
    prompts = ["Who founded Brevik?", "And who, if anybody, founded the town of Fenwick Bay?"]
    answers = answer(model, tokenizer, prompts, max_new_tokens=12)
    assert answers == [tokenizer.decode(greedy(model, tokenizer, prompt, 12)).strip() + "…" for prompt in prompts]


def test_free_answers_stop_by_themselves_and_ignore_the_models_sampling(tmp_path):
    model, tokenizer = load(make_tiny_model(tmp_path))
    tokens = greedy(model, tokenizer, "Who founded Brevik?", 12)
    stop = next(token for token in tokens if token != tokens[0])
    model.generation_config.eos_token_id = [stop]
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    said = tokens[: tokens.index(stop)]
    assert answer(model, tokenizer, ["Who founded Brevik?"], max_new_tokens=12) == [
        tokenizer.decode([*said, stop], skip_special_tokens=True).strip()
    ]
    tokenizer.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(stop)]})
    assert answer(model, tokenizer, ["Who founded Brevik?"], max_new_tokens=12) == [tokenizer.decode(said).strip()]


# ---- EasyEdit ----


@pytest.mark.easyedit
def test_scores_and_predictions_equal_easyedits(tiny, other, questions):
    reference = easyedit_function()
    model, tokenizer = tiny
    codes = [encode(tokenizer, question, "raw") for question in questions]
    before, after = predict(model, codes), predict(other[0], codes)
    ours = question_scores(questions, codes, after, before)
    hparams = SimpleNamespace(max_length=40)

    groups = {}  # EasyEdit asks the probes of one axis together
    for row, question in enumerate(questions):
        groups.setdefault((question.record, question.metric, question.axis), []).append(row)
    compared = 0
    for (_, metric, _), rows in groups.items():
        prompts, targets = ([getattr(questions[row], name) for row in rows] for name in ("prompt", "answer"))
        arguments = (tokenizer, hparams, prompts, targets, "cpu")
        if metric == "locality":
            assert reference(model, *arguments, locality=True) == [before[row] for row in rows]
            assert reference(other[0], *arguments, locality=True) == [after[row] for row in rows]
        else:
            assert reference(other[0], *arguments) == pytest.approx([ours[row] for row in rows], abs=1e-12)
        compared += len(rows)
    assert compared == len(questions) == 56
