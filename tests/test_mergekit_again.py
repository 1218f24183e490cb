"""Merging, training again and merging again in one process: each merge reads the models as they are."""

import shutil
from pathlib import Path

import peft
import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.io.tasks import LoaderCache
from mergekit.scripts import multimerge
from mergekit_helpers import edit, expect, ffn, load, recipe, run_merge, save
from tiny import FAMILIES, make_tiny_model
from transformers import AutoModelForCausalLM

from mm4ke_plugins.delta.folders import extract
from mm4ke_plugins.errors import MM4KEError


@pytest.fixture
def home(merge_models, tmp_path) -> Path:
    for name in ("base", "rsft", "other"):
        shutil.copytree(merge_models / name, tmp_path / name)
    return tmp_path


def retrain(home: Path, name: str = "rsft", seed: int = 9) -> None:
    shutil.rmtree(home / name)
    edit(home / "base", home / name, seed=seed)


@pytest.mark.parametrize("options", [{}, {"safe_serialization": False}], ids=["streamed", "by mergekit"])
def test_an_edit_that_was_trained_again(home, options):
    content = recipe(home)
    for seed in (8, 9):
        retrain(home, seed=seed)
        run_merge(content, home / "out", **options)
        if options:
            merged = torch.load(home / "out" / "pytorch_model.bin")
        else:
            merged = load(home / "out")
        assert torch.equal(merged[ffn()], expect(home, ffn()))
        assert not LoaderCache.loaders, "nothing stays open"


def test_an_edit_that_was_overwritten_in_place(home):
    """The file that was open keeps its place: trainers write over it."""
    run_merge(recipe(home), home / "out")
    save(load(home / "other"), home / "rsft")
    assert torch.equal(run_merge(recipe(home), home / "out")[ffn()], expect(home, ffn(), ("other",)))


def test_a_base_that_changed(home):
    """Another model of other files: one of other sizes, in several files."""
    run_merge(recipe(home), home / "out")
    shutil.rmtree(home / "base")
    make_tiny_model(home / "base", dtype=torch.bfloat16, intermediate_size=96, layers=3)
    retrain(home)
    merged = run_merge(recipe(home), home / "out")
    assert merged.keys() == load(home / "base").keys()
    assert torch.equal(merged[ffn()], expect(home, ffn()))


def test_an_architecture_that_mergekit_infers(home, monkeypatch):
    """It remembers what it inferred by the models' paths."""
    monkeypatch.setitem(FAMILIES, "opt", {"ffn_dim": 64, "word_embed_proj_dim": 32})
    name = "model.decoder.layers.2.fc1.weight"
    for layers in (4, 3):
        for folder in ("base", "rsft"):
            shutil.rmtree(home / folder)
        make_tiny_model(home / "base", "opt", layers=layers)
        shutil.copytree(home / "base", home / "rsft")
        tensors = load(home / "base")
        save(tensors | {name: tensors[name] * 1.5}, home / "rsft")
        merged = run_merge(recipe(home), home / "out")
        assert merged.keys() == tensors.keys()
        assert torch.equal(merged[name], expect(home, name))


def test_deltas(home):
    """Of another base, too."""
    content = recipe(home, ("facts.delta",))
    for seed in (8, 9):
        shutil.rmtree(home / "base")
        make_tiny_model(home / "base", dtype=torch.bfloat16, seed=seed)
        retrain(home, seed=seed)
        extract(home / "base", home / "rsft", home / "facts.delta")
        assert torch.equal(run_merge(content, home / "out")[ffn()], expect(home, ffn()))


def test_a_merge_of_merges(home):
    """What one merge wrote another reads, also one of mergekit's own methods."""
    for method in ("mm4ke", "task_arithmetic"):
        for name in ("rsft", "other"):
            run_merge(recipe(home, (name,)), home / "first")
            merged = run_merge(recipe(home, ("first",), merge_method=method, parameters={"weight": 0.5}), home / "out")
            if method == "mm4ke":
                assert torch.equal(merged[ffn()], expect(home, ffn(), ("first",), (0.5,)))
            else:
                base, first = load(home / "base")[ffn()], load(home / "first")[ffn()]
                assert (merged[ffn()] - base - 0.5 * (first - base)).abs().max() < 0.002
            shutil.rmtree(home / "out")


