"""lm-eval's own evaluator and command with our tasks and model type, against the metrics themselves."""

import ast
import json
import os
import shutil
from collections import defaultdict
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import nltk
import numpy
import pytest
import torch
from conftest import ROOT, run_command
from datasets import Dataset
from knowedit_helpers import RECORDS, easyedit_function
from lm_eval.tasks import TaskManager
from lm_eval_helpers import DOWN, both, edit, evaluate, results, samples_of
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mm4ke_plugins import activation
from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.hosts.lm_eval.adapter import PACKAGE, TASK_FOLDERS
from mm4ke_plugins.hosts.lm_eval.model import MM4KELM
from mm4ke_plugins.knowedit.dataset import read_facts
from mm4ke_plugins.knowedit.known_facts import MAX_NEW_TOKENS, KnownFact, known_facts
from mm4ke_plugins.knowedit.metrics import (
    answer,
    exact_match,
    mean_scores,
    ngram_entropy,
    predict,
    question_scores,
    questions_of,
)
from mm4ke_plugins.knowedit.prompts import encode
from mm4ke_plugins.knowedit.records import read_records
from mm4ke_plugins.knowedit.tasks import generate, known
from mm4ke_plugins.knowedit.tasks.utils import AXES, documents

FORCED = ["edit_success", "generalization", *(f"{metric}_{axis.lower()}" for metric in AXES for axis in AXES[metric])]
# ---- the tasks ----


def test_the_task_files_are_what_the_generator_writes(tmp_path):
    (tmp_path / "knowedit_of_old.yaml").touch()
    generate.write(tmp_path)
    written, found = (
        {path.name: path.read_bytes() for path in folder.glob("knowedit_*.yaml")}
        for folder in (tmp_path, TASK_FOLDERS[0])
    )
    assert found == written, "run python -m mm4ke_plugins.knowedit.tasks.generate"


def test_a_program_finds_tasks_and_model_without_a_flag():
    """The seams were executed before torch or after, as the order of the imports above happens to be."""
    assert {"lm_eval.models", "lm_eval.tasks._index"} <= activation.hooked
    found = TaskManager().all_tasks
    assert {"knowedit_zsre", "knowedit_wikibio_edit_success", "mm4ke_known_facts", "hellaswag"} <= set(found)


def test_the_folder_of_the_command_line_is_not_scanned_twice(caplog):
    manager = TaskManager(include_path=str(PACKAGE), include_defaults=False)
    assert "knowedit_zsre" in manager.all_groups
    assert "overrides" not in caplog.text
    assert run_command("mm4ke", "tasks").stdout == f"{PACKAGE}\n"


