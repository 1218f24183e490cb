"""Known facts kept: the questions, the judgement of answers, and what is measured of an edited model."""

import copy

import pytest
import torch
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mm4ke_plugins.knowedit import known_facts as module
from mm4ke_plugins.knowedit.known_facts import KnownFact, KnownFacts, known_facts
from mm4ke_plugins.knowedit.metrics import answer, prompt_ids


def test_the_questions():
    facts = known_facts()
    assert len(facts) == len({fact.question for fact in facts}) >= 140
    kinds = {"word", "arithmetic", "sentence", "list", "how-to", "refusal", "smalltalk"}
    assert {fact.kind for fact in facts} == kinds
    for fact in facts:
        assert fact.parts and all(
            part and all(phrase == phrase.lower() != "" for phrase in part) for part in fact.parts
        )


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("The capital of Greece is Athens.", True),
        ("ATHENS!", True),
        ("Mykonos", False),
        ("Athensville", False),
        ("", False),
    ],
)
def test_a_word_is_looked_for(answer, is_right):
    assert KnownFact("word", "?", (("athens",),)).is_right(answer) is is_right


def test_all_parts_and_any_phrase():
    fact = KnownFact("list", "?", (("red",), ("blue whale", "yellow")))
    assert fact.is_right("Red, and the blue whale") and fact.is_right("yellow; red")
    assert not fact.is_right("blue, whale") and not fact.is_right("a blue whale")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = make_tiny_model(tmp_path_factory.mktemp("base"))
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def known(tiny, monkeypatch):
    """Six questions, of which the base answers three right: their answers are what it says."""
    model, tokenizer = tiny
    questions = ["Who?", "What is it?", "Where?", "Why?", "When was that?", "How?"]
    said = answer(model, tokenizer, questions, module.MAX_NEW_TOKENS)
    assert len(set(said)) > 1
    facts = [KnownFact("word", question, (("never said",),)) for question in questions]
    monkeypatch.setattr(KnownFact, "is_right", lambda fact, text: text in right[fact.question])
    right = {
        question: [text.rstrip("…")] if place % 2 == 0 else []
        for place, (question, text) in enumerate(zip(questions, said))
    }
    monkeypatch.setattr(module, "known_facts", lambda: facts)
    return KnownFacts(model, tokenizer)


def test_the_base_keeps_all(tiny, known, monkeypatch):
    asked = []
    monkeypatch.setattr(
        module, "generate", lambda model, tokenizer, prompts, *rest, **more: asked.extend(prompts) or []
    )
    found = known.measure(tiny[0])
    assert (known.asked, found.asked, found.kept, found.unchanged, found.length) == (6, 3, 1.0, 1.0, 1.0)
    assert found.kl == pytest.approx(0, abs=1e-6) and found.lost == []
    assert asked == []  # what the base said was enough to see that it would be said again


def test_another_model_is_measured_on_what_the_base_knew(tiny, known):
    base, tokenizer = tiny
    edited = copy.deepcopy(base)
    with torch.no_grad():
        edited.model.layers[1].mlp.down_proj.weight.mul_(4)
    found = known.measure(edited)
    said = {
        fact.question: answer(edited, tokenizer, [fact.question], module.MAX_NEW_TOKENS)[0] for fact in known.facts
    }
    assert {question: pair[1] for question, pair in found.answers.items()} == {
        question: text.rstrip("…").strip() for question, text in said.items()
    }
    same = [question for question, (before, after) in found.answers.items() if before == after]
    assert found.unchanged == len(same) / 3 and found.kept == 1 - len(found.lost) / 3 < 1
    divergences = []
    for fact, tokens in zip(known.facts, known.tokens):
        asked = prompt_ids(tokenizer, fact.question)
        ids = torch.tensor([[*asked, *tokens]])
        with torch.inference_mode():
            ours, theirs = (model(ids).logits[0, len(asked) - 1 : -1].log_softmax(-1) for model in (base, edited))
        divergences += (ours.exp() * (ours - theirs)).sum(-1).tolist()
    assert found.kl == pytest.approx(sum(divergences) / len(divergences), rel=1e-4)


def test_the_likeliest_alone_are_a_lower_bound(tiny, known, monkeypatch):
    base, tokenizer = tiny
    edited = copy.deepcopy(base)
    with torch.no_grad():
        edited.model.layers[1].mlp.down_proj.weight.mul_(4)
    whole = known.divergence(edited)
    monkeypatch.setattr(module, "LIKELIEST", 16)
    assert 0 < KnownFacts(base, tokenizer).divergence(edited) < whole


def test_a_model_that_knew_nothing(tiny, monkeypatch):
    monkeypatch.setattr(module, "known_facts", lambda: [KnownFact("word", "Who?", (("never said",),))])
    assert KnownFacts(*tiny).measure(tiny[0]) is None
