"""The patches for mergekit apply to the installed version, and do what they promise without our import hook."""

import shutil
import subprocess
from pathlib import Path

import mergekit
import pytest
import torch
import yaml
from conftest import ROOT, run_command
from mergekit_helpers import expect, ffn, load, recipe
from tiny import FAMILIES, make_tiny_model

PATCHES = sorted((ROOT / "third_party_patches" / "mergekit").glob("*.patch"))
INSTALLED = Path(mergekit.__file__).parent
GROUP = "mergekit.merge_methods"


@pytest.fixture
def patched(tmp_path) -> Path:
    """A folder for PYTHONPATH with a patched copy of the installed package, and with packages that declare methods."""
    folder = tmp_path / "patched"
    shutil.copytree(INSTALLED, folder / "mergekit", ignore=shutil.ignore_patterns("__pycache__"))
    for patch in PATCHES:
        subprocess.run(["git", "apply", patch], cwd=folder, check=True)
    declare(folder, "broken", "broken = no_such_module:METHOD")
    return folder


def declare(folder: Path, name: str, entry: str) -> None:
    """What installing a package called `name` with one entry point leaves."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{entry}\n")


def test_the_host_finds_our_method_by_its_own_entry_points(patched, merge_models, tmp_path):
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe(merge_models)))
    environment = {"PYTHONPATH": str(patched), "MM4KE_PLUGINS": "none"}
    run = run_command("mergekit-yaml", "merge.yaml", "out", cwd=tmp_path, **environment)
    assert run.returncode == 0, run.stderr
    assert "Could not load merge method broken from no_such_module:METHOD" in run.stderr
    assert torch.equal(load(tmp_path / "out")[ffn()], expect(merge_models, ffn()))


def test_mergekit_has_no_such_entry_points_yet():
    sources = "".join(path.read_text() for path in INSTALLED.rglob("*.py"))
    assert "entry_points" not in sources, "mergekit loads merge methods from entry points now: delete its patch"


IMPORTS = """
import sys
import mergekit.scripts.run_yaml
slow = {"peft", "transformers.modeling_utils", "transformers.models.auto.modeling_auto"} & sys.modules.keys()
assert not slow, slow
from mergekit.common import get_auto_cls
print(get_auto_cls("BertForMaskedLM").__name__, get_auto_cls("LlamaForCausalLM").__name__)
"""


def test_a_merge_does_not_import_what_it_does_not_use(patched, tmp_path):
    run = run_command("python", "-c", IMPORTS, cwd=tmp_path, PYTHONPATH=str(patched), MM4KE_PLUGINS="none")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["AutoModelForMaskedLM", "AutoModelForCausalLM"]


def test_an_architecture_that_mergekit_has_to_infer(patched, tmp_path, monkeypatch):
    """It has no description of OPT, so here the classes are needed."""
    monkeypatch.setitem(FAMILIES, "opt", {})
    make_tiny_model(tmp_path / "base", "opt", ffn_dim=64, word_embed_proj_dim=32)
    content = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "base")}], "dtype": "float32"}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(content))
    environment = {"PYTHONPATH": str(patched), "MM4KE_PLUGINS": "none"}
    run = run_command("mergekit-yaml", "merge.yaml", "out", cwd=tmp_path, **environment)
    assert run.returncode == 0, run.stderr
    base, merged = load(tmp_path / "base"), load(tmp_path / "out")
    assert base and all(torch.equal(merged[name], tensor) for name, tensor in base.items())


def test_mergekit_still_imports_peft_at_once():
    source = (INSTALLED / "common.py").read_text()
    assert "\nimport peft\n" in source, "mergekit imports peft only where it is used now: delete its patch"