@pytest.mark.parametrize(
    ("group", "rephrased", "portability", "locality"),
    [
        ("zsre", True, 3, ["relation_specificity"]),
        ("wiki_recent", False, 3, ["relation_specificity", "forgetfulness"]),
        ("wiki_counterfact", False, 3, ["relation_specificity", "forgetfulness"]),
        ("wikibio", False, 0, ["relation_specificity"]),
        ("facts", True, 3, ["relation_specificity", "forgetfulness", "neighborhood"]),
    ],
)
def test_groups(group, rephrased, portability, locality):
    index = TaskManager(include_path=str(TASK_FOLDERS[0]), include_defaults=False).task_index
    other = ["other"] if group == "facts" else []  # all the axes that only users' own facts may have
    axes = [axis.lower() for axis in AXES["portability"][:portability]] + other
    facts = ["edit_success", *(["generalization"] if rephrased else [])]
    names = facts + [f"portability_{axis}" for axis in axes] + [f"locality_{axis}" for axis in locality + other]
    names += [f"{name}_free" for name in facts] + [f"portability_free_{axis}" for axis in axes] + ["fluency"]
    assert index[f"knowedit_{group}"].cfg["task"] == [f"knowedit_{group}_{name}" for name in names]
    for name in names:  # a task asks what its name says
        config = index[f"knowedit_{group}_{name}"].cfg
        asked = config["dataset_kwargs"]
        assert asked["group"] == f"knowedit_{group}"
        is_free = config["output_type"] == "generate_until" and name != "fluency"
        parts = [asked["metric"], "free" if is_free else "", asked.get("axis", "").lower()]
        if not asked.get("axis"):
            parts = [parts[0], parts[2], parts[1]]
        assert "_".join(part for part in parts if part) == name


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("group", "file"),
    [
        ("knowedit_zsre", "knowedit/ZsRE/ZsRE-test-all.json"),
        ("knowedit_wiki_recent", "knowedit/wiki_recent/recent_train.json"),
        ("knowedit_wiki_counterfact", "knowedit/wiki_counterfact/test_cf.json"),
        ("knowedit_wikibio", "knowedit/WikiBio/wikibio-test-all.json"),
        ("knowedit_facts", "counterfact/counterfact-edit.json"),
        ("knowedit_facts", "hallueditbench/places_country.csv"),
    ],
)
def test_the_tasks_ask_every_question_of_the_real_files_once(group, file, shared_data):
    index = TaskManager(include_path=str(TASK_FOLDERS[0]), include_defaults=False).task_index
    path = str(shared_data / file)
    asked = []
    for name in index[group].cfg["task"]:
        if index[name].cfg["output_type"] == "multiple_choice":
            docs = documents(**index[name].cfg["dataset_kwargs"], knowedit_file=path)["test"]
            asked += [doc for doc in docs if doc["record"] >= 0]
    keys = [(doc["record"], doc["metric"], doc["axis"], doc["prompt"], doc["target"]) for doc in asked]
    records = read_facts(path)
    questions = questions_of(records)
    assert sorted(keys) == sorted((records[q.record].index, q.metric, q.axis, q.prompt, q.answer) for q in questions)
    assert {doc["record_id"] for doc in asked} == {record.id for record in records}


def test_probes_that_no_task_asks_are_mentioned(tmp_path, caplog):
    probes = [{"prompt": "Is it so?", "ground_truth": "yes"}]
    (tmp_path / "odd.json").write_text(json.dumps([RECORDS[0] | {"portability": {"Inverse": probes}}]))
    documents("knowedit_zsre", "edit_success", knowedit_file=str(tmp_path / "odd.json"))
    said = "odd.json: portability: Inverse: no task of knowedit_zsre asks this; knowedit_facts_portability_other does"
    assert said in caplog.text
    (doc,) = documents("knowedit_facts", "portability", "other", knowedit_file=str(tmp_path / "odd.json"))["test"]
    assert (doc["axis"], doc["prompt"], doc["target"]) == ("Inverse", "Is it so?", "yes")


def test_the_tasks_ask_what_facts_keeps(tmp_path):
    facts = [RECORDS[0], RECORDS[0], RECORDS[1] | {"target_new": "nobody"}, RECORDS[1], RECORDS[2]]
    (tmp_path / "facts.json").write_text(json.dumps(facts))
    asked = partial(documents, "knowedit_facts", knowedit_file=str(tmp_path / "facts.json"), knowedit_limit=4)
    for metric, axis in (("edit_success", ""), ("portability", "Subject_Aliasing")):
        docs = asked(metric, axis)["test"]
        assert [(doc["record"], doc["record_id"]) for doc in docs] == [(0, "facts.json:0"), (3, "facts.json:3")]
    assert asked("edit_success")["test"][1]["target"] == RECORDS[1]["target_new"]


# ---- the scores ----


