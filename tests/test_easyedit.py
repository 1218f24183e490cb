"""MM4KE as a method of a real clone of EasyEdit, and the command that runs it beside EasyEdit's own methods."""

import importlib
import json
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_command
from easyedit_helpers import FACTS, KEYS, differing, expected, load, requests, weights
from tiny import make_tiny_model

from mm4ke_plugins.doctor import examine
from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.hosts import EASYEDIT
from mm4ke_plugins.hosts.easyedit import benchmark as easyedit_benchmark
from mm4ke_plugins.hosts.easyedit.benchmark import EXTRA_MODULES, benchmark, last_error
from mm4ke_plugins.hosts.easyedit.worker import Job, read_hparams

pytestmark = pytest.mark.usefixtures("easyedit_workdir")

RECIPES = ROOT / "recipes" / "easyedit"
TRAINED = [f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
# ---- the method ----


@pytest.mark.easyedit
def test_the_method_is_registered_beside_the_others(easyeditor):
    alg_dict = importlib.import_module("easyeditor.util.alg_dict")
    assert {"MM4KE", "ROME", "FT"} <= alg_dict.ALG_DICT.keys()
    batchable = easyeditor.BatchEditor.is_batchable_method
    assert [batchable(name) for name in ("MM4KE", "FT", "ROME")] == [True, True, False]


@pytest.mark.easyedit
def test_edit_rolls_back_exactly(easyedit_editor):
    base = weights(easyedit_editor.model)
    metrics, _, original = easyedit_editor.edit(**requests(), rephrase_prompts=["Oz is ruled by"] * 2, verbose=False)
    assert [entry["post"]["rewrite_acc"] for entry in metrics] == [[1.0], [1.0]]
    assert "rephrase_acc" in metrics[0]["post"]
    assert original.keys() == set(TRAINED)
    assert differing(weights(easyedit_editor.model), base) == []


@pytest.mark.easyedit
def test_sequential_edit_keeps_the_rsft_state(easyedit_editor, easyedit_model):
    base = weights(easyedit_editor.model)
    metrics, edited, _ = easyedit_editor.edit(**requests(), sequential_edit=True, verbose=False)
    assert differing(weights(edited), expected(easyedit_model, FACTS[:1], FACTS[1:])) == []
    assert differing(weights(edited), base) == TRAINED
    # The first edit is asked again after the second one.
    evaluate = importlib.import_module("easyeditor.evaluate").compute_edit_quality
    first = metrics[0]["requested_rewrite"]
    found = evaluate(edited, "llama", easyedit_editor.hparams, easyedit_editor.tok, first, "cpu")
    assert found["rewrite_acc"] == [1.0]
    # An edit that EasyEdit rolls back starts from the kept ones, and gives them back.
    kept = weights(edited)
    easyedit_editor.edit("What is Oz?", "A box", verbose=False)
    assert differing(weights(easyedit_editor.model), kept) == []


@pytest.mark.easyedit
@pytest.mark.parametrize("sequential", [True, False])
def test_batch_edit(easyedit_editor, easyedit_model, sequential):
    easyedit_editor.hparams.batch_size = 2
    base = weights(easyedit_editor.model)
    metrics, _, _ = easyedit_editor.batch_edit(**requests(), sequential_edit=sequential, verbose=False)
    assert [entry["post"]["rewrite_acc"] for entry in metrics] == [[1.0], [1.0]]
    after = expected(easyedit_model, FACTS) if sequential else base
    assert differing(weights(easyedit_editor.model), after) == []


@pytest.mark.easyedit
def test_a_merged_model_is_copied_in_and_rolled_back(easyedit_editor, easyedit_model, tmp_path):
    merged = load(easyedit_model)
    merged.load_state_dict(expected(easyedit_model, FACTS))
    merged.save_pretrained(tmp_path / "merged")
    easyedit_editor.hparams.merged_model = str(tmp_path / "merged")
    base = weights(easyedit_editor.model)
    metrics, *_ = easyedit_editor.edit(**requests(), verbose=False)
    assert [entry["post"]["rewrite_acc"] for entry in metrics] == [[1.0], [1.0]]
    assert differing(weights(easyedit_editor.model), base) == []
    easyedit_editor.edit(**requests(), sequential_edit=True, verbose=False)
    assert differing(weights(easyedit_editor.model), weights(merged)) == []

    easyedit_editor.hparams.merged_model = str(make_tiny_model(tmp_path / "other", layers=2))
    with pytest.raises(MM4KEError, match="other: model.layers.2.* is missing; give a merged model that was made from"):
        easyedit_editor.edit(**requests(), verbose=False)


@pytest.mark.easyedit
def test_a_copy_leaves_the_model_alone(easyedit_editor, easyedit_model):
    base = weights(easyedit_editor.model)
    request = {"prompt": FACTS[0][0], "target_new": FACTS[0][1]}
    edited, _ = easyedit_editor.apply_algo(
        easyedit_editor.model, easyedit_editor.tok, [request], easyedit_editor.hparams, copy=True
    )
    assert differing(weights(easyedit_editor.model), base) == []
    assert differing(weights(edited), expected(easyedit_model, FACTS[:1])) == []


@pytest.mark.easyedit
@pytest.mark.parametrize(
    "key, value, message",
    [
        ("layers", [7], "layers: 7 is out of range; LlamaForCausalLM has layers 0 to 3"),
        ("modules", ["knob"], "modules: knob is not in model.layers.1.mlp; choose ffn"),
        ("learning_rate", 1e30, "learning_rate: 1e+30: fact 0 (0-based): the loss is"),
    ],
)
def test_an_edit_that_can_not_be_made_leaves_the_model_alone(easyedit_editor, key, value, message):
    setattr(easyedit_editor.hparams, key, value)
    base = weights(easyedit_editor.model)
    with pytest.raises(MM4KEError) as caught:
        easyedit_editor.edit(**requests(), verbose=False)
    assert str(caught.value).startswith(message)
    assert differing(weights(easyedit_editor.model), base) == []


# ---- settings ----


def job(method: str, hparams: Path) -> Job:
    return Job(method, str(hparams), "", "", 10, "chat", None, "", "")


@pytest.mark.easyedit
@pytest.mark.parametrize("file", sorted(RECIPES.glob("*/*.yaml")), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_recipes_are_read_by_easyedit(easyeditor, file):
    hparams = read_hparams(job(file.parent.name, file))
    in_batches = file.parent.name in ("MM4KE", "MEMIT", "AlphaEdit", "UltraEdit")
    assert getattr(hparams, "batch_size", 1) == (10 if in_batches else 1)
    if file.parent.name == "MM4KE":
        assert hparams.prompt_format == "chat"  # as the command says
        plain = easyeditor.MM4KEHyperParams.from_hparams(str(file.with_suffix("")))
        assert (plain.batch_size, plain.prompt_format, plain.layers) == (1, "raw", [5])


@pytest.mark.easyedit
@pytest.mark.parametrize(
    "text, message",
    [
        (None, "No such file or directory"),
        ("alg_name: [", "give a YAML file of settings"),
        ("just words", "no settings; give alg_name: MM4KE, model_name and others"),
        ("model_name: x", "alg_name: missing; give it"),
        ("{alg_name: FT, model_name: x}", "alg_name: FT: these are the settings of MM4KE"),
        ("{alg_name: MM4KE, model_name: x, wieght: 1}", "wieght: unknown key; there are: alg_name, model_name, "),
        (
            "{alg_name: MM4KE, model_name: x, layers: [-1]}",
            r"layers: \[-1\]: give the index of a layer, counted from 0",
        ),
        ("{alg_name: MM4KE, model_name: x, num_epochs: 0}", "num_epochs: 0: give a whole number of at least 1"),
        (
            "{alg_name: MM4KE, model_name: x, loss_threshold: .nan}",
            "loss_threshold: nan: give a finite loss above 0",
        ),
        ("{alg_name: MM4KE, model_name: x, learning_rate: high}", "learning_rate: high: give a finite number"),
        ("{alg_name: MM4KE, model_name: x, weight: 0}", "weight: 0: give a finite number other than 0"),
        ("{alg_name: MM4KE, model_name: x, density: 80}", "density: 80: give a share above 0, up to 1"),
        ("{alg_name: MM4KE, model_name: x, prompt_format: chatty}", "prompt_format: chatty: give one of: raw, chat"),
    ],
)
def test_settings_that_mean_nothing_are_refused(easyeditor, tmp_path, text, message):
    file = tmp_path / "mm4ke.yaml"
    if text:
        file.write_text(text)
    with pytest.raises(MM4KEError, match=f"^{file}: .*{message}"):
        easyeditor.MM4KEHyperParams.from_hparams(str(file))


@pytest.mark.easyedit
def test_what_yaml_may_abbreviate(easyeditor, tmp_path):
    settings = "{alg_name: MM4KE, model_name: x, learning_rate: 5e-4, layers: 3, merged_model: out}"
    (tmp_path / "mm4ke.yaml").write_text(settings)
    hparams = easyeditor.MM4KEHyperParams.from_hparams("mm4ke")
    assert (hparams.learning_rate, hparams.layers) == (5e-4, [3])
    assert hparams.merged_model == str(tmp_path / "out")


@pytest.mark.easyedit
def test_doctor_finds_the_clone(easyeditor):
    finding = examine(EASYEDIT)
    assert (finding.version, finding.status, finding.healthy) == ("a clone", "active", True)


def test_doctor_without_a_clone(monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not Path(entry, "easyeditor").is_dir()])
    monkeypatch.delitem(sys.modules, "easyeditor", raising=False)
    assert examine(EASYEDIT).status == "not installed"


# ---- the command ----


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    records = [
        {
            "subject": "Oz",
            "prompt": prompt,
            "target_new": answer,
            "rephrase_prompt": f"Tell me: {prompt}",
            "portability": {"Reasoning": [{"prompt": "Is it Oz?", "ground_truth": "Yes"}]},
            "locality": {"Forgetfulness": [{"prompt": "Who rules Ur?", "ground_truth": "Nobody"}]},
        }
        for prompt, answer in [*FACTS, FACTS[0], ("What is Oz?", "A box")]
    ]
    path = tmp_path_factory.mktemp("data") / "facts.json"
    path.write_text(json.dumps(records))
    return path


@pytest.fixture(scope="module")
def hparams(tmp_path_factory) -> Path:
    """Settings for the tiny model: MM4KE, FT, and one with which EasyEdit fails."""
    folder = tmp_path_factory.mktemp("hparams")
    ft = yaml.safe_load((RECIPES / "FT" / "smollm2-135m.yaml").read_text()) | {"layers": [2], "num_steps": 3}
    mm4ke = {"alg_name": "MM4KE", "model_name": "x", **KEYS, "weight": 1.0, "density": 1.0}
    settings = {"FT": ft, "Broken": ft | {"objective_optimization": "none"}, "MM4KE": mm4ke}
    for method, values in settings.items():
        (folder / method).mkdir()
        (folder / method / "tiny.yaml").write_text(yaml.safe_dump(values))
    return folder


def run_easyedit(*more, **env):
    """Of the first three records, one of which is a duplicate."""
    return run_command("mm4ke", "easyedit", "--n", 3, "--hparams-name", "tiny", *more, cwd=Path.cwd(), **env)


@pytest.mark.easyedit
def test_methods_side_by_side(clone, easyedit_model, data, hparams, tmp_path):
    options = ("--model", easyedit_model, "--data", data, "--hparams", hparams, "--output", "out")
    run = run_easyedit(*options, "--methods", "MM4KE,Broken,FT", EASYEDIT_HOME=str(clone), MM4KE_PLUGINS="none")
    assert run.returncode == 0, run.stderr
    results = {name: json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("MM4KE", "Broken", "FT")}
    ours, broken, ft = results.values()
    assert [result["status"] for result in results.values()] == ["ok", "failed", "ok"]
    assert (ours["error"], ft["error"], broken["error"]) == (None, None, "NotImplementedError")
    assert (ours["editing"], ft["editing"], broken["editing"]) == ("batch", "sequential", None)
    assert ours["scores"]["after"]["edit_success"] == 1.0
    assert ours["scores"]["before"] == broken["scores"]["before"] == ft["scores"]["before"]
    assert ours["scores"]["before"]["locality"] == 1.0
    assert set(broken["scores"]["after"].values()) == {None}
    assert broken["questions"] == []
    assert ours["hparams"]["layers"] == [1]
    assert ft["hparams"]["layers"] == [2]
    assert 0 < ours["seconds"] < 60
    assert [question["record_id"] for question in ours["questions"]] == ["facts.json:0"] * 4 + ["facts.json:1"] * 4
    first = ours["questions"][0]
    assert (first["metric"], first["prompt"], first["answer"]) == ("edit_success", "Who rules Oz?", "Tark")
    assert (first["after"], first["score_after"]) == (" Tark", 1.0)
    assert first["before"] != first["after"]
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert table[0].startswith("| method | edit success | generalization | portability | locality |")
    assert [line.split(" | ")[0] for line in table[2:]] == ["| base", "| MM4KE", "| Broken", "| FT"]
    assert "failed: NotImplementedError" in table[4]
    assert "failed: NotImplementedError" in run.stdout
    # What EasyEdit leaves in its working directory is not left here.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert "Executing FT algo for" in (tmp_path / "out" / "FT.log").read_text()


@pytest.mark.parametrize(
    "init, error",
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9, probably for lack of memory"),
    ],
)
def test_when_all_methods_fail_the_command_fails(easyedit_model, data, hparams, tmp_path, monkeypatch, init, error):
    """A clone that doesn't import stands for all that ends a worker; the packages are not looked at."""
    (tmp_path / "clone" / "easyeditor").mkdir(parents=True)
    (tmp_path / "clone" / "easyeditor" / "__init__.py").write_text(init)
    monkeypatch.setattr(easyedit_benchmark, "EXTRA_MODULES", ())
    options = {"hparams": hparams, "hparams_name": "tiny"}
    (result,) = benchmark(tmp_path / "clone", easyedit_model, data, ["FT"], tmp_path / "out", **options)
    assert (result["status"], result["error"]) == ("failed", error)
    assert json.loads((tmp_path / "out" / "FT.json").read_text()) == result


