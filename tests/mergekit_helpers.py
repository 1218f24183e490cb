"""Models to merge, recipes, and the real mergekit's run_merge in this process."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import mergekit.merge  # isort: skip  # after torch, which brings the plugin
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.merging.equations import merge

LAYER = 2


def load(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def save(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit(base: Path, folder: Path, seed: int = 1, dtype=torch.float32) -> Path:
    """What R-SFT leaves: one layer's FFN changed and stored in float32, all else as it was."""
    shutil.copytree(base, folder)
    tensors = load(folder)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if f"layers.{LAYER}.mlp" in name:
            tensors[name] = (tensor.float() + torch.randn(tensor.shape, generator=generator) * 0.01).to(dtype)
    save(tensors, folder)
    return folder


def recipe(folder: Path, edited: tuple[str, ...] = ("rsft",), **changes) -> dict:
    """A recipe that merges models in `folder`; `changes` replace its keys, or remove one that is None."""
    content = {
        "merge_method": "mm4ke",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in edited],
    } | changes
    return {key: value for key, value in content.items() if value is not None}


def run_merge(content: dict, out: Path, **options) -> dict[str, torch.Tensor]:
    source = yaml.safe_dump(content)
    config = MergeConfiguration.model_validate(yaml.safe_load(source))
    mergekit.merge.run_merge(config, str(out), MergeOptions(quiet=True, **options), source)
    return load(out)


def expect(folder: Path, name: str, edited=("rsft",), weights=(0.8,), densities=(0.8,), dtype=None) -> torch.Tensor:
    tensors = [load(folder / model)[name] for model in ("base", *edited)]
    return merge(tensors[0], tensors[1:], weights, densities, names=["base", *edited], dtype=dtype)


def ffn(layer: int = LAYER) -> str:
    return f"model.layers.{layer}.mlp.down_proj.weight"


def shard(folder: Path) -> list[Path]:
    """Store the model of a folder in three files, as large models are."""
    tensors = load(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for index in range(3):
        file = f"model-0000{index + 1}-of-00003.safetensors"
        part = {name: tensor for number, (name, tensor) in enumerate(tensors.items()) if number % 3 == index}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sorted(folder.glob("*.safetensors"))


def refuses(content: dict, message: str, tmp_path: Path, out: str = "out", **options) -> None:
    """The merge fails with one line that matches `message`, and leaves the folder as it was."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(MM4KEError, match=f"^{message}") as caught:
        run_merge(content, tmp_path / out, **options)
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