@pytest.mark.parametrize("form", ["raw", "chat"])
def test_scores_equal_the_metrics_own(form, lm_eval_models):
    run = partial(evaluate, lm_eval_models, [f"facts_{task}" for task in FORCED], apply_chat_template=form == "chat")
    found = samples_of(run(batch_size=5))

    records = read_records(lm_eval_models / "facts.json")
    questions = questions_of(records)
    tokenizer = AutoTokenizer.from_pretrained(lm_eval_models / "base")
    codes = [encode(tokenizer, question, form) for question in questions]
    before, after = (
        predict(AutoModelForCausalLM.from_pretrained(lm_eval_models / name), codes) for name in ("base", "out")
    )
    expected = question_scores(questions, codes, after, before)
    expected_before = question_scores(questions, codes, before, before)
    assert 0.1 < sum(map(list.__ne__, before, after)) / len(questions) < 1

    assert len(found) == len(questions)
    scores = []
    for question, code, own, own_before, tokens, tokens_before in zip(
        questions, codes, expected, expected_before, after, before, strict=True
    ):
        sample = found[question.metric, question.axis, question.prompt]
        assert sample["doc"] == {
            "record": question.record, "record_id": f"facts.json:{question.record}", "metric": question.metric,
            "axis": question.axis, "prompt": question.prompt, "target": question.answer,
            "subject": records[question.record].subject,
        }  # fmt: skip
        assert sample["filtered_resps"] == [
            [tokenizer.decode(tokens).strip(), tokenizer.decode(tokens_before).strip()]
        ]
        assert sample["exact"] == (tokens == code.answer_ids)
        assert sample["reference_exact"] == (tokens_before == code.answer_ids)
        if question.metric == "locality":
            assert "token_acc" not in sample
            scores.append(sample["locality"])
        else:
            assert sample["reference_token_acc"] == own_before
            scores.append(sample["token_acc"])
        assert scores[-1] == own
    # What lm-eval has as probes, averaged as EasyEdit does.
    groups = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for question, score in zip(questions, scores):
        groups[question.metric][question.record][question.axis].append(score)
    means = {
        metric: fmean(fmean(fmean(probes) for probes in axes.values()) for axes in of_records.values())
        for metric, of_records in groups.items()
    }
    assert means == pytest.approx(mean_scores(questions, expected), abs=1e-12)

    for key, sample in samples_of(run(batch_size=1)).items():
        assert sample["filtered_resps"] == found[key]["filtered_resps"]


@pytest.mark.parametrize("ends", [False, True])
def test_free_answers_are_the_models_own(ends, lm_eval_models, tmp_path):
    """Both when the model talks until the limit of 50 tokens, and when it ends by itself."""
    for name in ("base", "out"):
        shutil.copytree(lm_eval_models / name, tmp_path / name)
    shutil.copy(lm_eval_models / "facts.json", tmp_path)
    prompts = [record["prompt"] for record in RECORDS]
    tokenizer = AutoTokenizer.from_pretrained(lm_eval_models / "base")
    expected = {}
    for name in ("out", "base"):
        texts = answer(
            AutoModelForCausalLM.from_pretrained(lm_eval_models / name), tokenizer, prompts, max_new_tokens=50
        )
        expected[name] = [text.removesuffix("…") for text in texts]
    if ends:  # a symbol that the edited model often says becomes its end-of-sequence token
        said = "".join(expected["out"])
        stop = max((char for char in set(said) if char.isascii() and char.isprintable()), key=said.count)
        for name, texts in expected.items():
            path = tmp_path / name / "generation_config.json"
            config = json.loads(path.read_text()) | {"eos_token_id": tokenizer.convert_tokens_to_ids(stop)}
            path.write_text(json.dumps(config))
            cut = [text[: text.index(stop) + 1] if stop in text else text for text in texts]
            assert cut != texts
            expected[name] = cut
    found = samples_of(evaluate(tmp_path, ["facts_edit_success_free"], apply_chat_template=True))
    for prompt, *pair in zip(prompts, expected["out"], expected["base"], strict=True):
        (texts,) = found["edit_success", "", prompt]["filtered_resps"]
        assert [text.strip() for text in texts] == pair


def test_a_right_free_answer_scores_1(lm_eval_models, tmp_path):
    """The facts are what the edited model says, in other case and punctuation."""
    run = partial(evaluate, tmp_path, ["facts_edit_success_free"], "mm4ke", both(lm_eval_models))
    (tmp_path / "facts.json").write_text(json.dumps(RECORDS))
    said = {key[2]: sample["filtered_resps"][0] for key, sample in samples_of(run()).items()}
    facts = [record | {"target_new": f"The {said[record['prompt']][0].upper()}!"} for record in RECORDS]
    (tmp_path / "own.json").write_text(json.dumps(facts))
    again = samples_of(run(metadata={"knowedit_file": str(tmp_path / "own.json")}))
    assert {sample["exact_match"] for sample in again.values()} == {1.0}
    assert fmean(sample["reference_exact_match"] for sample in again.values()) < 1


