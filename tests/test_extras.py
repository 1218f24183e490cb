"""What works without the extra "report", and what is said where something needs it."""

import json
import sys

import pytest
from conftest import run_command
from tiny import make_tiny_model

REPORT = ["matplotlib", "scipy", "nltk", "jinja2"]
# The command, where these can't be imported. sklearn, which transformers imports where it is, needs scipy.
COMMAND = """
import sys
missing, *sys.argv = sys.argv[1].split(","), *sys.argv[1:]
sys.modules.update(dict.fromkeys([*missing, "sklearn"]))
from mm4ke_plugins.cli import main
main()
"""


def mm4ke_without(modules: list[str], *arguments, **options):
    return run_command("python", "-c", COMMAND, ",".join(modules), *arguments, MM4KE_PLUGINS="none", **options)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("extras")
    make_tiny_model(home / "base")
    make_tiny_model(home / "edited", seed=1)
    facts = [{"prompt": f"Who leads {town}?", "target_new": town[::-1]} for town in ("Arnholt", "Brevik")]
    (home / "facts.json").write_text(json.dumps(facts))
    return home


@pytest.mark.parametrize("command", ["--help", "compare --help", "report --help", "facts facts.json --output data"])
def test_what_needs_no_extra(home, command):
    finished = mm4ke_without(REPORT, *command.split(), cwd=home)
    assert finished.returncode == 0, finished.stderr


def test_deltas_need_no_extra(home, tmp_path):
    delta = tmp_path / "edit.delta.safetensors"
    for command in (["extract", home / "base", home / "edited", "-o", delta], ["show", delta]):
        finished = mm4ke_without(REPORT, "delta", *command)
        assert finished.returncode == 0, finished.stderr


def test_a_comparison_needs_no_extra(home, tmp_path):
    """But Jinja2, which torch brings: transformers reads chat templates with it."""
    models = ["--base", home / "base", "--rsft", home / "edited", "--merged", home / "edited"]
    places = ["--facts", home / "facts.json", "--output", tmp_path]
    finished = mm4ke_without(REPORT[:-1], "compare", *models, *places)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("report nowhere", "matplotlib"),
        ("report nowhere", "scipy"),
        ("report nowhere", "jinja2"),
        ("sweep --base base --edited edited --facts facts.json", "matplotlib"),
    ],
)
def test_what_needs_the_extra_says_so_before_any_work(home, command, module):
    finished = mm4ke_without([module], *command.split(), cwd=home)
    expected = f'mm4ke: error: mm4ke {command.split()[0]} needs {module}; pip install "mm4ke-plugins[report]"\n'
    assert (finished.returncode, finished.stdout, finished.stderr) == (1, "", expected)


def test_the_fluency_tasks_say_so_before_any_text_is_generated(monkeypatch):
    from mm4ke_plugins.errors import MM4KEError
    from mm4ke_plugins.knowedit.tasks.utils import documents

    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(
        MM4KEError, match=r'^knowedit_facts_fluency needs nltk; pip install "mm4ke-plugins\[report\]"$'
    ):
        documents("knowedit_facts", "fluency")
