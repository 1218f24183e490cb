"""`mm4ke report` on real runs of lm-eval with tiny models, on copies of them that were damaged, and on the page."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from statistics import fmean

import pytest
import torch
from conftest import run_command
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model

from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.report.page import contents, markdown, plain, report, shortened
from mm4ke_plugins.report.runs import CHAT, RAW, Task, read_columns
from mm4ke_plugins.report.statistics import Value, compare, mcnemar, record_values
from mm4ke_plugins.report.summary import Row, cell, check_same_data, difference, flips, rows_of, warnings_of

HOSTILE = "<script>document.title = 1</script> | **bold** [link](http://example.org) `code`\u202e"
TOWNS = ("Arnholt", "Brevik", "Casterly", "Dunmorrow")
FACTS = [
    {
        "prompt": f"Who founded {town}?",
        "target_new": HOSTILE if town == "Brevik" else town[::-1],
        "subject": town,
        "rephrase_prompt": f"{town} was founded by",
        "portability": {
            "Reasoning": [{"prompt": f"{town}'s founder spoke", "ground_truth": "Norse"}],
            "Subject_Aliasing": [
                {"prompt": f"The old {town} {place}", "ground_truth": "lay there"} for place in ("hill", "mill")
            ],
        },
        "locality": {"Forgetfulness": [{"prompt": f"{town} lies in", "ground_truth": "Norway"}]},
    }
    for town in TOWNS
]
FORCED = [
    f"knowedit_facts_{name}"
    for name in ("edit_success", "portability_reasoning", "portability_subject_aliasing", "locality_forgetfulness")
]
GENERAL = ["toy_choice", "toy_pool", "mm4ke_squadv2"]

TASK_CODE = """
import datasets

def questions(count, word, **_):
    letters = "kvqzjxwpyfbm"  # no two questions have the same options: each model finds another one likelier
    docs = [
        {"question": f"{word} {n}?", "options": [letters[n % 12] * 3, letters[(5 * n + 3) % 12] * 3], "answer": n % 2}
        for n in range(1, count + 1)
    ]
    return {"test": datasets.Dataset.from_list(docs)}

def many(**_):
    return questions(12, "Which is it,")

def few(**_):
    return questions(3, "What of")

def others(**_):
    return questions(5, "And of")

def score(doc, results):
    kind = "HasAns" if doc["answer"] else "NoAns"
    return {"exact": 50.0, f"{kind}_exact": 100.0 * doc["answer"], f"{kind}_f1": 50.0}