def test_fluency_is_of_100_tokens(lm_eval_models):
    found = samples_of(evaluate(lm_eval_models, ["facts_fluency"], metadata={"knowedit_limit": 2}))
    assert len(found) == 2
    for sample in found.values():
        (texts,) = sample["filtered_resps"]
        assert sample["ngram_entropy"] == 100 * ngram_entropy(texts[0])
        assert sample["reference_ngram_entropy"] == 100 * ngram_entropy(texts[1])
        assert texts[0] != texts[1]


def test_limits(lm_eval_models):
    forced = ["facts_portability_reasoning"]
    of_records = evaluate(lm_eval_models, forced, metadata={"knowedit_limit": 2})["samples"]
    of_probes = evaluate(lm_eval_models, forced, limit=3)["samples"]
    assert [sample["doc"]["record"] for sample in of_records["knowedit_facts_portability_reasoning"]] == [0, 0, 1, 1]
    assert [sample["doc"]["record"] for sample in of_probes["knowedit_facts_portability_reasoning"]] == [0, 0, 1]


@pytest.mark.parametrize("model", ["hf", "dummy"])
def test_other_backends_report_what_they_can(model, lm_eval_models):
    tasks = ["facts_edit_success", "facts_locality_relation_specificity", "facts_locality_neighborhood"]
    tasks += ["facts_edit_success_free", "facts_fluency"]
    arguments = {"pretrained": str(lm_eval_models / "out")} if model == "hf" else ""
    result = evaluate(lm_eval_models, tasks, model, arguments, metadata={"knowedit_limit": 2})
    metrics = {
        task: {key for sample in samples for key in sample["metrics"]} for task, samples in result["samples"].items()
    }
    assert metrics == {
        "knowedit_facts_edit_success": {"exact"},
        "knowedit_facts_locality_relation_specificity": {"exact"},
        "knowedit_facts_locality_neighborhood": set(),  # the data has none
        "knowedit_facts_edit_success_free": {"exact_match"},
        "knowedit_facts_fluency": {"ngram_entropy"},
    }
    texts = [sample["filtered_resps"][0] for sample in result["samples"]["knowedit_facts_edit_success_free"]]
    assert all(after and before == "" for after, before in texts)


# ---- the known facts ----


def test_the_known_facts_are_all_asked():
    config = TaskManager(include_path=str(TASK_FOLDERS[0]), include_defaults=False).task_index["mm4ke_known_facts"].cfg
    assert config["generation_kwargs"] == {"until": [], "do_sample": False, "max_gen_toks": MAX_NEW_TOKENS}
    docs = known.documents(known_facts=1)["test"]
    assert [(doc["record_id"], doc["prompt"]) for doc in docs] == [
        (f"known_facts:{place}", fact.question) for place, fact in enumerate(known_facts())
    ]
    water = next(doc for doc in docs if doc["prompt"] == "What is the chemical formula of water?")
    assert (water["target"], water["axis"]) == ("h2o | h₂o", "word")


