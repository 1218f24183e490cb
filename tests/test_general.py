"""`mm4ke prepare-data`, the tasks `mm4ke_squadv2` and `mm4ke_logiqa`, and lm-eval on prepared data."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, run_command
from tiny import make_tiny_model

from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.general.logiqa import load, parse_blocks
from mm4ke_plugins.general.prepare import OWN_TASKS, find_files, read_sources, write_benchmarks
from mm4ke_plugins.general.sources import read_source

SPAN = {"span1_index": 0, "span1_text": "Ann", "span2_index": 3, "span2_text": "she"}
BLOCK = "\nb\nAll cats purr.Tom is a cat.\nWhat follows?\nA.Nothing\nB.Tom purrs\nC.Tom barks\nD.All purr\n"
RECORDS = {
    "coqa-dev.jsonl": {
        "id": "1",
        "source": "own",
        "story": "Ann has a hat.",
        "turns": [{"question": "Who?", "answers": ["Ann", "she"]}, {"question": "What?", "answers": ["a hat"]}],
    },
    "drop_dev.jsonl": {"query_id": "1", "passage": "2 and 3 cats.", "question": "How many?", "answers": [["5"]]},
    "mmlu-test.jsonl": {
        "question_id": 1,
        "question": "1 + 1?",
        "options": ["1", "2", "3"],
        "answer": "B",
        "answer_index": 1,
        "category": "computer science",
    },
    "BoolQ/val.jsonl": {"question": "is it", "passage": "It is.", "idx": 0, "label": True},
    "CB/val.jsonl": {"premise": "It is.", "hypothesis": "It is not.", "idx": 0, "label": "contradiction"},
    "COPA/val.jsonl": {"premise": "Rain.", "choice1": "Wet.", "choice2": "Dry.", "question": "effect", "label": 0},
    "MultiRC/val.jsonl": {
        "passage": {
            "text": "Ann has a hat.",
            "questions": [{"question": "Who?", "answers": [{"text": "Ann", "label": 1}, {"text": "Bo", "label": 0}]}],
        }
    },
    "RTE/val.jsonl": {"premise": "It is.", "hypothesis": "It was.", "idx": 0, "label": "not_entailment"},
    "WSC/val.jsonl": {"text": "Ann sang because she could.", "target": SPAN, "idx": 0, "label": False},
    "WiC/val.jsonl": {
        "word": "hat",
        "sentence1": "a hat",
        "sentence2": "hats",
        "start1": 2,
        "end1": 5,
        "start2": 0,
        "end2": 4,
        "label": True,
    },
}


def squad(*questions: dict) -> dict:
    paragraphs = [{"context": "Ann has a red hat.", "qas": list(questions)}]
    return {"version": "v2.0", "data": [{"title": "Ann", "paragraphs": paragraphs}]}


ANSWERABLE = {"id": "a", "question": "Who?", "answers": [{"text": "Ann", "answer_start": 0}], "is_impossible": False}
UNANSWERABLE = {"id": "b", "question": "When?", "answers": [], "is_impossible": True, "plausible_answers": []}


def write_files(folder: Path) -> Path:
    """One small file of every benchmark."""
    for name, record in RECORDS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(record) + "\n")
    (folder / "dev-v2.0.json").write_text(json.dumps(squad(ANSWERABLE, UNANSWERABLE)))
    (folder / "Test.txt").write_text(BLOCK * 2)
    for split in ("dev", "val"):
        rows = "".join(f"{n},1 + {n}?,1,2,3,4,{'ABC'[n]}\n" for n in range(3))
        (folder / f"law_{split}.csv").write_text("id,question,A,B,C,D,answer\n" + rows)
    return folder


def records_of(path: Path) -> list[dict]:
    return read_source(path).records


# ---- real data


@pytest.mark.shared_data
def test_every_real_raw_file_becomes_what_lm_eval_expects(shared_data, tmp_path):
    done = run_command("mm4ke", "prepare-data", shared_data, "--output", tmp_path / "general")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if re.search(r" \d+ +\d+$", line)]
    rows = {tuple(line[:-2]): line[-2:] for line in lines}
    assert rows == {
        ("ceval", "dev"): ["52", "260"],
        ("ceval", "val"): ["52", "1346"],
        ("coqa", "validation"): ["1", "500"],
        ("drop", "validation"): ["1", "1000"],
        ("logiqa", "validation"): ["1", "651"],
        ("logiqa", "test"): ["1", "651"],
        ("mmlu_pro", "test"): ["1", "2000"],
        ("squadv2", "validation"): ["1", "6078"],
        ("super_glue", "boolq", "validation"): ["1", "3270"],
        ("super_glue", "cb", "validation"): ["1", "56"],
        ("super_glue", "copa", "validation"): ["1", "100"],
        ("super_glue", "multirc", "validation"): ["1", "4848"],
        ("super_glue", "rte", "validation"): ["1", "277"],
        ("super_glue", "wsc.fixed", "validation"): ["1", "104"],
        ("super_glue", "wic", "validation"): ["1", "638"],
    }
    left_out = [line for line in done.stdout.splitlines() if line.startswith("left out")]
    assert any("ZsRE-test-all.json" in line for line in left_out)
    assert any("wikitext-2-raw-test.txt" in line for line in left_out)


@pytest.mark.shared_data
def test_gold_answers_of_real_data_by_lm_evals_own_functions(shared_data):
    from lm_eval.tasks.coqa.utils import doc_to_target
    from lm_eval.tasks.drop.utils import get_answers
    from lm_eval.tasks.super_glue.wsc.preprocess_wsc import default_doc_to_text

    lines = (shared_data / "drop/drop_val1000_docs.jsonl").read_text().splitlines()
    for raw, doc in zip(map(json.loads, lines), records_of(shared_data / "drop/drop_val1000_docs.jsonl"), strict=True):
        assert get_answers(doc) == [tuple(answer) for answer in raw["answers"]]

    lines = (shared_data / "coqa/coqa_dev_grouped.jsonl").read_text().splitlines()
    for raw, doc in zip(map(json.loads, lines), records_of(shared_data / "coqa/coqa_dev_grouped.jsonl"), strict=True):
        final = raw["turns"][-1]
        found = doc_to_target(doc)
        assert found[0] == final["answers"][0] and len(doc["questions"]["input_text"]) == len(raw["turns"])
        assert {answer.lower() for answer in found} == {answer.lower() for answer in final["answers"]}

    squad2 = records_of(shared_data / "squad2/dev-v2.0.cs224n-half.json")
    assert sum(not doc["answers"]["text"] for doc in squad2) == 3168
    for doc in squad2:
        for text, start in zip(doc["answers"]["text"], doc["answers"]["answer_start"], strict=True):
            assert doc["context"][start : start + len(text)] == text

    wsc = records_of(shared_data / "superglue/WSC-val.jsonl")
    assert all(doc["span1_text"] in doc["text"] and doc["span2_text"] in doc["text"] for doc in wsc)
    assert all(f"*{doc['span2_text']}*" in default_doc_to_text(doc) for doc in wsc)
    rte = records_of(shared_data / "superglue/RTE-val.jsonl")
    assert Counter(doc["label"] for doc in rte) == {0: 146, 1: 131}  # entailment, not_entailment


def test_lm_eval_runs_all_tasks_from_the_recipe(tmp_path):
    write_files(tmp_path / "raw")
    done = run_command("mm4ke", "prepare-data", "raw", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    make_tiny_model(tmp_path / "out")
    tasks = "ceval-valid,coqa,drop,mm4ke_squadv2,mm4ke_logiqa,mmlu_pro,super-glue-lm-eval-v1"
    assert tasks in done.stdout
    done = run_command(
        "lm_eval", "run", "--config", ROOT / "recipes/general-offline.yaml", "--tasks", tasks, "--limit", "2",
        "--model_args", "pretrained=out,max_length=4096", "--device", "cpu",
        cwd=tmp_path, HF_DATASETS_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.glob("work/eval/merged/out/results_*.json")
    found = json.loads(file.read_text())
    counts = {task: size["effective"] for task, size in found["n-samples"].items()}
    single = {"coqa": 1, "drop": 1, "mmlu_pro_computer_science": 1, "boolq": 1, "cb": 1, "copa": 1, "sglue_rte": 1}
    ours = {"mm4ke_squadv2": 2, "mm4ke_logiqa": 2}
    assert counts == single | {"wic": 1, "wsc": 1, "multirc": 2, "ceval-valid_law": 2, **ours}
    assert found["groups"].keys() == {"ceval-valid", "mmlu_pro"}
    assert found["n-shot"]["mmlu_pro_computer_science"] == 0
    scores = found["results"]["mm4ke_squadv2"]
    assert {"HasAns_exact,none", "HasAns_f1,none", "NoAns_exact,none", "NoAns_f1,none"} <= scores.keys()
    assert scores["exact,none"] == pytest.approx((scores["HasAns_exact,none"] + scores["NoAns_exact,none"]) / 2)
    (samples,) = tmp_path.glob("work/eval/merged/out/samples_mm4ke_squadv2_*.jsonl")
    logged = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [("HasAns_f1" in sample, "NoAns_f1" in sample) for sample in logged] == [(True, False), (False, True)]


# ---- mm4ke_squadv2 and mm4ke_logiqa


def test_squad_scores_are_the_official_ones():
    """Worked out by hand from evaluate-v2.0.py."""
    from mm4ke_plugins.general.squadv2 import SQuAD2

    task = SQuAD2.__new__(SQuAD2)
    questions = [  # gold answers, prediction, log probability of "unanswerable", exact, f1
        (["the red hat", "red hat"], " The red hat!", -3.0, 100, 100),
        (["red hat"], " a big red hat", -2.0, 0, 80),  # precision 2/3, recall 1
        (["blue"], "", -0.1, 0, 0),
        (["blue", "the"], " red", -0.2, 0, 0),  # "the" is no answer: it is empty when normalized
        ([], "", -0.5, 100, 100),
        ([], " unanswerable", -0.05, 0, 0),
        ([], " The.", -4.0, 100, 100),  # empty when normalized
    ]
    items = {}
    for golds, prediction, logprob, exact, f1 in questions:
        doc = {"answers": {"text": golds}}
        for name, value in task.process_results(doc, [prediction, (logprob, False)]).items():
            items.setdefault(name, []).append(value)
        assert (items["exact"][-1], items["f1"][-1]) == (exact, pytest.approx(f1))
    scores = {name: task.aggregation()[name](values) for name, values in items.items()}
    assert scores == {
        "exact": pytest.approx(300 / 7),
        "f1": pytest.approx(380 / 7),
        "HasAns_exact": pytest.approx(100 / 4),
        "HasAns_f1": pytest.approx(180 / 4),
        "NoAns_exact": pytest.approx(200 / 3),
        "NoAns_f1": pytest.approx(200 / 3),
        # By rising probability: start 3 right (all unanswered); " The." -1 -> 2; "The red hat!" +1 -> 3;
        # "a big red hat" +0 (f1 +.8) -> 3 (3.8); "" of the unanswerable 0; the others add nothing.
        "best_exact": pytest.approx(300 / 7),
        "best_f1": pytest.approx(380 / 7),
    }


def test_package_tasks_load_without_the_hubs_script(tmp_path):
    from lm_eval.tasks import TaskManager

    for name in ("Train.txt", "Eval.txt", "Test.txt"):
        (tmp_path / name).write_text(BLOCK)
    tasks = TaskManager(include_path=OWN_TASKS, metadata={"logiqa_folder": str(tmp_path)})
    task = tasks.load(["mm4ke_logiqa"])["tasks"]["mm4ke_logiqa"]
    (doc,) = task.eval_docs
    assert task.doc_to_text(doc) == (
        "Passage: All cats purr. Tom is a cat.\nQuestion: What follows?\nChoices:\n"
        "A. Nothing\nB. Tom purrs\nC. Tom barks\nD. All purr\nAnswer:"
    )
    assert task.doc_to_choice(doc)[task.doc_to_target(doc)] == "Tom purrs"
    assert tasks.task_index["mm4ke_squadv2"].yaml_path.is_relative_to(OWN_TASKS)


def test_logiqa_without_its_files_says_what_to_do(tmp_path):
    with pytest.raises(MM4KEError, match="Train.txt.*prepare-data"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(MM4KEError, match="Test.txt: line 10: block: cut off"):
        parse_blocks(BLOCK + "\na\nA context.\n", "Test.txt")


# ---- layouts


def test_official_layouts_give_the_same_records(tmp_path):
    turns = RECORDS["coqa-dev.jsonl"]["turns"]
    story = {key: RECORDS["coqa-dev.jsonl"][key] for key in ("id", "source", "story")}
    official = story | {
        "questions": [{"input_text": turn["question"], "turn_id": n} for n, turn in enumerate(turns, 1)],
        "answers": [{"input_text": turn["answers"][0], "turn_id": n} for n, turn in enumerate(turns, 1)],
        "additional_answers": {"0": [{"input_text": "she"}, {"input_text": "a hat"}]},
    }
    (tmp_path / "coqa-dev-v1.0.json").write_text(json.dumps({"version": "1.0", "data": [official]}))
    (tmp_path / "coqa.jsonl").write_text(json.dumps(RECORDS["coqa-dev.jsonl"]))
    assert records_of(tmp_path / "coqa-dev-v1.0.json") == records_of(tmp_path / "coqa.jsonl")

    from lm_eval.tasks.drop.utils import get_answers

    number = {"number": "5", "date": {"day": "", "month": "", "year": ""}, "spans": []}
    date = {"number": "", "date": {"day": "3", "month": "May", "year": "1931"}, "spans": []}
    pair = {"query_id": "1", "question": "?", "answer": number, "validated_answers": [date, number]}
    (tmp_path / "drop_dataset_dev.json").write_text(json.dumps({"p": {"passage": "text", "qa_pairs": [pair]}}))
    assert get_answers(records_of(tmp_path / "drop_dataset_dev.json")[0]) == [("5",), ("3 May 1931",)]


def test_mmlu_pro_with_its_validation_split_keeps_five_shots(tmp_path):
    import pyarrow
    import pyarrow.parquet

    record = RECORDS["mmlu-test.jsonl"]
    (tmp_path / "mmlu-test.jsonl").write_text(json.dumps(record))
    shots = pyarrow.Table.from_pylist([record | {"cot_content": "A: Let's think step by step. 2"}] * 5)
    pyarrow.parquet.write_table(shots, tmp_path / "validation-00000-of-00001.parquet")
    tables, _ = read_sources(find_files([tmp_path], tmp_path / "out"))
    write_benchmarks(tables, tmp_path / "out")
    task = (tmp_path / "out/mmlu_pro/mmlu_pro.yaml").read_text()
    assert "num_fewshot" not in task and "fewshot_split" not in task and "mmlu_pro_computer_science" in task


def test_a_span_is_written_as_in_the_text(tmp_path):
    target = SPAN | {"span1_text": "The hat.", "span1_index": 2}
    record = RECORDS["WSC/val.jsonl"] | {"text": "Ann took the hat off because she could", "target": target}
    (tmp_path / "WSC.jsonl").write_text(json.dumps(record))
    assert records_of(tmp_path / "WSC.jsonl")[0]["span1_text"] == "the hat"


# ---- bad input


def changed(name: str, **changes) -> str:
    return json.dumps({key: value for key, value in (RECORDS[name] | changes).items() if value is not None})


CEVAL = "id,question,A,B,C,D,answer\n"
BAD_FILES = [
    ("law_val.csv", CEVAL + "0,1?,1,2,3,4,E\n", "law_val.csv: line 2: answer: 'E'; give a letter from A to D"),
    ("law_val.csv", CEVAL + "0,1?,1,2\n", "law_val.csv: line 2: C: None; give it as a string"),
    ("law_val.csv", "id,question,A,B,C,D\n0,1?,1,2,3,4\n", "line 2: answer: missing; give a letter"),
    ("law_val.csv", CEVAL, "law_val.csv: no records"),
    ("law.csv", CEVAL + "0,1?,1,2,3,4,A\n", "name it SUBJECT_dev.csv or SUBJECT_val.csv"),
    ("law_val.csv", "", "law_val.csv: empty; give the whole file"),
    (
        "dev.json",
        json.dumps(squad(ANSWERABLE))[:-20],
        r"dev.json: line 1, column \d+: not JSON .*; is the file complete",
    ),
    ("dev.json", json.dumps(squad(UNANSWERABLE | {"is_impossible": False})), r"dev.json: question b: answers: \[\]"),
    (
        "dev.json",
        json.dumps(squad(ANSWERABLE | {"question": 3})),
        "dev.json: question a: question: 3; give it as a str",
    ),
    ("coqa.jsonl", changed("coqa-dev.jsonl", turns=[{"question": "?"}]), "line 1: turn 1: answers: missing"),
    ("coqa.jsonl", changed("coqa-dev.jsonl", turns=[{"question": "?", "answers": []}]), "turn 1: answers: empty"),
    ("drop.jsonl", changed("drop_dev.jsonl", answers=None), "drop.jsonl: line 1: answers: missing; give a list"),
    ("drop.jsonl", changed("drop_dev.jsonl", answers=["5"]), "drop.jsonl: line 1: answers: '5'; give it as a list"),
    ("drop.jsonl", changed("drop_dev.jsonl") + "\n{", "drop.jsonl: line 2, column 2: not JSON"),
    ("drop.jsonl", changed("drop_dev.jsonl") + "\n3", "drop.jsonl: line 2: '3' is not a record"),
    ("mmlu.jsonl", changed("mmlu-test.jsonl", answer="D"), "line 1: answer: 'D'; give a letter from A to C"),
    ("mmlu.jsonl", changed("mmlu-test.jsonl", answer_index=2), "line 1: answer_index: 2 does not mean B; give 1"),
    ("boolq.jsonl", changed("BoolQ/val.jsonl", label="maybe"), "label: 'maybe'; give one of false, true"),
    ("CB.jsonl", changed("CB/val.jsonl", label="not_entailment"), "give one of entailment, contradiction, neutral"),
    ("nli.jsonl", changed("CB/val.jsonl", label="entailment"), "CB or RTE: neither name nor labels tell"),
    ("COPA.jsonl", changed("COPA/val.jsonl", question="why"), "question: 'why'; give cause or effect"),
    ("COPA.jsonl", changed("COPA/val.jsonl", label=2), "label: 2; give one of 0, 1"),
    (
        "MultiRC.jsonl",
        changed("MultiRC/val.jsonl", passage={"text": "", "questions": []}),
        r"questions: \[\]; give it as",
    ),
    (
        "WSC.jsonl",
        changed("WSC/val.jsonl", target=SPAN | {"span1_index": 9}),
        "span1_index: 9; give the number of a word",
    ),
    ("WiC.jsonl", changed("WiC/val.jsonl", end1="5"), "WiC.jsonl: line 1: end1: '5'; give it as a whole number"),
    ("ReCoRD.jsonl", json.dumps({"passage": {"text": "", "entities": []}, "qas": []}), "ReCoRD.*not prepared here"),
    ("WiC-test.jsonl", changed("WiC/val.jsonl", label=None), "test: lm-eval does not use this split"),
    ("Test.txt", BLOCK.replace("\nb\n", "\ne\n"), "Test.txt: line 2: answer: 'e' is not a letter"),
    ("facts.json", json.dumps([{"prompt": "1", "target_new": "2"}]), "no benchmark's raw file that is known here"),
    ("notes.md", "text", "not a raw benchmark file; those end in .csv"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_damaged_file_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(MM4KEError, match=message) as caught:
        read_sources(find_files([tmp_path / name], tmp_path / "out"))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path / name))


def test_bad_bytes_are_one_line(tmp_path):
    (tmp_path / "Test.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(MM4KEError, match="Test.txt: byte 0: not UTF-8"):
        read_source(tmp_path / "Test.txt")
    with pytest.raises(MM4KEError, match="t.parquet: not parquet"):
        read_source(tmp_path / "t.parquet")


def test_parts_that_collide_are_missing_or_unknown(tmp_path):
    folder = write_files(tmp_path / "raw")
    (folder / "dev-copy.json").write_text(json.dumps(squad(ANSWERABLE)))
    with pytest.raises(MM4KEError, match="dev-v2.0.json: squadv2 validation: .*dev-copy.json holds that too"):
        read_sources(find_files([folder], tmp_path / "out"))
    (folder / "dev-copy.json").unlink()
    (folder / "law_val.csv").unlink()
    with pytest.raises(MM4KEError, match="law_dev.csv: ceval law dev: lm-eval scores val; give that file too"):
        read_sources(find_files([folder], tmp_path / "out"))
    (folder / "lore_val.csv").write_text(CEVAL + "0,1?,1,2,3,4,A\n")
    (folder / "law_dev.csv").unlink()
    tables, _ = read_sources(find_files([folder], tmp_path / "out"))
    with pytest.raises(
        MM4KEError, match="lore_val.csv: lore: no part of lm-eval's ceval-valid; its parts are account"
    ):
        write_benchmarks(tables, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(MM4KEError, match="nowhere: does not exist"):
        find_files([tmp_path / "nowhere"], tmp_path)


def test_running_again_replaces_and_a_mistake_leaves_the_old(tmp_path):
    folder, output = write_files(tmp_path / "raw"), tmp_path / "raw/work"
    first = run_command("mm4ke", "prepare-data", folder, "--output", output)
    assert first.returncode == 0, first.stderr
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    (folder / "drop_dev.jsonl").write_text(changed("drop_dev.jsonl", question=None))
    failed = run_command("mm4ke", "prepare-data", folder, "--output", output)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].endswith("drop_dev.jsonl: line 1: question: missing; give it as a string")
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    (folder / "drop_dev.jsonl").write_text(changed("drop_dev.jsonl") + "\n" + changed("drop_dev.jsonl", query_id="2"))
    again = run_command("mm4ke", "prepare-data", folder / "drop_dev.jsonl", "--output", output)
    assert again.returncode == 0 and re.search(r"drop +validation +1 +2\n", again.stdout)
    assert (output / "coqa/coqa.yaml").exists() and not list(output.glob(".*"))


def test_a_folder_without_benchmarks_is_one_line(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/facts.json").write_text('[{"prompt": "1"}]')
    done = run_command("mm4ke", "prepare-data", tmp_path / "raw", "--output", tmp_path / "out")
    assert done.returncode == 1 and done.stdout.startswith("left out") and "raw/facts.json" in done.stdout
    assert done.stderr.splitlines()[-1].endswith("raw: no raw benchmark file in there; see `mm4ke prepare-data -h`")
    assert not (tmp_path / "out").exists()
