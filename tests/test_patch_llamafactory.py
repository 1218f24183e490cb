"""The patches for LLaMA-Factory apply to the installed version, and do what they promise without our import hook."""

import shutil
import subprocess
from pathlib import Path

import llamafactory
import pytest
import torch
import yaml
from conftest import ROOT, run_command
from llamafactory_helpers import saved
from safetensors.torch import load_file

PATCHES = sorted((ROOT / "third_party_patches" / "llamafactory").glob("*.patch"))
INSTALLED = Path(llamafactory.__file__).parent


@pytest.fixture(scope="module")
def patched(tmp_path_factory) -> Path:
    """A folder for PYTHONPATH with a patched copy of the installed package."""
    folder = tmp_path_factory.mktemp("patched")
    shutil.copytree(INSTALLED, folder / "llamafactory", ignore=shutil.ignore_patterns("__pycache__"))
    for patch in PATCHES:
        subprocess.run(["git", "apply", "-p2", patch], cwd=folder, check=True)
    return folder


def run_patched(patched, recipe, tmp_path, **env):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = ("llamafactory-cli", "train", tmp_path / "recipe.yaml")
    return run_command(*command, PYTHONPATH=str(patched), TORCH_DEVICE_BACKEND_AUTOLOAD="0", **env)


def test_the_host_loads_us_by_its_own_entry_points(patched, rsft_recipe, tmp_path):
    run = run_patched(patched, rsft_recipe | {"num_train_epochs": 2}, tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert [entry["rsft_visits"] for entry in saved(rsft_recipe)[1]] == [3, 3]


def test_freeze_layer_ids_trains_exactly_these_layers(patched, rsft_recipe, tiny_llama, tmp_path):
    plain = {key: value for key, value in rsft_recipe.items() if not key.startswith("rsft")}
    plain |= {"freeze_layer_ids": "0,2", "freeze_trainable_modules": "mlp", "num_train_epochs": 1}
    run = run_patched(patched, plain, tmp_path, MM4KE_PLUGINS="none")
    assert run.returncode == 0, run.stderr[-2000:]
    before, after = (
        load_file(tiny_llama / "model.safetensors"),
        load_file(Path(plain["output_dir"]) / "model.safetensors"),
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.mlp.{part}_proj.weight" for i in (0, 2) for part in ("gate", "up", "down")}

    run = run_patched(patched, plain | {"freeze_layer_ids": 4, "output_dir": "never"}, tmp_path, MM4KE_PLUGINS="none")
    assert "`freeze_layer_ids` [4] out of range, choose from 0 to 3." in run.stderr


def test_the_patches_are_still_needed():
    sources = "".join(path.read_text() for path in INSTALLED.rglob("*.py"))
    assert "llamafactory.plugins" not in sources, "LLaMA-Factory loads plugins by itself now: delete patch 0001"
    assert "freeze_layer_ids" not in sources, "LLaMA-Factory trains arbitrary layers now: delete patch 0002"