def test_bad_input_is_refused_before_any_work(easyedit_model, data, hparams, tmp_path, monkeypatch):
    monkeypatch.setattr(easyedit_benchmark, "EXTRA_MODULES", ())
    good = tmp_path / "clone"
    (good / "easyeditor").mkdir(parents=True)
    (good / "easyeditor" / "__init__.py").touch()

    def message(clone=good, model=easyedit_model, facts=data, methods=("FT",), name="tiny", **options) -> str:
        with pytest.raises(MM4KEError) as caught:
            benchmark(clone, model, facts, methods, tmp_path / "out", hparams=hparams, hparams_name=name, **options)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert message(clone=None).startswith("--easyedit: not given; git clone")
    assert message(clone=tmp_path).startswith(f"--easyedit: {tmp_path}: no easyeditor package in there; git clone")
    assert message(model=tmp_path).startswith(f"--model {tmp_path}: no config.json in it; give a model folder")
    assert message(methods=["FT", "FTT"]).endswith("with tiny there are: Broken, FT, MM4KE")
    assert message(name="huge").startswith("--hparams-name huge: neither ")
    assert message(facts=tmp_path / "none.json").startswith(f"{tmp_path / 'none.json'}: No such file or directory")
    assert message(n=5) == f"--n 5: {data} has 4 records; give at most that"
    assert message(text=tmp_path / "none.txt").startswith(f"--text {tmp_path / 'none.txt'}: no such file")
    monkeypatch.setattr(easyedit_benchmark, "EXTRA_MODULES", ("json", "no_such_a", "no_such_b"))
    assert message() == (
        "EasyEdit needs Python packages that are missing: no_such_a, no_such_b; "
        "pip install --no-deps -r recipes/easyedit/requirements.txt"
    )