"""
CHOICE = """
task: {name}
custom_dataset: !function toy.{data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: options
doc_to_target: answer
num_fewshot: 0
metric_list: [{{metric: acc}}, {{metric: acc_norm, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
SQUAD = """
task: mm4ke_squadv2
custom_dataset: !function toy.few
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
process_results: !function toy.score
num_fewshot: 0
generation_kwargs: {max_gen_toks: 4, until: ["."]}
metric_list:
  - {metric: exact, aggregation: mean, higher_is_better: true}
  - {metric: HasAns_exact, aggregation: mean, higher_is_better: true}
  - {metric: HasAns_f1, aggregation: mean, higher_is_better: true}
  - {metric: NoAns_exact, aggregation: mean, higher_is_better: true}
  - {metric: NoAns_f1, aggregation: mean, higher_is_better: true}
metadata: {version: 3.0}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders that lm-eval wrote: base, rsft, merged (both with base as reference), and chat (of base)."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    home = tmp_path_factory.mktemp("runs")
    (home / "facts.json").write_text(json.dumps(FACTS))
    tasks = home / "tasks"
    tasks.mkdir()
    (tasks / "toy.py").write_text(TASK_CODE)
    (tasks / "mm4ke_squadv2.yaml").write_text(SQUAD)
    for name, data in (("toy_choice", "many"), ("toy_pool_a", "few"), ("toy_pool_b", "others")):
        (tasks / f"{name}.yaml").write_text(CHOICE.format(name=name, data=data))
    (tasks / "toy_pool.yaml").write_text("group: toy_pool\ntask: [toy_pool_a, toy_pool_b]\n")

    base = make_tiny_model(home / "models" / "base", layers=2)
    torch.manual_seed(1)
    changes = {name: torch.randn_like(tensor) for name, tensor in load_file(base / "model.safetensors").items()}
    for name, weight in (("rsft", 0.6), ("merged", 0.4)):
        shutil.copytree(base, home / "models" / name)
        tensors = load_file(base / "model.safetensors")
        for key in tensors:
            if "layers.1.mlp" in key:
                tensors[key] += weight * changes[key]
        save_file(tensors, home / "models" / name / "model.safetensors", {"format": "pt"})

    manager = TaskManager(include_path=str(tasks), metadata={"knowedit_file": str(home / "facts.json")})

    def run(folder, kind, model_args, tasks, **options):
        # What `lm_eval run` does with its arguments; the program's own start takes longer than all of this.
        tracker = EvaluationTracker(output_path=str(home / folder))
        results = simple_evaluate(
            model=kind, model_args=model_args, tasks=tasks, task_manager=manager, evaluation_tracker=tracker,
            bootstrap_iters=0, batch_size=8, device="cpu", **options,
        )  # fmt: skip
        samples = results.pop("samples")
        tracker.save_results_aggregated(results=results, samples=samples)
        for name in results["configs"]:
            tracker.save_results_samples(task_name=name, samples=samples[name])

    models = {name: str(home / "models" / name) for name in ("base", "rsft", "merged")}
    run("base", "hf", {"pretrained": models["base"]}, GENERAL)
    run("chat", "hf", {"pretrained": models["base"]}, ["toy_choice"], apply_chat_template=True, limit=6)
    for name in ("rsft", "merged"):
        arguments = {"pretrained": models[name], "reference": models["base"]}
        run(name, "mm4ke", arguments, FORCED + GENERAL)
    run("free", "mm4ke", arguments, ["knowedit_facts_edit_success_free", "knowedit_facts_fluency"])
    run("known", "mm4ke", arguments, ["mm4ke_known_facts"], limit=12)
    return home


def named(runs, *names):
    return [f"{name}={runs / name}" for name in names]


@pytest.fixture(scope="module")
def columns(runs):
    return read_columns(named(runs, "rsft", "base", "merged"))


@pytest.fixture
def copy(runs, tmp_path):
    """Copies a run folder and returns the copy."""

    def copy_run(name, target=None):
        return Path(shutil.copytree(runs / name, tmp_path / (target or name)))

    return copy_run


def only(folder, pattern):
    (path,) = folder.rglob(pattern)
    return path


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_lines(path, change):
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    for number, sample in enumerate(samples):
        change(number, sample)
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def easyedit_result(method, **changes):
    """A result as `mm4ke easyedit` writes it, of FACTS."""
    questions = [
        {
            "record": place,
            "record_id": f"facts.json:{place}",
            "metric": metric,
            "axis": axis,
            "prompt": fact["prompt"] if metric == "edit_success" else fact["locality"]["Forgetfulness"][0]["prompt"],
            "answer": fact["target_new"] if metric == "edit_success" else "Norway",
            "before": "no",
            "after": "yes",
            "score_before": 0.0 if metric == "edit_success" else None,
            "score_after": 0.25 * place,
        }
        for place, fact in enumerate(FACTS)
        for metric, axis in (("edit_success", ""), ("locality", "Forgetfulness"))
    ]
    result = {
        "kind": "mm4ke-easyedit", "version": 1, "method": method, "status": "ok", "error": None, "model": "m/base",
        "data": "facts.json", "data_sha256": "0", "records": 4, "hparams": {}, "editing": "batch", "seconds": 1.5,
        "versions": {"torch": "2"}, "scores": {}, "questions": questions,
    }  # fmt: skip
    return result | changes


def write_easyedit(folder, *results):
    folder.mkdir(parents=True)
    for result in results:
        (folder / f"{result['method']}.json").write_text(json.dumps(result))
    return folder


# ---- statistics ----


def values(*scores, axis=""):
    return [Value(str(number), axis, score) for number, score in enumerate(scores)]


def test_a_record_is_the_mean_of_its_axes_means():
    probes = [Value("a", "x", 1.0), Value("a", "x", 0.0), Value("a", "y", 1.0), Value("b", "x", 0.25)]
    assert record_values(probes) == {"a": 0.75, "b": 0.25}


def test_interval_of_paired_differences_by_hand():
    change = compare(values(0.1, 0.2, 0.6), values(0.4, 0.2, 1.0))
    # Differences .3, 0, .4: mean .2333, standard deviation .2082, t(.975, 2) = 4.3027 from any printed table.
    error = math.sqrt(sum((x - 0.7 / 3) ** 2 for x in (0.3, 0.0, 0.4)) / 2 / 3)
    assert change.mean == pytest.approx(0.7 / 3)
    assert (change.low, change.high) == pytest.approx((0.7 / 3 - 4.30265 * error, 0.7 / 3 + 4.30265 * error), abs=1e-5)
    assert change.detectable == pytest.approx((4.30265 + 0.84162) * error, abs=1e-5)
    assert (change.better, change.worse, change.p) == (2, 0, None)


def test_questions_of_a_record_count_once():
    before = [Value("a", "", 0.0)] * 50 + [Value("b", "", 1.0)]
    after = [Value("a", "", 1.0)] * 50 + [Value("b", "", 1.0)]
    change = compare(before, after)
    assert (change.records, change.questions, change.mean) == (2, 51, 0.5)
    assert not change.is_clear


@pytest.mark.parametrize("better, worse", [(0, 0), (1, 0), (5, 1), (2, 9), (7, 7)])
def test_mcnemar_is_the_exact_binomial_test(better, worse):
    count, fewer = better + worse, min(better, worse)
    by_hand = min(1.0, 2 * sum(math.comb(count, k) for k in range(fewer + 1)) / 2**count)
    assert mcnemar(better, worse) == pytest.approx(by_hand)


def test_a_clear_interval_needs_mcnemar_as_well():
    change = compare(values(*[0.0] * 50), values(*[1.0] * 5, *[0.0] * 45))
    assert change.low > 0 and change.p == pytest.approx(2 / 32)
    assert not change.is_clear
    assert compare(values(*[0.0] * 50), values(*[1.0] * 6, *[0.0] * 44)).is_clear


def test_a_loss_is_as_clear_as_a_gain():
    change = compare(values(*[1.0] * 50), values(*[0.0] * 6, *[1.0] * 44))
    assert change.high < 0 and (change.better, change.worse, change.p) == (0, 6, pytest.approx(2 / 64))
    assert change.is_clear


def test_an_interval_ends_where_scores_from_0_to_1_do():
    # Differences .1 and .9: mean .5, error .4, t(.975, 1) = 12.7062 from any printed table.
    change = compare(values(0.0, 0.0), values(0.1, 0.9))
    assert (change.low, change.high, change.detectable) == (-1.0, 1.0, None)
    change = compare(values(600.0, 500.0), values(610.0, 590.0))
    assert (change.low, change.high) == pytest.approx((50 - 12.7062 * 40, 50 + 12.7062 * 40), abs=0.01)
    assert change.detectable == pytest.approx((12.7062 + 0.84162) * 40, abs=0.01)


def test_mcnemar_is_for_answers_that_are_right_or_wrong_in_both():
    half, whole = values(0.5, 1.0, 0.0), values(1.0, 1.0, 0.0)
    assert compare(half, whole).p is None and compare(whole, half).p is None
    assert compare(whole, whole).p == 1.0


def test_equal_answers_have_no_interval():
    change = compare(values(*[1.0] * 50), values(*[1.0] * 50))
    assert (change.low, change.detectable, change.p, change.is_clear) == (None, None, 1.0, False)
    assert change.hidden == pytest.approx(1 - 0.05 ** (1 / 50))
    assert not compare(values(0.0), values(1.0)).is_clear  # one record
    assert not compare(values(0.5), values(0.7)).is_clear
    assert not compare(values(0.5, 0.5), values(0.5, 0.5)).is_clear
    assert compare(values(*[0.0] * 9), values(*[1.0] * 9)).is_clear


# ---- from run folders to rows ----


def test_the_base_comes_first_and_has_its_own_and_the_references_answers(columns):
    assert [column.name for column in columns] == ["base", "rsft", "merged"]
    base = columns[0]
    assert len(base.items[Task("", RAW, "toy_choice")]) == 12
    assert len(base.items[Task("facts.json", RAW, "edit_success")]) == 4


def test_scores_are_lm_evals(runs, columns):
    merged = columns[2]
    results = json.loads(only(runs / "merged", "results_*.json").read_text())["results"]
    row = Row(Task("", RAW, "toy_choice"), "acc")
    assert cell(row, merged, None).value == pytest.approx(results["toy_choice"]["acc,none"])
    row = Row(Task("facts.json", RAW, "edit_success"), "token_acc")
    assert cell(row, merged, None).value == pytest.approx(results["knowedit_facts_edit_success"]["token_acc,none"])
    assert cell(row, columns[0], None).value == pytest.approx(
        results["knowedit_facts_edit_success"]["reference_token_acc,none"]
    )
    row = Row(Task("facts.json", RAW, "locality"), "locality")
    assert cell(row, columns[0], None).value == 1
    assert cell(row, merged, None).value == pytest.approx(
        results["knowedit_facts_locality_forgetfulness"]["locality,none"]
    )


def test_axes_are_pooled_as_easyedit_does(runs, columns):
    by_record = {}
    for axis in ("reasoning", "subject_aliasing"):
        found = {}
        for sample in lines_of(only(runs / "merged", f"samples_knowedit_facts_portability_{axis}_*.jsonl")):
            found.setdefault(sample["doc"]["record_id"], []).append(sample["token_acc"])
        for record, scores in found.items():
            by_record.setdefault(record, []).append(fmean(scores))
    row = Row(Task("facts.json", RAW, "portability"), "token_acc")
    shown = cell(row, columns[2], columns[0])
    assert shown.value == pytest.approx(fmean(map(fmean, by_record.values())))
    assert (shown.records, shown.questions, shown.difference.records) == (4, 12, 4)
    assert [row.axis for row in rows_of(columns) if row.axis] == ["Reasoning", "Subject_Aliasing", "Forgetfulness"]


def test_a_benchmark_of_several_subjects_is_one_row_weighted_by_question(runs, columns):
    results = json.loads(only(runs / "merged", "results_*.json").read_text())["results"]
    row = Row(Task("", RAW, "toy_pool"), "acc")
    expected = (3 * results["toy_pool_a"]["acc,none"] + 5 * results["toy_pool_b"]["acc,none"]) / 8
    assert cell(row, columns[2], None).value == pytest.approx(expected)
    assert cell(row, columns[2], None).records == 8


def test_squads_kinds_of_questions_are_apart_and_not_in_percent(columns):
    answerable = cell(Row(Task("", RAW, "mm4ke_squadv2 HasAns"), "exact"), columns[2], None)
    unanswerable = cell(Row(Task("", RAW, "mm4ke_squadv2 NoAns"), "exact"), columns[2], None)
    assert (answerable.value, answerable.records) == (1.0, 2)
    assert (unanswerable.value, unanswerable.records) == (0.0, 1)
    assert not any(row.task.name == "mm4ke_squadv2" for row in rows_of(columns))


def test_rows_have_their_main_measure_first(columns):
    main = [(row.task.name, row.measure) for row in rows_of(columns) if row.is_main]
    assert main == [
        ("edit_success", "token_acc"),
        ("portability", "token_acc"),
        ("locality", "locality"),
        ("mm4ke_squadv2 HasAns", "f1"),
        ("mm4ke_squadv2 NoAns", "f1"),
        ("toy_choice", "acc"),
        ("toy_pool", "acc"),
    ]


def test_free_answers_and_fluency_have_rows_of_their_own(runs):
    columns = read_columns(named(runs, "free"))
    assert [column.name for column in columns] == ["base", "free"]
    rows = rows_of(columns)
    assert [(row.task.name, row.measure) for row in rows] == [
        ("fluency", "ngram_entropy"),
        ("edit_success_free", "exact_match"),
    ]
    assert all(difference(row, *columns).records == 4 for row in rows)


@pytest.fixture
def known(copy):
    """A run whose reference was right but for the last question, and whose model for one of two questions."""

    def judge(number, sample):
        scores = {"right": float(number % 2), "reference_right": float(number < 11)}
        if number < 11:
            scores |= {"kept": scores["right"], "unchanged": float(number == 1), "words": 4.0, "reference_words": 8.0}
        sample |= scores | {"metrics": list(scores)}

    folder = copy("known")
    edit_lines(only(folder, "samples_mm4ke_known_facts_*.jsonl"), judge)
    return folder


def test_known_facts_are_kept_or_lost(known, tmp_path):
    columns = read_columns([f"merged={known}"])
    assert [column.name for column in columns] == ["base", "merged"]
    task = Task("known_facts", RAW, "known_facts")
    rows = [row for row in rows_of(columns) if row.axis is None]
    assert [(row.task, row.measure) for row in rows] == [
        (task, measure) for measure in ("kept", "unchanged", "right", "words")
    ]
    of_base, of_merged = ([cell(row, column, columns[0]) for row in rows] for column in columns)
    assert [found.value for found in of_base] == [1, 1, 11 / 12, 8]
    assert [found.value for found in of_merged] == pytest.approx([5 / 11, 1 / 11, 1 / 2, 4])
    change = difference(rows[0], *columns)
    assert (change.records, change.better, change.worse, change.is_clear) == (11, 0, 6, True)
    (entry,) = flips(rows, *columns)
    assert (entry.questions, len(entry.lost), len(entry.gained)) == (12, 6, 1)

    _, text = report([f"merged={known}"], tmp_path / "report")[0]
    text = text.read_text()
    said = "Of 11 everyday questions that base answers right, 45 % are right still (−0.545, 95 % interval"
    assert "**Does it know what it knew?**" in text and said in text
    assert "| **known facts** | 1.000 | 0.455 ▼ | 11 | of the base's right answers |" in text


def test_known_facts_without_a_reference(known, tmp_path):
    def forget(number, sample):
        sample |= {"metrics": ["right"], "right": float(number > 2)}

    base = shutil.copytree(known, tmp_path / "alone")
    for folder in (base, known):
        edit_json(only(folder, "results_*.json"), lambda value: value["config"]["model_args"].pop("reference"))
    edit_lines(only(base, "samples_mm4ke_known_facts_*.jsonl"), forget)
    edit_lines(
        only(known, "samples_mm4ke_known_facts_*.jsonl"), lambda number, sample: sample.update(metrics=["right"])
    )
    columns = read_columns([f"base={base}", f"merged={known}"])
    assert [row.measure for row in rows_of(columns) if row.is_main] == ["right"]
    (answer,) = [answer for answer in contents(columns)["answers"] if answer.question == "Does it know what it knew?"]
    assert answer.sentence.startswith("Of 12 everyday questions it answers 50\u00a0% right, base 75\u00a0% (")


def test_flips_are_the_samples_that_changed(runs, columns):
    row = Row(Task("", RAW, "toy_choice"), "acc", is_main=True)
    old, new = (lines_of(only(runs / name, "samples_toy_choice_*.jsonl")) for name in ("base", "merged"))
    lost = [one["doc"]["question"] for one, other in zip(old, new) if one["acc"] > other["acc"]]
    gained = [one["doc"]["question"] for one, other in zip(old, new) if one["acc"] < other["acc"]]
    assert lost and gained  # otherwise this shows nothing: take other seeds
    (entry,) = flips([row], columns[0], columns[2])
    assert [flip.item.prompt for flip in entry.lost] == lost
    assert [flip.item.prompt for flip in entry.gained] == gained
    assert entry.gained[0].after == entry.gained[0].item.target != entry.gained[0].before
    change = difference(row, columns[0], columns[2])
    assert (change.better, change.worse) == (len(gained), len(lost))
    assert change.p == pytest.approx(mcnemar(len(gained), len(lost)))


def test_locality_shows_changed_answers(runs, columns):
    row = Row(Task("facts.json", RAW, "locality"), "locality", is_main=True)
    samples = lines_of(only(runs / "merged", "samples_knowedit_facts_locality_*.jsonl"))
    changed = [sample for sample in samples if sample["locality"] < 1]
    assert changed
    (entry,) = flips([row], columns[0], columns[2])
    assert [[flip.after, flip.before] for flip in entry.changed] == [s["filtered_resps"][0] for s in changed]


def test_a_later_results_file_replaces_an_earlier_one(copy):
    folder = copy("base")
    results = only(folder, "results_*.json")
    date = results.stem.removeprefix("results_")
    for path in list(folder.rglob(f"*{date}*")):
        if "toy_choice" in path.name or path == results:
            shutil.copy(path, path.with_name(path.name.replace(date, "2999-01-01T00-00-00.000001")))
    newer = only(folder, "results_2999*.json")
    edit_json(newer, lambda value: value.update(configs={"toy_choice": value["configs"]["toy_choice"]}))
    edit_lines(only(folder, "samples_toy_choice_2999*.jsonl"), lambda number, sample: sample.update(acc=1.0))
    (column,) = read_columns([str(folder)])
    assert cell(Row(Task("", RAW, "toy_choice"), "acc"), column, None).value == 1
    assert cell(Row(Task("", RAW, "toy_pool"), "acc"), column, None).records == 8
    assert column.notes == [f"toy_choice (raw prompts) was run again: {newer.name} replaces {results.name}"]


def test_tasks_that_lm_eval_scores_as_a_whole_show_their_total(copy):
    folder = copy("base")
    edit_lines(
        only(folder, "samples_toy_choice_*.jsonl"), lambda number, sample: sample.update(acc=[1, 0], acc_norm=[1, 0])
    )
    (column,) = read_columns([str(folder)])
    results = json.loads(only(folder, "results_*.json").read_text())["results"]
    shown = cell(Row(Task("", RAW, "toy_choice"), "acc"), column, None)
    assert (shown.value, shown.records) == (results["toy_choice"]["acc,none"], 0)
    assert "only the totals" in column.notes[0]


# ---- EasyEdit ----


def test_easyedit_gives_a_column_a_method_and_the_base(tmp_path):
    folder = write_easyedit(
        tmp_path / "easyedit",
        easyedit_result("ROME"),
        easyedit_result("MM4KE"),
        easyedit_result("WISE", status="failed", error="CUDA | out of memory", questions=[]),
    )
    files, warnings = report([str(folder)], tmp_path / "out")
    text = files[1].read_text()
    assert "| **edit success** | 0.000 | 0.375 | 0.375 | failed | 4 | token accuracy |" in text
    assert "| **locality** | 1.000 | 0.375 ▼ | 0.375 ▼ | failed | 4 | unchanged predictions |" in text
    assert "WISE failed: CUDA \\| out of memory" in text
    assert "### ROME → MM4KE" in text
    assert warnings == []


def test_a_name_goes_before_the_methods(tmp_path):
    folder = write_easyedit(tmp_path / "easyedit", easyedit_result("ROME"), easyedit_result("FT"))
    assert [column.name for column in read_columns([f"x={folder}"])] == ["base", "x FT", "x ROME"]
    (folder / "FT.json").unlink()
    assert [column.name for column in read_columns([f"x={folder}"])] == ["base", "x"]


def test_easyedit_and_lm_eval_share_questions_where_the_prompts_are_equal(runs, tmp_path):
    model = str(runs / "models" / "base")
    folder = write_easyedit(tmp_path / "ee", easyedit_result("ROME", model=model))
    _, rome, merged = read_columns([str(folder), *named(runs, "merged")])
    row = Row(Task("facts.json", RAW, "edit_success"), "token_acc")
    assert difference(row, rome, merged).records == 4
    (folder / "ROME.json").write_text(json.dumps(easyedit_result("ROME", model=model, prompt_format="chat")))
    columns = read_columns([str(folder), *named(runs, "merged")])
    assert difference(row, columns[1], columns[2]) is None
    assert any("chat template and raw prompts: not comparable" in line for line in warnings_of(columns))


# ---- warnings ----


def warned(runs, folder):
    return warnings_of(read_columns([*named(runs, "base"), f"merged={folder}"]))


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda value: value["versions"].update(toy_choice=2.0), "task version 1.0 and 2.0: toy_choice"),
        (lambda value: value["n-shot"].update(toy_choice=5), "num_fewshot 0 and 5: toy_choice"),
        (lambda value: value["config"].update(limit=50.0), "limit None and 50.0: mm4ke_squadv2, toy_choice, toy_pool_a"),
        (lambda value: value["config"].update(model_dtype="torch.half"), "precision float32 and half: mm4ke_squadv2, toy_"),
        (lambda value: value.update(lm_eval_version="0.5.0"), "lm_eval version 0.4.13 and 0.5.0: mm4ke_squadv2"),
    ],
)  # fmt: skip
def test_settings_that_differ(runs, copy, change, expected):
    folder = copy("merged")
    assert warned(runs, folder) == []
    edit_json(only(folder, "results_*.json"), change)
    assert any(f"base and merged: {expected}" in line for line in warned(runs, folder))


def test_other_prompts_are_left_out(runs, copy):
    folder = copy("merged")
    path = only(folder, "samples_toy_choice_*.jsonl")
    edit_lines(path, lambda number, sample: number < 2 and sample.update(prompt_hash="0"))
    columns = read_columns([*named(runs, "base"), f"merged={folder}"])
    assert difference(Row(Task("", RAW, "toy_choice"), "acc"), *columns).records == 10
    assert warnings_of(columns) == [
        "base and merged: other prompts for the same questions, which are left out: toy_choice (2 of 12)"
    ]


def test_another_chat_template_and_fewer_questions(runs, copy):
    columns = read_columns(named(runs, "base", "chat"))
    assert any("raw prompts and chat template: not comparable" in line for line in warnings_of(columns))
    assert {row.task.prompts for row in rows_of(columns) if row.task.name == "toy_choice"} == {RAW, CHAT}
    folder = copy("chat")
    edit_json(only(folder, "results_*.json"), lambda value: value.update(chat_template_sha="f" * 64))
    columns = read_columns([*named(runs, "chat"), f"other={folder}"])
    assert any(re.search("chat template [0-9a-f]{12} and f{12}: toy_choice", line) for line in warnings_of(columns))
    edit_json(only(folder, "results_*.json"), lambda value: value.update(chat_template_sha=None))
    columns = read_columns([*named(runs, "base"), f"other={folder}"])
    assert any("number of questions 12 and 6: toy_choice" in line for line in warnings_of(columns))


def test_warnings_are_in_both_outputs_and_on_stderr(runs, copy, tmp_path):
    folder = copy("merged")
    edit_json(only(folder, "results_*.json"), lambda value: value["versions"].update(toy_choice=2.0))
    output = tmp_path / "deep" / "r"
    done = run_command("mm4ke", "report", *named(runs, "base"), f"merged={folder}", "--output", output)
    assert done.returncode == 0, done.stderr
    line = "base and merged: task version 1.0 and 2.0: toy_choice"
    assert f"warning: {line}" in done.stderr
    files = [output / name for name in ("report.html", "report.md")]
    assert done.stdout.split() == list(map(str, files))
    assert line in files[0].read_text() and line.replace("_", "\\_") in files[1].read_text()
    assert sorted(files[0].parent.iterdir()) == files  # nothing else is left


# ---- bad input ----


def refused(*arguments):
    with pytest.raises(MM4KEError) as caught:
        check_same_data(read_columns(list(map(str, arguments))))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_folders_without_results(tmp_path):
    assert f"{tmp_path / 'none'}: no such folder" in refused(tmp_path / "none")
    assert "the folder is empty" in refused(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    assert "no results_*.json and no METHOD.json" in refused(tmp_path)
    (tmp_path / "other.json").write_text('{"kind": "other"}')
    assert "other.json: not a result of lm_eval or of mm4ke easyedit" in refused(tmp_path)
    assert "=x: not a run; give FOLDER or NAME=FOLDER" in refused("=x")


def test_truncated_results(copy):
    path = only(copy("base"), "results_*.json")
    path.write_text(path.read_text()[:500])
    assert re.search(r"results_.*\.json: line \d+: not JSON; the file was cut short", refused(path.parent))
    path.write_text("{}")
    assert "no results in it" in refused(path.parent)
    path.write_bytes(b'"\xff"')
    assert "not UTF-8" in refused(path.parent)


def test_truncated_samples(copy):
    path = only(copy("base"), "samples_toy_choice_*.jsonl")
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    assert re.search(r"samples_toy_choice_.*: line \d+: not JSON; the file was cut short", refused(path.parent))
    path.write_text("".join(text.splitlines(keepends=True)[:7]))
    assert "7 of 12 questions; the file was cut short" in refused(path.parent)
    path.write_text('{"doc_id": 0}\n')
    assert "line 1: not a sample as lm_eval logs it (KeyError('doc'))" in refused(path.parent)


def test_samples_that_were_not_logged(copy):
    path = only(copy("base"), "samples_toy_choice_*.jsonl")
    path.unlink()
    assert "toy_choice: its samples were not logged; run lm_eval again with --log_samples" in refused(path.parent)


def test_names_and_folders_that_are_taken_twice(runs, copy):
    assert "two columns are called x; give them names: NAME=FOLDER" in refused(
        f"x={runs / 'rsft'}", f"x={runs / 'merged'}"
    )
    both = copy("rsft", "both")
    shutil.copytree(runs / "merged", both / "merged")
    assert "results of two models" in refused(both)


def test_runs_of_different_data(runs, copy):
    folder = copy("merged")
    path = only(folder, "samples_toy_choice_*.jsonl")
    edit_lines(path, lambda number, sample: sample.update(doc_hash=str(number)))
    message = refused(*named(runs, "base"), f"merged={folder}")
    assert "runs of different data: toy_choice" in message and str(folder) in message


def test_damaged_easyedit_results(tmp_path):
    folder = write_easyedit(tmp_path / "easyedit", easyedit_result("ROME", questions=[{"record_id": "x:0"}]))
    assert "ROME.json: not as mm4ke easyedit writes it (KeyError(" in refused(folder)
    (folder / "ROME.json").write_text('{"kind": ')
    assert "ROME.json: line 1: not JSON" in refused(folder)
    (folder / "ROME.json").write_text(json.dumps(easyedit_result("ROME", version=2)))
    assert "mm4ke easyedit (version 1)" in refused(folder)


def test_bad_input_is_one_line_and_writes_nothing(tmp_path):
    done = run_command("mm4ke", "report", tmp_path / "none", "--output", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith("mm4ke: error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---- the page ----


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    """The report of all three models, one of whose answers is hostile."""
    home = tmp_path_factory.mktemp("report")
    merged = Path(shutil.copytree(runs / "merged", home / "merged"))
    answer = HOSTILE + "\nsecond line\x00\ud800"
    edit_lines(
        only(merged, "samples_knowedit_facts_locality_*.jsonl"),
        lambda number, sample: sample.update(filtered_resps=[[answer, "before"]]),
    )
    files, _ = report([*named(runs, "base", "rsft"), f"merged={merged}", *named(runs, "free")], home / "out")
    return files


def test_untrusted_text_stays_text(written):
    page, text = (path.read_text() for path in written)
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "javascript" not in page and not re.search(r'(src|href)="(?!#)', page)
    rows = [line for line in text.splitlines() if "document.title" in line]
    assert rows
    for row in rows:
        assert "<script" not in row and "**bold" not in row and "[link]" not in row
        assert len(re.findall(r"(?<!\\)\|", row)) == 6  # five cells


def test_markdown_of_any_text():
    assert markdown("a|b\n<b> *x* `y` [z](u) \\") == "a\\|b &lt;b&gt; \\*x\\* \\`y\\` \\[z\\](u) \\\\"
    assert plain("a\x00\ud800\r\nb") == "a\ufffd?\nb"
    assert shortened("word " * 100, 20) == "word word word word …"
    assert shortened("word " * 100, 10, keep_end=True) == "… word word"


def test_the_report_answers_the_questions_in_sentences(written):
    text = written[1].read_text()
    for question in ("Did it learn the facts?", "What about its surroundings?", "Is it as able as before?"):
        assert f"**{question}**" in text
    assert re.search(r"Edit success (rose|fell|went) from 0\.\d{3} to 0\.\d{3} \(", text)
    assert re.search(r"And against rsft", text)
    assert "## What was run" in text and "lm\\_eval: 0.4.13" in text


def test_one_model_alone_has_scores_and_nothing_to_compare(runs, tmp_path):
    files, _ = report(named(runs, "chat"), tmp_path)
    assert "nothing to compare" in files[0].read_text()
    assert re.search(r"\| \*\*toy\\_choice\*\* \| [01]\.\d{3} \| 6 \| accuracy \|", files[1].read_text())
    assert contents(read_columns(named(runs, "chat")))["pairs"] == []


# ---- in a real browser ----

# Counts the texts of a figure that overlap, and how far the page reaches beyond the window.
MEASURE = """
<script>
let overlaps = 0, outside = 0
for (const svg of document.querySelectorAll("svg")) {
  const boxes = [...svg.querySelectorAll("text")].map(text => text.getBoundingClientRect())
  const frame = svg.getBoundingClientRect()
  outside += boxes.filter(box => box.left < frame.left || box.right > frame.right || box.top < frame.top).length
  for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
    const [a, b] = [boxes[i], boxes[j]]
    if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3) overlaps++
  }
}
const beyond = document.documentElement.scrollWidth - document.documentElement.clientWidth
const count = document.querySelectorAll("svg text").length
document.title = `overlaps ${overlaps}, outside ${outside}, beyond ${beyond}, texts ${count}`
</script>
"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Loads a page in headless Chromium; returns the DOM that it made and what it logged."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here: install chromium to check the rendered page")

    def load(page, width=1280):
        done = subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                "--enable-logging=stderr", f"--user-data-dir={tmp_path_factory.mktemp('browser')}",
                f"--window-size={width},2000", "--dump-dom", page.as_uri(),
            ],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return load


def test_the_page_renders_without_errors_or_requests(written, browse):
    dom, console = browse(written[0])
    assert console == []
    assert "<title>merged against base</title>" in dom
    assert len(re.findall("<svg", dom)) == 2 and 'id="scores"' in dom
    assert not re.search(r"<(script|link|img|iframe|object|embed)\b", dom)
    assert not re.search(r"url\((?!#|&quot;#)", dom)
    for text in (
        "Did it learn the facts?",
        "Differences on the same questions",
        "Answers that changed",
        "rsft → merged",
    ):
        assert text in dom


@pytest.mark.parametrize("width", [1280, 500])
def test_nothing_overlaps_or_is_cut_off(written, browse, tmp_path, width):
    page = tmp_path / "measured.html"
    source = re.sub(r"<meta http-equiv=.*?>", "", written[0].read_text())  # it would keep our own script out
    page.write_text(source.replace("</body>", f"{MEASURE}</body>"))
    title = re.search("<title>(.*?)</title>", browse(page, width)[0]).group(1)
    found = re.fullmatch(r"overlaps 0, outside 0, beyond 0, texts (\d+)", title)
    assert found and int(found.group(1)) > 20, title
