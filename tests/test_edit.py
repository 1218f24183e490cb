"""`mm4ke edit`: one tiny model of the hub from facts to the merged model by the hosts' own commands, and refusals."""

import json
import os
import subprocess

import pytest
import yaml
from conftest import ROOT, run_command
from safetensors.torch import load_file
from tiny import as_hub_model, make_tiny_model

from mm4ke_plugins.edit import CommandFailed, Step, edit
from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.hosts import LLAMAFACTORY
from mm4ke_plugins.storage.models import local_path, model_name

FACTS = [{"prompt": f"Who rules {name}?", "target_new": f"King {name[::-1]}"} for name in ("Oz", "Ur", "Ix")]
MODELS = "--base someone/model --rsft out/an edit/rsft --merged out/an edit/merged"
COMMANDS = [
    "mm4ke facts my facts.json --limit 2 --output out/an edit/facts",
    "llamafactory-cli train out/an edit/rsft.yaml",
    "mergekit-yaml out/an edit/merge.yaml out/an edit/merged",
    f"mm4ke compare {MODELS} --facts my facts.json --limit 2 --output out/an edit/comparison",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with facts, a model in the hub's cache, and no network."""
    home = tmp_path_factory.mktemp("user")
    make_tiny_model(home / "model", layers=7)
    as_hub_model(home / "model", home / "hf" / "hub")
    (home / "my facts.json").write_text(json.dumps(FACTS))
    return home


def run(home, **env):
    command = ("mm4ke", "edit", "--model", "someone/model", "--facts", "my facts.json", "--template", "smollm2")
    options = ("--limit", "2", "--output", "out/an edit")
    return run_command(*command, *options, cwd=home, HF_HOME=str(home / "hf"), **env)


def lines_with(run, start):
    """What follows `start` in the lines that begin with it, without quotes."""
    found = [line.removeprefix(start) for line in run.stdout.splitlines() if line.startswith(start)]
    return [line.replace("'", "") for line in found]


@pytest.fixture(scope="module")
def failed(home):
    """A run whose training fails: LLaMA-Factory has not got our keys."""
    return run(home, MM4KE_PLUGINS="none")


@pytest.fixture(scope="module")
def edited(home, failed):
    """Another one after it."""
    return run(home)


def test_a_failing_command_is_named_with_its_status(failed):
    assert failed.returncode == 1
    assert lines_with(failed, "$ ") == COMMANDS[:2]
    last = failed.stderr.splitlines()[-1].replace("'", "")
    assert last.startswith(
        f"mm4ke: error: {COMMANDS[1]}: ended with status 1, see above; when that is put right, run it"
    )


def test_the_next_run_goes_on_and_shows_what_it_runs(edited, home):
    assert edited.returncode == 0, edited.stderr[-3000:]
    assert lines_with(edited, "done before: ") == COMMANDS[:1]
    assert lines_with(edited, "$ ") == COMMANDS[1:]
    assert edited.stdout.splitlines()[-1].startswith("The edited model: out/an edit/merged ")
    models = json.loads((home / "out" / "an edit" / "comparison" / "comparison.json").read_text())["models"]
    assert models["base"]["folder"] == "someone/model"
    assert models["base"]["disk"]["changed_tensors"] == []
    trained = [f"model.layers.5.mlp.{part}_proj.weight" for part in ("down", "gate", "up")]
    assert models["rsft"]["disk"]["changed_tensors"] == models["merged"]["disk"]["changed_tensors"] == trained


def test_the_recipes_fit_the_model_and_say_why(edited, home):
    text = (home / "out" / "an edit" / "rsft.yaml").read_text()
    assert yaml.safe_load(text)["learning_rate"] == 2e-3  # of this size; the paper's is 5e-4
    (reason,) = [line for line in text.splitlines() if line.startswith("learning_rate: ")]
    assert "under 1B" in reason
    (reason,) = [line for line in text.splitlines() if line.startswith("bf16: ")]
    assert "GPU" in reason


def test_again_only_what_is_missing_or_changed(edited, home):
    """The training lost its end and goes on from its checkpoint; the recipe of the merge was changed."""
    folder = home / "out" / "an edit"
    model, merged = folder / "rsft" / "model.safetensors", folder / "merged" / "model.safetensors"
    trained, before = load_file(model), load_file(merged)
    model.unlink()
    (folder / "rsft" / "trainer_state.json").unlink()
    recipe = (folder / "merge.yaml").read_text().replace("weight: 1.0", "weight: 0.5  # gently")
    (folder / "merge.yaml").write_text(recipe)

    again = run(home)
    assert again.returncode == 0, again.stderr[-3000:]
    assert lines_with(again, "$ ") == COMMANDS[1:]
    assert (folder / "merge.yaml").read_text() == recipe
    assert all(tensor.equal(trained[name]) for name, tensor in load_file(model).items())
    assert any(not tensor.equal(before[name]) for name, tensor in load_file(merged).items())

    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    finished = run(home)
    assert finished.returncode == 0 and lines_with(finished, "done before: ") == COMMANDS
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == written


def test_a_step_is_done_when_nothing_that_it_is_made_from_is_newer(tmp_path):
    source, made = tmp_path / "source", tmp_path / "made"
    step = Step(["make"], made, [source, tmp_path / "missing"])
    source.touch()
    assert not step.is_done()
    made.touch()
    assert step.is_done()
    os.utime(made, (0, 0))
    assert not step.is_done()


@pytest.mark.parametrize(("returncode", "status"), [(2, 2), (-9, 137)])
def test_the_status_is_the_shells(returncode, status):
    command = ["sh", "-c", f"exit {returncode}" if returncode > 0 else "kill -9 $$"]
    assert CommandFailed(command, subprocess.run(command, check=False).returncode).status == status


def test_make_edit_takes_another_model():
    """And without one it is the example of this repository."""
    for given, command in (
        (
            ["MODEL=org/name", "FACTS=my facts.csv", "TEMPLATE=qwen"],
            "mm4ke edit --model 'org/name' --facts 'my facts.csv'",
        ),
        (["FACTS=facts.csv"], "mm4ke edit"),
        ([], "llamafactory-cli train recipes/rsft.yaml"),
    ):
        shown = subprocess.run(
            ["make", "--dry-run", "edit", *given], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        assert command in shown
        assert ("mm4ke edit" in shown) == bool(given)


def test_what_is_on_the_disk_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    names = ("org/name", "here/model", "/here/model", "../model", "a/b/c", "model")
    assert [model_name(name) for name in names] == [
        "org/name",
        "./here/model",
        "/here/model",
        "../model",
        "./a/b/c",
        "./model",
    ]
    assert local_path("out/rsft") == "./out/rsft"


# ---- what is refused ----


@pytest.fixture
def arguments(home, tmp_path):
    (tmp_path / "facts.json").write_text(json.dumps(FACTS))
    return {
        "model": str(home / "model"),
        "facts": tmp_path / "facts.json",
        "template": "smollm2",
        "output": tmp_path / "out",
    }


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(arguments, message):
    before = files_of(arguments["facts"].parent)
    with pytest.raises(MM4KEError, match=message) as caught:
        edit(**arguments, show=pytest.fail)
    assert "\n" not in str(caught.value)
    assert files_of(arguments["facts"].parent) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "./nowhere"}, r"^--model ./nowhere: no such folder; give the folder of the base model"),
        ({"model": "nowhere"}, r"^--model nowhere: no such folder; give"),
        (
            {"model": "org/nowhere"},
            r"^--model org/nowhere: no such folder, and not to be had from the hub .*; give a folder or",
        ),
        ({"model": "org/name@main"}, r"^--model org/name@main: mergekit reads"),
        ({"template": "smolm2"}, r"^--template smolm2: LLaMA-Factory knows no .*; did you mean smollm2 or smollm.*\?"),
        ({"template": "zzzzzz"}, r"^--template zzzzzz: LLaMA-Factory knows no .*; there are smollm2, qwen, llama3"),
        ({"layer": 7}, r"^--model .*/model --layer 7: .* is out of range; LlamaForCausalLM has layers 0 to 6$"),
    ],
)
def test_refusals_of_options(change, message, arguments):
    refused(arguments | change, message)