def test_stages_of_one_command(home):
    first = {"name": "first"} | recipe(home)
    last = recipe(home, models=[{"model": "first"}], parameters={"weight": 1, "density": 1})
    (home / "merge.yaml").write_text(yaml.safe_dump_all([first, last]))
    command = [home / "merge.yaml", "--out-path", home / "out", "-I", home / "parts", "--no-lazy"]
    for seed in (8, 9):
        retrain(home, seed=seed)
        done = CliRunner().invoke(multimerge.main, list(map(str, command)))
        assert done.exit_code == 0, done.exception
        assert torch.equal(load(home / "out")[ffn()], expect(home, ffn()))


def test_a_failure_leaves_nothing_open(home):
    tensors = load(home / "rsft")
    broken = {name: tensor.clone() for name, tensor in tensors.items()}
    broken[ffn()][0, 0] = float("nan")
    save(broken, home / "rsft")
    for _ in range(2):
        with pytest.raises(MM4KEError, match="holds NaN"):
            run_merge(recipe(home), home / "out")
        assert not LoaderCache.loaders
    save(tensors, home / "rsft")
    assert torch.equal(run_merge(recipe(home), home / "out")[ffn()], expect(home, ffn()))
    with pytest.raises(MM4KEError, match="equals base_model"):
        run_merge(recipe(home, models=[{"model": f"{home}/base/."}]), home / "other-out")
    assert not LoaderCache.loaders


# ---- LoRAs, which mergekit keeps on disk ----


def train_lora(home: Path, seed: int) -> dict[str, torch.Tensor]:
    """What PEFT saves, and the model that it stands for."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    model.save_pretrained(home / "lora")
    return model.merge_and_unload().state_dict()


def test_a_lora_that_was_trained_again(home):
    cache = home / "cache"
    content = recipe(home, models=[{"model": f"{home}/base+{home}/lora"}], parameters={"weight": 1, "density": 1})
    options = {"lora_merge_cache": str(cache), "lora_merge_dtype": "float32"}
    for seed in (8, 9):
        wanted = train_lora(home, seed)
        for _ in range(2):
            merged = run_merge(content, home / "out", **options)
            torch.testing.assert_close(merged[ffn()], wanted[ffn()].bfloat16(), rtol=2**-7, atol=1e-3)
    (folder,) = cache.iterdir()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    run_merge(content, home / "out", **options)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before, "what did not change is not merged again"
    run_merge(content, home / "out", **options | {"lora_merge_dtype": "bfloat16"})
    assert load(folder)[ffn()].dtype == torch.bfloat16

    (folder / "notes.txt").touch()
    train_lora(home, 10)
    with pytest.raises(MM4KEError, match=f"models: {folder}: holds .* as it was, and notes.txt; move that away"):
        run_merge(content, home / "out", **options)
    assert (folder / "notes.txt").exists()


def test_a_lora_that_can_not_be_merged(home):
    """mergekit makes the folder first, and would take an empty one for the model."""
    train_lora(home, 8)
    weights = (home / "lora" / "adapter_model.safetensors").read_bytes()
    (home / "lora" / "adapter_model.safetensors").write_bytes(weights[:100])
    content = recipe(home, models=[{"model": f"{home}/base+{home}/lora"}])
    with pytest.raises(MM4KEError, match=r"models: .*/base\+.*/lora: a damaged file: "):
        run_merge(content, home / "out", lora_merge_cache=str(home / "cache"))
    assert not list((home / "cache").iterdir())
    (home / "lora" / "adapter_model.safetensors").write_bytes(weights)
    assert run_merge(content, home / "out", lora_merge_cache=str(home / "cache"))