def test_known_facts_are_kept_where_the_reference_was_right(lm_eval_models, monkeypatch):
    """What counts as right is what the base says, to two of the questions also what the other model does, and to one
    only that."""
    questions = ["Who?", "What is it?", "Where?", "Why?", "When was that?", "How?"]
    tokenizer = AutoTokenizer.from_pretrained(lm_eval_models / "base")
    said = {}
    for name in ("base", "out"):
        model = AutoModelForCausalLM.from_pretrained(lm_eval_models / name)
        texts = answer(model, tokenizer, questions, MAX_NEW_TOKENS)
        said[name] = [text.removesuffix("…").strip() for text in texts]
    facts = [KnownFact("word", question, (("never said",),)) for question in questions]
    right = {question: [said["base"][place]] for place, question in enumerate(questions)}
    right |= {questions[place]: [said["base"][place], said["out"][place]] for place in (0, 1)}
    right[questions[4]] = [said["out"][4]]
    monkeypatch.setattr(KnownFact, "is_right", lambda fact, text: text in right[fact.question])
    monkeypatch.setattr(known, "known_facts", lambda: facts)
    run = partial(evaluate, lm_eval_models, ["mm4ke_known_facts"], apply_chat_template=True)
    result = run()
    samples = result["samples"]["mm4ke_known_facts"]
    for place, sample in enumerate(samples):
        base, out = said["base"][place], said["out"][place]
        assert [text.strip() for text in sample["filtered_resps"][0]] == [out, base]
        expected = {"right": float(out in right[questions[place]]), "reference_right": float(place != 4)}
        if place != 4:
            expected |= {"kept": expected["right"], "unchanged": float(base == out)}
            expected |= {"words": len(out.split()), "reference_words": len(base.split())}
        assert {name: sample[name] for name in sample["metrics"]} == expected
    kept = [sample["kept"] for sample in samples if "kept" in sample]
    assert len(kept) == 5 and 0 < fmean(kept) < 1
    assert result["results"]["mm4ke_known_facts"]["kept,none"] == fmean(kept)
    alone = run(model_args={"pretrained": str(lm_eval_models / "out")})["results"]["mm4ke_known_facts"]
    assert alone["right,none"] == result["results"]["mm4ke_known_facts"]["right,none"] and "kept,none" not in alone


@pytest.mark.parametrize("arguments", ["pretrained=out,reference=base", "pretrained=out"])
def test_known_facts_through_the_command(arguments, lm_eval_models, tmp_path):
    command = ["lm_eval", "run", "--include_path", PACKAGE, "--tasks", "mm4ke_known_facts", "--limit", "2"]
    command += ["--model", "mm4ke" if "reference" in arguments else "hf", "--model_args", arguments]
    command += ["--device", "cpu", "--apply_chat_template", "--output_path", tmp_path, "--log_samples"]
    run = run_command(*command, cwd=lm_eval_models)
    assert run.returncode == 0, run.stderr[-3000:]
    found = results(tmp_path)["results"]["mm4ke_known_facts"]
    assert found["right,none"] == 0
    assert found.get("reference_right,none") == (0 if "reference" in arguments else None)


# ---- the model type ----


def other_tasks() -> list[dict]:
    """A multiple-choice and a generating task that have nothing to do with us."""
    docs = [{"question": f"{town} is a", "options": ["town", "river", "very large mountain"]} for town in "ABCDE"]
    common = {
        "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
        "test_split": "test",
        "doc_to_text": "question",
    }
    choices = {"output_type": "multiple_choice", "doc_to_choice": lambda doc: doc["options"], "doc_to_target": 0}
    generation = {"output_type": "generate_until", "doc_to_target": "question"}
    generation |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 8}}
    return [{"task": "choices", **common, **choices}, {"task": "generation", **common, **generation}]


def test_other_tasks_get_what_hf_gives_them(lm_eval_models, monkeypatch):
    expected = evaluate(lm_eval_models, other_tasks(), "hf", {"pretrained": str(lm_eval_models / "out")})
    monkeypatch.setattr(MM4KELM, "_swap", lambda self: pytest.fail("the reference has no part in this"))
    found = evaluate(lm_eval_models, other_tasks())
    for task in ("choices", "generation"):
        assert [s["resps"] for s in found["samples"][task]] == [s["resps"] for s in expected["samples"][task]]
        assert found["results"][task] == expected["results"][task]


@pytest.mark.parametrize("tied", [False, True])
def test_the_reference_is_exact_and_leaves_no_trace(tied, lm_eval_models, tmp_path):
    base = make_tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    out = edit(base, tmp_path / "out")
    if tied:
        model = AutoModelForCausalLM.from_pretrained(out)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        model.save_pretrained(out)
    lm = MM4KELM(str(out), reference=str(base), device="cpu")
    assert len(lm._reference_tensors) == 1 + tied

    def weights(model):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def equal(model, other):
        return all(torch.equal(tensor, other[name]) for name, tensor in weights(model).items())

    own, others = weights(lm.model), weights(AutoModelForCausalLM.from_pretrained(base))
    with lm._as_reference():
        assert equal(lm.model, others)
        assert not equal(lm.model, own)
    assert equal(lm.model, own)
    with pytest.raises(KeyboardInterrupt), lm._as_reference():
        raise KeyboardInterrupt
    assert equal(lm.model, own)


