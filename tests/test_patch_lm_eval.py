"""The patch for lm-eval applies to the installed version, and does what it promises without our import hook."""

import os
import shutil
import subprocess
from pathlib import Path

import lm_eval
import pytest
from conftest import ROOT, run_command
from lm_eval_helpers import results

PATCHES = sorted((ROOT / "third_party_patches" / "lm_eval").glob("*.patch"))
INSTALLED = Path(lm_eval.__file__).parent


@pytest.fixture
def patched(tmp_path) -> Path:
    """A folder for PYTHONPATH with a patched copy of the installed package, without the harness's own 14,000 files."""
    folder = tmp_path / "patched"

    def without_tasks(directory, names):
        own = (
            [name for name in names if Path(directory, name).is_dir()] if directory == str(INSTALLED / "tasks") else []
        )
        return [*own, "__pycache__"]

    shutil.copytree(INSTALLED, folder / "lm_eval", ignore=without_tasks)
    for patch in PATCHES:
        subprocess.run(["git", "apply", patch], cwd=folder, check=True)
    info = folder / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lm_eval.tasks]\nbroken = no_such_module:FOLDERS\n")
    return folder


def test_the_host_finds_tasks_and_model_by_its_own_entry_points(patched, lm_eval_models, tmp_path):
    run = run_command(
        "lm_eval", "run", "--tasks", "knowedit_facts_edit_success", "--model", "mm4ke",
        "--model_args", f"pretrained={lm_eval_models / 'out'},reference={lm_eval_models / 'base'}", "--device", "cpu",
        "--metadata", f"knowedit_file={ROOT / 'recipes/facts.json'}", "knowedit_limit=2",
        "--output_path", tmp_path / "eval", cwd=tmp_path, PYTHONPATH=str(patched), TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert "Could not load tasks broken from no_such_module:FOLDERS" in run.stderr
    scores = results(tmp_path / "eval")["results"]["knowedit_facts_edit_success"]
    assert {"token_acc,none", "reference_token_acc,none"} <= scores.keys()


def test_lm_eval_has_no_such_entry_points_yet():
    sources = [Path(folder, name) for folder in ("tasks", "models", "api") for name in os.listdir(INSTALLED / folder)]
    text = "".join((INSTALLED / path).read_text() for path in sources if path.suffix == ".py")
    assert "entry_points(" not in text, "lm-eval loads models or tasks from entry points now: delete its patch"