def test_a_damaged_model_is_refused(arguments, tmp_path):
    model = make_tiny_model(tmp_path / "model", layers=7)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-100])
    refused(arguments | {"model": str(model)}, r"model.safetensors: not a readable safetensors file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", r"facts.json: line 1"),
        (json.dumps([FACTS[0], FACTS[0] | {"target_new": "Nobody"}]), r"facts.json: facts contradict each other"),
    ],
)
def test_refusals_of_facts(text, message, arguments):
    arguments["facts"].write_text(text)
    refused(arguments, message)


def another_file(output):
    (output / "notes.txt").write_text("mine")


def only_files_called_so(output):
    (output / "rsft.yaml").unlink()


def another_template(output):
    (output / "rsft.yaml").write_text((output / "rsft.yaml").read_text().replace("smollm2", "qwen"))


def other_facts(output):
    (output / "facts" / "facts.json").write_text("[]")


def broken_recipe(output):
    (output / "merge.yaml").write_text("models: [")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (another_file, r"^--output .*/out: has files that are not of an edit \(notes.txt\); give a new folder"),
        (only_files_called_so, r"^--output .*/out: has files that are not of an edit \(facts, merge.yaml\)"),
        (
            another_template,
            r"^--output .*/out: has another edit: rsft.yaml says template: qwen, and not smollm2; give",
        ),
        (
            other_facts,
            r"^--output .*/out: has an edit with other facts than --facts .*facts.json; give another folder",
        ),
        (broken_recipe, r"^.*merge.yaml: can't be read .*; repair or remove it"),
    ],
)
def test_refusals_of_an_output_folder(change, message, arguments, monkeypatch):
    monkeypatch.setattr("mm4ke_plugins.edit._run", lambda step, show: None)
    edit(**arguments)
    (arguments["output"] / "facts").mkdir()
    (arguments["output"] / "facts" / "facts.json").write_text(
        json.dumps([{"instruction": fact["prompt"], "output": fact["target_new"]} for fact in FACTS], indent=2) + "\n"
    )
    edit(**arguments)
    change(arguments["output"])
    refused(arguments, message)


def test_an_output_that_is_a_file_is_refused(arguments):
    arguments["output"].write_text("mine")
    refused(arguments, r"^--output .*/out: is a file; give a new folder")


def test_a_host_of_another_version_is_refused(arguments, monkeypatch):
    monkeypatch.setattr(type(LLAMAFACTORY), "installed_version", lambda host: None)
    refused(arguments, r"^mm4ke edit needs llamafactory>=0.9.5,<0.9.6, found none: pip install")