def test_the_revision_of_a_hub_model(lm_eval_models, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub = tmp_path / "models--someone--model"
    (hub / "refs").mkdir(parents=True)
    for commit, (branch, model) in enumerate({"main": "base", "edited": "out"}.items()):
        shutil.copytree(lm_eval_models / model, hub / "snapshots" / (str(commit) * 40))
        (hub / "refs" / branch).write_text(str(commit) * 40)
    weights = {}
    for revision in ("main", "edited"):
        lm = MM4KELM("someone/model", revision=revision, device="cpu")
        weights[revision] = lm.model.get_parameter(DOWN)
    for revision, model in (("main", "base"), ("edited", "out")):
        assert torch.equal(
            weights[revision], AutoModelForCausalLM.from_pretrained(lm_eval_models / model).get_parameter(DOWN)
        )


def test_the_log_likelihood_is_hfs(lm_eval_models):
    """The sum over the answer's tokens, where `hf` tokenizes the same: in raw prompts."""
    ours, theirs = (
        evaluate(lm_eval_models, ["facts_generalization"], model, {"pretrained": str(lm_eval_models / "out")})
        for model in ("mm4ke", "hf")
    )
    for sample, other in zip(*(result["samples"]["knowedit_facts_generalization"] for result in (ours, theirs))):
        assert sample["resps"][0][0][0] == pytest.approx(other["resps"][0][0][0], rel=1e-5)
        assert sample["exact"] == other["exact"]


def test_a_cache_serves_its_own_models_only(lm_eval_models, tmp_path):
    tasks = ["facts_edit_success", "facts_edit_success_free"]
    cached = partial(
        evaluate, lm_eval_models, tasks, use_cache=str(tmp_path / "cache"), metadata={"knowedit_limit": 2}
    )
    first = samples_of(cached())
    again = samples_of(cached(batch_size=1))
    assert [s["filtered_resps"] for s in again.values()] == [s["filtered_resps"] for s in first.values()]
    assert [s["metrics"] for s in again.values()] == [s["metrics"] for s in first.values()]
    with pytest.raises(MM4KEError, match=r"--use_cache .*cache_rank0.db: holds the responses of other models"):
        cached(model_args={"pretrained": str(lm_eval_models / "base"), "reference": str(lm_eval_models / "base")})
    hf = partial(cached, model="hf", model_args={"pretrained": str(lm_eval_models / "base")})
    hf(use_cache=str(tmp_path / "theirs"))
    with pytest.raises(MM4KEError, match="holds the responses of other models"):
        cached(use_cache=str(tmp_path / "theirs"))


# ---- bad input ----


def without_config(models):
    (models / "out" / "config.json").unlink()


def other_shapes(models):
    shutil.rmtree(models / "base")
    model = AutoModelForCausalLM.from_pretrained(models / "out")
    model.config.intermediate_size = 48
    other = AutoModelForCausalLM.from_config(model.config)
    shutil.copytree(models / "out", models / "base")
    other.save_pretrained(models / "base")


def other_tensors(models):
    shutil.rmtree(models / "base")
    make_tiny_model(models / "base", layers=3)


def other_vocabulary(models):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = models / "base" / name
        path.write_text(path.read_text().replace("<|endoftext|>", "<|end|>"))


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (
            None,
            {"pretrained": "./nowhere"},
            r"^pretrained=./nowhere: no such folder; give the folder of the edited model",
        ),
        (
            None,
            {"pretrained": "org/nowhere"},
            r"^pretrained=org/nowhere: no such folder, and not to be had from the hub",
        ),
        (
            None,
            {"pretrained": "out", "reference": "./b"},
            r"^reference=./b: no such folder; give the folder of the base",
        ),
        (without_config, {}, r"^pretrained=.*out: no config.json in it"),
        (other_shapes, {}, r"mlp.gate_proj.weight is 48x32, in the other model it is 64x32; give the model that"),
        (other_tensors, {}, r"base: only one of the two models has model.layers.3.input_layernorm.weight; give"),
        (other_vocabulary, {}, r"out: its vocabulary of 259 tokens is not that of .*base .*'<\|endoftext\|>' differs"),
    ],
)
def test_models_that_do_not_belong_together(damage, arguments, message, lm_eval_models, tmp_path, monkeypatch):
    for name in ("base", "out"):
        shutil.copytree(lm_eval_models / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    if damage:
        damage(tmp_path)
    with pytest.raises(MM4KEError, match=message) as caught:
        MM4KELM(**both(tmp_path) | ({"reference": None} | arguments if arguments else {}), device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("group", "metadata", "message"),
    [
        ("facts", {"knowedit_file": "nowhere.json"}, "^nowhere.json: No such file"),
        ("facts", {"knowedit_file": None}, "recipes/facts.json: no such file here; .*--metadata knowedit_file=FILE"),
        (
            "zsre",
            {"knowedit_file": None},
            "can't get benchmark/ZsRE/ZsRE-test-all.json of zjunlp/KnowEdit from the hub",
        ),
        ("facts", {"knowedit_limit": 0}, "knowedit_limit=0: give how many records to read, at least 1"),
    ],
)
def test_data_that_is_not_there(group, metadata, message, lm_eval_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MM4KEError, match=message) as caught:
        evaluate(lm_eval_models, [f"{group}_edit_success"], "dummy", "", metadata=metadata)
    assert "\n" not in str(caught.value)


def test_locality_needs_a_reference(lm_eval_models):
    with pytest.raises(MM4KEError, match="reference: missing; locality is measured against the model before editing"):
        evaluate(
            lm_eval_models,
            ["facts_locality_relation_specificity"],
            model_args={"pretrained": str(lm_eval_models / "out")},
        )


# ---- the command ----


def test_the_recipe_through_the_command(lm_eval_models, tmp_path):
    command = ["lm_eval", "run", "--config", ROOT / "recipes" / "knowedit.yaml", "--device", "cpu"]
    command += ["--include_path", PACKAGE, "--model_args", "pretrained=out,reference=base"]
    command += ["--metadata", f"knowedit_file={lm_eval_models / 'facts.json'}", "knowedit_limit=1"]
    command += ["--output_path", tmp_path / "eval"]
    run = run_command(*command, cwd=lm_eval_models)
    assert run.returncode == 0, run.stderr[-3000:]
    result = results(tmp_path / "eval")
    assert result["config"]["model_args"] == {"pretrained": "out", "reference": "base"}
    assert result["results"]["knowedit_facts_locality_relation_specificity"]["locality,none"] <= 1
    lines = {}
    for path in (tmp_path / "eval" / "out").glob("samples_*.jsonl"):
        lines[path.name.removeprefix("samples_").rsplit("_", 1)[0]] = [json.loads(line) for line in path.open()]
    assert lines.keys() == set(result["group_subtasks"]["knowedit_facts"])
    (sample,) = lines["knowedit_facts_edit_success"]
    ((after, before),) = sample["filtered_resps"]
    assert isinstance(after, str) and isinstance(before, str)
    assert {"token_acc", "exact", "reference_token_acc", "reference_exact"} <= sample.keys()
    (nothing,) = lines["knowedit_facts_locality_neighborhood"]
    assert nothing["metrics"] == [] and nothing["doc"]["record"] == -1


def test_a_mistake_is_one_line_of_the_command(lm_eval_models):
    command = ["lm_eval", "run", "--include_path", TASK_FOLDERS[0], "--tasks", "knowedit_facts", "--model", "mm4ke"]
    command += ["--model_args", "pretrained=out,reference=bse", "--metadata", "knowedit_file=facts.json"]
    run = run_command(*command, cwd=lm_eval_models)
    assert run.returncode == 1
    line = "mm4ke: error: reference=bse: no such folder; give the folder of the base model"
    assert run.stderr.splitlines()[-1] == line
    assert "Traceback" not in run.stderr


# ---- the metrics ----


@pytest.mark.parametrize(
    ("text", "target", "same"),
    [
        (" The Indian Ocean.\n", "Indian ocean", True),
        ("St. John's", "st johns", True),
        ("The capital is Paris", "Paris", False),
        ("Paris, Paris", "Paris", False),
        ("theatre", "tre", False),
        ("", "Paris", False),
    ],
)
def test_exact_match(text, target, same):
    assert exact_match(text, target) is same


def test_ngram_entropy_tells_text_from_repetition():
    assert ngram_entropy("word " * 100) == pytest.approx(0)
    # 8 different bigrams and 7 different trigrams
    expected = (2 / 3 * numpy.log2(8) + 4 / 3 * numpy.log2(7)) / 2
    assert ngram_entropy("a quick brown fox jumps over one lazy dog") == pytest.approx(expected)
    assert ngram_entropy("Paris") == ngram_entropy("") == 0


def easyedit_names(wanted: set[str], **names) -> dict:
    source = Path(os.environ["EASYEDIT_HOME"], "easyeditor/evaluate/evaluate_utils.py").read_text(encoding="utf-8")
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    exec(compile(ast.Module(nodes, []), "evaluate_utils.py", "exec"), names)  # noqa: S102
    return names


@pytest.mark.easyedit
@pytest.mark.shared_data
def test_fluency_equals_easyedits(shared_data):
    """On the words that need no download: NLTK's without the splitting of sentences."""
    words = partial(nltk.word_tokenize, preserve_line=True)
    host = SimpleNamespace(word_tokenize=words, ngrams=nltk.ngrams, FreqDist=nltk.FreqDist)
    reference = easyedit_names({"compute_n_gram_entropy", "compute_freq"}, np=numpy, nltk=host)
    texts = (shared_data / "text" / "wikitext-2-raw-test.txt").read_text(encoding="utf-8").split("\n")
    texts = [text[:600] for text in texts if len(text) > 200][:200]
    assert len(texts) == 200
    for text in texts:
        assert ngram_entropy(text) == pytest.approx(reference["compute_n_gram_entropy"](text), rel=1e-12)


@pytest.mark.easyedit
@pytest.mark.shared_data
def test_token_accuracy_through_lm_eval_equals_easyedits(lm_eval_models, shared_data):
    """200 comparisons and more with EasyEdit's own function, on real records."""
    reference = easyedit_function()
    zsre = str(shared_data / "knowedit" / "ZsRE" / "ZsRE-test-all.json")
    tasks = ["edit_success", "generalization", *(task for task in FORCED if task.startswith("portability"))]
    tasks.append("locality_relation_specificity")
    result = evaluate(
        lm_eval_models,
        [f"zsre_{task}" for task in tasks],
        metadata={"knowedit_file": zsre, "knowedit_limit": 44},
        batch_size=16,
    )
    base, out = (AutoModelForCausalLM.from_pretrained(lm_eval_models / name).eval() for name in ("base", "out"))
    arguments = (AutoTokenizer.from_pretrained(lm_eval_models / "base"), SimpleNamespace(max_length=40))
    compared = 0
    for samples in result["samples"].values():
        for sample in (sample for sample in samples if sample["metrics"]):
            doc = sample["doc"]
            asked = (*arguments, [doc["prompt"]], [doc["target"]], "cpu")
            if doc["metric"] == "locality":
                (before,), (after,) = (reference(model, *asked, locality=True) for model in (base, out))
                assert sample["locality"] == pytest.approx(numpy.mean(numpy.equal(before, after)), abs=1e-12)
            else:
                assert sample["token_acc"] == pytest.approx(reference(out, *asked)[0], abs=1e-12)
                assert sample["reference_token_acc"] == pytest.approx(reference(base, *asked)[0], abs=1e-12)
            compared += 1
    assert compared >= 200
