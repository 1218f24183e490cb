"""`mm4ke study`: many edits side by side, on a tiny model by the hosts' own commands; what is refused; the numbers."""

import json
import os
import re

import pytest
import yaml
from conftest import ROOT, run_command
from knowedit_helpers import RECORDS

from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.knowedit.metrics import questions_of
from mm4ke_plugins.knowedit.records import read_records
from mm4ke_plugins.study.plan import read_study
from mm4ke_plugins.study.run import Row
from mm4ke_plugins.study.steps import run, with_models
from mm4ke_plugins.study.table import differences, fronts_of, lines_of, measures

RSFT = {
    "stage": "sft", "do_train": True, "finetuning_type": "freeze", "rsft": True, "rsft_layers": 1, "cutoff_len": 256,
    "model_name_or_path": "of-somebody/else", "dataset": "other", "template": "qwen", "output_dir": "elsewhere",
    "per_device_train_batch_size": 1, "learning_rate": 1e-2, "num_train_epochs": 2, "disable_shuffling": True,
    "dataloader_pin_memory": False, "save_strategy": "no", "report_to": "none",
}  # fmt: skip
MERGE = {
    "merge_method": "linear",
    "base_model": "./base",
    "models": [
        {"model": "./base", "parameters": {"weight": 0.5}},
        {"model": "./rsft", "parameters": {"weight": 0.5}},
    ],
    "dtype": "float32",
}
LORA = {key: value for key, value in RSFT.items() if not key.startswith("rsft")} | {"finetuning_type": "lora"}


@pytest.fixture(scope="module")
def home(tmp_path_factory, lm_eval_models):
    """A folder with a study of every kind of method."""
    home = tmp_path_factory.mktemp("study")
    for name, recipe in (("rsft", RSFT), ("merge", MERGE), ("lora", LORA)):
        (home / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    (home / "copy.sh").write_text('cp -rL "$MODEL" "$OUTPUT"; grep -c target_new "$FACTS"\n')
    study = {
        "model": str(lm_eval_models / "base"),
        "template": "smollm2",
        "facts": {"ours": {"file": str(lm_eval_models / "facts.json"), "limit": 2}},
        "seeds": [7],
        "against": "R-SFT",
        "methods": {
            "told": {"in_context": True},
            "R-SFT": {"train": "rsft.yaml"},
            "merged": {"train": "rsft.yaml", "merge": "merge.yaml"},
            "epochs": {"train": "rsft.yaml", "vary": {"num_train_epochs": [1]}},
            "LoRA": {"train": "lora.yaml"},
            "copied": {"run": "bash copy.sh"},
            "<b>broken</b>": {"run": "false"},
        },
    }
    (home / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return home


def study(home, *options, **env):
    return run_command("mm4ke", "study", "study.yaml", *options, cwd=home, **env)


@pytest.fixture(scope="module")
def studied(home):
    finished = study(home)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished


def rows_of(home):
    rows = json.loads((home / "work" / "studies" / "study" / "study.json").read_text())
    return {(row["method"], row["seed"]): row for row in rows}


def test_every_row_is_made_by_commands_that_are_shown(studied, home):
    shown = [line.removeprefix("$ ").split("   > ")[0] for line in studied.stdout.splitlines() if line[:2] == "$ "]
    rows = rows_of(home)
    assert len(rows) == 8, rows.keys()
    assert [name for (name, _), row in rows.items() if row["error"]] == ["<b>broken</b>"]
    for (name, seed), row in rows.items():
        assert name in ("base", "told", "<b>broken</b>") or set(row["cost"]["commands"]) <= set(shown), name
    # The two rows that need it share one training.
    assert rows["merged", 7]["cost"]["commands"][0] == rows["R-SFT", 7]["cost"]["commands"][0]
    assert sum("llamafactory-cli train rsft.yaml" in line for line in shown) == 2
    assert "num_train_epochs=1" in rows["epochs 1", 7]["cost"]["commands"][0]
    assert rows["LoRA", 7]["cost"]["commands"][1].startswith("llamafactory-cli export ")
    assert 0 < rows["copied", 7]["cost"]["peak"] < 200e6 < rows["R-SFT", 7]["cost"]["peak"]


def test_the_scores_are_those_of_the_edited_models(studied, home):
    rows = rows_of(home)
    base = rows["base", 7]["scores"]
    assert rows["copied", 7]["scores"] == base
    for form in ("raw", "chat"):
        assert rows["R-SFT", 7]["scores"]["scores"][form] != base["scores"][form]
    different = ("R-SFT", "merged", "epochs 1", "LoRA", "told")
    assert len({json.dumps(rows[name, 7]["scores"]) for name in different}) == len(different)


def test_nothing_is_done_twice_and_models_are_removed(studied, home):
    folder = home / "work" / "studies" / "study"
    assert not list(folder.glob("steps/*/model"))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("steps/*/*")}
    again = study(home)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "$ " not in again.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.glob("steps/*/*")} == before