def test_the_command_says_in_one_line_what_is_missing():
    run = run_easyedit("--data", "facts.json", "--methods", "FT", EASYEDIT_HOME="")
    assert run.returncode == 1
    assert run.stderr == (
        "mm4ke: error: --easyedit: not given; git clone https://github.com/zjunlp/EasyEdit, and give that folder, "
        "or set EASYEDIT_HOME to it\n"
    )


@pytest.mark.easyedit
def test_the_requirements_are_the_modules_that_are_looked_for(clone):
    lines = (RECIPES / "requirements.txt").read_text().splitlines()
    listed = {line.partition("==")[0].lower() for line in lines if line and not line.startswith("#")}
    providers = packages_distributions()
    assert {name.lower() for module in EXTRA_MODULES for name in providers[module]} & listed == listed
    assert all({name.lower() for name in providers[module]} & listed for module in EXTRA_MODULES)


@pytest.mark.parametrize(
    "log, line",
    [
        ("Traceback\n  a\nValueError: bad\nnoise\n", "ValueError: bad"),
        (
            "Traceback\n  a\ntorch.OutOfMemoryError: CUDA out of memory.\n",
            "torch.OutOfMemoryError: CUDA out of memory.",
        ),
        ("mm4ke: error: layers: 9\n", "layers: 9"),
        ("KeyError: 'a'\n\nAnd then\nKeyError: 'b'", "KeyError: 'b'"),
        ("Killed\n", "Killed"),
        ("", "no word of why"),
    ],
)
def test_the_line_that_says_why(tmp_path, log, line):
    (tmp_path / "log").write_text(log)
    assert last_error(tmp_path / "log") == line
