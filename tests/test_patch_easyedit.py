"""The patches for EasyEdit apply to the clone, and what they mend is broken without them."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, run_command
from tiny import make_tiny_model

PATCHES = sorted((ROOT / "third_party_patches" / "easyedit").glob("*.patch"))
FT = ROOT / "recipes" / "easyedit" / "FT" / "smollm2-135m.yaml"
PROBE = Path(__file__).with_name("easyedit_probe.py")

pytestmark = pytest.mark.easyedit


def probe(folder: Path, clone: Path) -> dict:
    """What `clone` does without our import hook, in a process of its own (importing EasyEdit takes 10 to 30 s)."""
    model = make_tiny_model(folder / "test5" / "tiny-llama")
    record = {"subject": "Oz", "prompt": "Who rules Oz?", "target_new": "Tark", "rephrase_prompt": "Oz is ruled by"}
    (folder / "data.json").write_text(json.dumps([record | {"portability": {}, "locality": {}}]))
    # What installing a package with these two plugins leaves.
    info = folder / "plugins" / "plugins-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[easyeditor.plugins]\nmm4ke = mm4ke_plugins.activation:hook_easyedit\nbroken = no_such_module:register\n"
    )
    environment = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONPATH": str(folder / "plugins")}
    run = run_command("python", PROBE, clone, model, folder / "data.json", FT, cwd=folder, **environment)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1]) | {"log": run.stderr}


def test_the_patches_mend_what_they_say(clone, tmp_path):
    for part in ("easyeditor", "examples"):
        shutil.copytree(clone / part, tmp_path / "patched" / part, ignore=shutil.ignore_patterns("__pycache__"))
    for patch in PATCHES:
        subprocess.run(["git", "apply", patch], cwd=tmp_path / "patched", check=True)
    found = probe(tmp_path, tmp_path / "patched")
    assert found["rephrase_prompt"] == "Oz is ruled by"
    names = ["Edit_Succ:", "Generalization:", "Overall_portability:", "Overall_locality:", "Fluency:"]
    assert found["summary"][::2] == names
    assert found["summary"][1::2] == ["100.0", "50.0", "25.0", "75.0", "400.0"]
    for key in ("method_of_the_script", "sequential_editing"):
        assert found[key] == "FileNotFoundError: [Errno 2] No such file or directory: 'missing.yaml'"
    assert found["unknown_method"][0].endswith("--editing_method NONE: easyeditor has no NONEHyperParams")
    assert found["loaded_class"] == "LlamaForCausalLM"
    assert found["generated"] is True
    assert len(set(found["cache_names"])) == 2
    assert found["plugins"] == [True, True]
    assert "Could not load the plugin broken from no_such_module:register" in found["log"]


def test_the_patches_are_still_needed(clone, tmp_path):
    found = probe(tmp_path, clone)
    mended = "EasyEdit mended this by itself: delete the patch "
    assert found["rephrase_prompt"] == "KeyError: 'rephrase_prompt'", f"{mended}0001"
    assert found["summary"].startswith("TypeError: unsupported operand type(s) for +"), f"{mended}0002"
    assert found["method_of_the_script"].startswith("NotImplementedError"), f"{mended}0002"
    assert found["sequential_editing"].startswith("SystemExit"), f"{mended}0002"
    assert found["loaded_class"] != "LlamaForCausalLM", f"{mended}0003"
    assert found["generated"] is False, f"{mended}0004"
    assert len(found["cache_names"]) == 2 and len(set(found["cache_names"])) == 1, f"{mended}0005"
    assert found["plugins"] == [False, False], f"{mended}0006"