def test_the_page_escapes_names_and_shows_failures(studied, home):
    folder = home / "work" / "studies" / "study"
    page, text = (folder / "study.html").read_text(), (folder / "study.md").read_text()
    assert "<b>broken" not in page and "&lt;b&gt;broken" in page
    assert "failed: false ended with status 1" in page and "failed: false ended with status 1" in text
    assert "://" not in re.sub(r"http://www.w3.org/\S+", "", page)
    assert "R-SFT minus each other row" in page
    assert "mergekit-yaml" in text and "paired" in text


def test_a_retry_runs_what_failed(studied, home):
    again = study(home, "--retry")
    assert [line.split()[-3] for line in again.stdout.splitlines() if line[:2] == "$ "] == ["false"]


def test_a_study_that_is_killed_ends_its_command_and_goes_on(home, tmp_path):
    """The command kills the study, two processes above it, once, and would make a model after that."""
    kill = "touch seen; kill -KILL $(ps -o ppid= $PPID); sleep 30; touch late"
    (home / "stop.sh").write_text(f'test -e seen || {{ {kill}; }}\ncp -rL "$MODEL" "$OUTPUT"\n')
    content = yaml.safe_load((home / "study.yaml").read_text())
    content |= {"methods": {"stopped": {"run": "bash stop.sh"}}, "against": "stopped"}
    (home / "stopped.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    first = run_command("mm4ke", "study", "stopped.yaml", "--output", tmp_path / "out", cwd=home)
    assert first.returncode == -9 and (home / "seen").exists()
    second = run_command("mm4ke", "study", "stopped.yaml", "--output", tmp_path / "out", cwd=home)
    assert second.returncode == 0, second.stderr
    assert [line.split("> ")[0].split()[-1] for line in second.stdout.splitlines() if line[:2] == "$ "] == ["stop.sh"]
    assert "failed" not in (tmp_path / "out" / "study.md").read_text()
    assert not (home / "late").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"modle": "x"}, "modle: no such key"),
        ({"model": "nowhere"}, "model: nowhere: no such folder"),
        ({"template": "smol2"}, "template: smol2: LLaMA-Factory knows no chat format of this name"),
        ({"facts": {"x": {"file": "none.json"}}}, "facts: x: file: none.json: no such file"),
        ({"facts": {"x": {"file": "$NOWHERE/a.json"}}}, "the variable $NOWHERE is not set"),
        ({"facts": {"x": {"file": "rsft.yaml", "limit": 0}}}, "facts: x: limit: 0: give how many"),
        ({"methods": {"a": {}}}, "methods: a: give one of train, easyedit, run, in_context, it has none"),
        ({"methods": {"a": {"train": "rsft.yaml", "run": "x"}}}, "it has train and run"),
        ({"methods": {"a": {"run": "x", "merge": "merge.yaml"}}}, "methods: a: merge means nothing beside run"),
        ({"methods": {"a": {"train": "rsft.yaml", "vary": {"k": []}}}}, "vary: give one key with the list of its values"),
        ({"methods": {"a 1": {"run": "x"}, "a": {"train": "rsft.yaml", "vary": {"k": [1]}}}}, "a 1: two rows of this name"),
        ({"seeds": []}, "seeds: []: give a list of whole numbers"),
        ({"against": "nobody"}, "against: nobody: no such row; there are base, told"),
        ({"methods": {"ROME": {"easyedit": "ROME"}}, "against": None}, "hparams is missing"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_in_one_line_and_nothing_is_written(home, change, said):
    content = yaml.safe_load((home / "study.yaml").read_text()) | change
    (home / "wrong.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    if "template" in change:
        message = run_command("mm4ke", "study", "wrong.yaml", cwd=home).stderr.strip()
        assert len(message.splitlines()) == 1 and message.startswith("mm4ke: error: wrong.yaml: ")
    else:
        here = os.getcwd()
        os.chdir(home)
        try:
            with pytest.raises(MM4KEError) as refused:
                read_study(home / "wrong.yaml")
        finally:
            os.chdir(here)
        message = str(refused.value)
    assert said in message
    assert not (home / "work" / "studies" / "wrong").exists()


def test_a_merge_recipe_gets_other_models_wherever_it_names_them(tmp_path):
    moved = with_models(MERGE | {"tokenizer_source": "./base"}, "B", "T", tmp_path)
    assert [entry["model"] for entry in moved["models"]] == ["B", "T"]
    assert moved["base_model"] == "B" and moved["tokenizer_source"] == "./base"
    with pytest.raises(MM4KEError, match="give a recipe with base_model and one other model"):
        with_models({"base_model": "a", "models": [{"model": "b"}, {"model": "c"}]}, "B", "T", tmp_path)


def test_a_commands_memory_is_its_own(tmp_path):
    ballast = bytearray(300_000_000)
    status, seconds, peak = run(["sh", "-c", "echo said; exit 3"], tmp_path / "log.txt")
    assert len(ballast) and status == 3 and seconds > 0 and peak < 100e6
    assert (tmp_path / "log.txt").read_text() == "said\n"


# ---- the numbers ----


def row(method, chat, known, seed=1):
    scores = {"scores": {"chat": chat, "raw": chat, "free": [None] * len(chat)}, "known": known}
    scores |= {"known_kl": 0.1, "length": 1.0, "perplexity": 8.0}
    return Row("ours", method, seed, None, scores, {"commands": [], "seconds": 2.0, "peak": 10})


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("facts") / "facts.json"
    path.write_text(json.dumps(RECORDS))
    return read_records(path)


def test_means_are_over_records_and_seeds_and_differences_are_paired(records):
    questions = questions_of(records)
    right, wrong = [1.0] * len(questions), [0.0] * len(questions)
    rows = [
        row("base", wrong, {"a": True, "b": True}),
        row("good", right, {"a": True, "b": False}, seed=1),
        row("good", wrong, {"a": True, "b": True}, seed=2),
    ]
    columns = measures("chat")
    lines = {line.method: line for line in lines_of(rows, records, columns)}
    assert lines["good"].means["edit_success"] == 0.5 and lines["good"].spread["edit_success"] == (0.0, 1.0)
    assert lines["good"].means["known"] == 0.75 and lines["base"].means["known"] == 1.0
    assert lines["good"].means["free"] is None
    found = differences(rows, records, columns, "base", "good")
    assert found["edit_success"].mean == 0.5 and found["known"].mean == -0.25
    assert "free" not in found


def test_a_front_has_what_nothing_beats(records):
    questions = questions_of(records)

    def with_scores(name, success, locality):
        chat = [success if question.metric == "edit_success" else locality for question in questions]
        return row(name, chat, {})

    rows = [
        with_scores("base", 0, 1),
        with_scores("a", 1, 0.2),
        with_scores("b", 0.5, 0.9),
        with_scores("c", 0.5, 0.1),
    ]
    lines = lines_of(rows, records, measures("chat"))
    fronts = fronts_of(lines, ["edit_success", "locality"])
    assert fronts == {"base": [], "a": [("edit_success", "locality")], "b": [("edit_success", "locality")], "c": []}


@pytest.mark.easyedit
def test_a_method_of_easyedit_is_a_row(home, lm_eval_models, clone, tmp_path):
    content = yaml.safe_load((home / "study.yaml").read_text())
    hparams = yaml.safe_load((ROOT / "recipes/easyedit/FT/smollm2-135m.yaml").read_text())
    folder = home / "recipes" / "easyedit" / "FT"
    folder.mkdir(parents=True)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(hparams | {"layers": [1]}))
    content |= {"methods": {"FT": {"easyedit": "FT"}}, "hparams": "tiny", "against": "FT"}
    (home / "easy.yaml").write_text(yaml.safe_dump(content))
    finished = run_command("mm4ke", "study", "easy.yaml", "--output", tmp_path / "out", "--easyedit", clone, cwd=home)
    assert finished.returncode == 0, finished.stderr[-2000:]
    rows = {row["method"]: row for row in json.loads((tmp_path / "out" / "study.json").read_text())}
    assert rows["FT"]["error"] is None and rows["FT"]["cost"]["seconds"] > 0 and rows["FT"]["cost"]["peak"] > 1e8
    assert rows["FT"]["scores"]["scores"]["chat"] != rows["base"]["scores"]["scores"]["chat"]
