"""Installed means nothing changes: who asks for nothing of ours gets from every host what it gives without us."""

import json
from pathlib import Path

import pytest
from conftest import run_command
from llamafactory_helpers import write_facts
from tiny import make_tiny_model


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("installed")
    make_tiny_model(home / "base")
    make_tiny_model(home / "other", seed=1)
    write_facts(home / "facts")
    return home


def probe(home: Path, name: str, **env: str) -> dict:
    (home / name).mkdir()
    script = Path(__file__).with_name("installed_probe.py")
    run = run_command("python", script, home / "base", home / "other", home / "facts", cwd=home / name, **env)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def without(home) -> dict:
    return probe(home, "without", MM4KE_PLUGINS="none")


@pytest.fixture(scope="module")
def installed(home) -> dict:
    return probe(home, "installed")


def test_every_task_of_lm_eval_keeps_its_file(without, installed):
    ours = installed["tasks"].keys() - without["tasks"].keys()
    assert {name: installed["tasks"][name] for name in without["tasks"]} == without["tasks"]
    assert {"squadv2", "logiqa"} <= without["tasks"].keys()
    assert {"mm4ke_squadv2", "mm4ke_logiqa", "knowedit_facts"} <= ours
    assert all(name.startswith(("knowedit_", "mm4ke_")) for name in ours)


@pytest.mark.parametrize("part", ["sft", "merge", "arguments", "classes"])
def test_the_same_weights_files_arguments_and_classes(without, installed, part):
    assert installed[part] == without[part]
    if part == "classes":
        assert without[part]["pickled"] == [True] * 5


def test_arguments_with_rsft_are_those_of_the_host_and_more(installed, home):
    found = installed["arguments with rsft"]
    assert found.pop("repr").startswith("FinetuningArguments(freeze_trainable_layers=1, ")
    assert found == {"isinstance": True, "copies": [True, True], "asdict": 4, "replaced": 2}


@pytest.mark.parametrize("plugins", ["llamafactory", "none"])
def test_a_new_process_reads_pickled_arguments(installed, home, plugins):
    """As a process does that multiprocessing spawns: it imports what the pickle names and nothing before."""
    code = "import pickle, sys; one = pickle.load(open(sys.argv[1], 'rb')); print(type(one).__name__, one.rsft_layers)"
    run = run_command("python", "-c", code, home / "installed" / "finetuning_args.pickle", MM4KE_PLUGINS=plugins)
    assert run.stdout == "FinetuningArguments [1]\n", run.stderr[-2000:]
    assert "could not hook" not in run.stderr
