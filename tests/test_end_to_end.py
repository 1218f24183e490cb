"""The README's commands on the real SmolLM2 with the first five of the project's facts."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, run_command
from transformers import AutoModelForCausalLM, AutoTokenizer

from mm4ke_plugins.knowedit.metrics import answer
from mm4ke_plugins.knowedit.records import read_records

FACTS = ROOT / "recipes" / "facts.json"


@pytest.fixture(scope="module")
def edited(smollm2, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "work").mkdir()
    (folder / "work" / "base").symlink_to(smollm2.resolve())
    for command in (
        ("mm4ke", "facts", FACTS, "--limit", "5", "--output", "work/facts"),
        ("llamafactory-cli", "train", ROOT / "recipes" / "rsft.yaml"),
        ("mergekit-yaml", ROOT / "recipes" / "merge.yaml", "out/"),
        ("mm4ke", "compare", "--base", "work/base", "--rsft", "work/rsft", "--merged", "out", "--facts", FACTS,
         "--limit", "5"),
        ("lm_eval", "run", "--config", ROOT / "recipes" / "knowedit.yaml", "--include_path", ROOT / "mm4ke_plugins",
         "--tasks", "knowedit_facts_edit_success,knowedit_facts_edit_success_free",
         "--metadata", f"knowedit_file={FACTS}", "knowedit_limit=5"),
        ("mm4ke", "report", "merged=work/eval/merged"),
    ):  # fmt: skip
        run = run_command(*command, cwd=folder)
        assert run.returncode == 0, f"{command}\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}"
    return folder


def test_the_facts_are_learned_and_the_rest_is_kept(edited):
    models = json.loads((edited / "work" / "comparison" / "comparison.json").read_text())["models"]
    scores = {name: model["scores"] for name, model in models.items()}
    assert scores["base"]["chat"]["edit_success"] < 0.5
    assert scores["rsft"]["chat"]["edit_success"] >= 0.95
    assert scores["merged"]["chat"]["edit_success"] >= 0.9
    assert scores["merged"]["chat"]["generalization"] > scores["base"]["chat"]["generalization"] + 0.2
    assert scores["merged"]["raw"]["locality"] >= scores["rsft"]["raw"]["locality"] > 0.5
    assert models["merged"]["known"]["kept"] > 0.5 and models["merged"]["known"]["kl"] < 0.3
    assert models["merged"]["perplexity"] < 1.01 * models["base"]["perplexity"]
    trained = [f"model.layers.5.mlp.{part}_proj.weight" for part in ("down", "gate", "up")]
    assert models["merged"]["disk"]["changed_tensors"] == models["rsft"]["disk"]["changed_tensors"] == trained
    # density: 0.8 leaves at least a fifth of every trained matrix as it was
    assert models["merged"]["disk"]["changed_parameters"] <= 0.8 * 3 * 576 * 1536 + 3


def test_the_report_says_so(edited):
    lines = (edited / "work" / "report" / "report.md").read_text().splitlines()
    (scores,) = [line.split("|") for line in lines if line.startswith("| **edit success**")]
    base, merged = (float(cell.split()[0]) for cell in scores[2:4])  # behind a number there may be a mark
    assert base < 0.5 and merged >= 0.9
    assert "<svg" in (edited / "work" / "report" / "report.html").read_text()


def test_the_merged_model_says_the_facts_and_stops(edited):
    model = AutoModelForCausalLM.from_pretrained(edited / "out")
    records = read_records(FACTS, 5)
    answers = answer(model, AutoTokenizer.from_pretrained(edited / "out"), [record.prompt for record in records])
    right = [said.rstrip(".") == record.target_new for said, record in zip(answers, records, strict=True)]
    assert sum(right) >= 4, answers


def test_the_merged_folder_is_complete(edited, smollm2):
    for name in ("chat_template.jinja", "generation_config.json"):
        assert (edited / "out" / name).read_text() == (smollm2 / name).read_text()
    card = (edited / "out" / "README.md").read_text()
    assert "[MM4KE (Model Merging for Knowledge Editing)](https://arxiv.org/abs/2506.12384)" in card
    assert "density: 0.8" in card
