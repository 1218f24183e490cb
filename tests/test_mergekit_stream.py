"""A merge from file to file makes what mergekit's own executor makes, byte for byte."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run_command
from mergekit_helpers import edit, expect, ffn, load, recipe, refuses, run_merge, save, shard
from tiny import make_tiny_model

from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.hosts.mergekit import stream as mergekit_stream


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def assert_same_files(recipe: dict, tmp_path: Path, streamed: list[int], **options) -> dict[str, torch.Tensor]:
    """Merge with the streaming executor, then with mergekit's own. Both write a folder of one name, for the card."""
    merged = run_merge(recipe, tmp_path / "streamed" / "out", **options)
    assert streamed == [len(merged)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mergekit_stream, "plan", lambda *_: None)
        run_merge(recipe, tmp_path / "executed" / "out", **options)
    assert len(streamed) == 1
    found, expected = content(tmp_path / "streamed" / "out"), content(tmp_path / "executed" / "out")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    return merged


PARAMETERS = {
    "defaults": {},
    "numbers": {"weight": 0.5, "density": 0.2},
    "gradients": {"weight": [0.1, 1.0], "density": [0.2, 0.9, 0.3]},
    "filters": {"weight": [{"filter": "up_proj", "value": 0}, {"filter": "mlp", "value": [0.3, 0.9]}, {"value": 1}]},
    "nothing is added": {"weight": 0},
}


@pytest.mark.parametrize("parameters", PARAMETERS.values(), ids=PARAMETERS)
def test_parameters(merge_models, tmp_path, streamed_merges, parameters):
    """The edited FFN is float32, the base bfloat16 with tied embeddings."""
    merged = assert_same_files(recipe(merge_models, parameters=parameters), tmp_path, streamed_merges)
    assert torch.equal(merged[ffn()], load(merge_models / "base")[ffn()]) == (parameters == {"weight": 0})


def test_two_edited_models(merge_models, tmp_path, streamed_merges):
    entries = [
        {"model": str(merge_models / "rsft"), "parameters": {"weight": 0.5, "density": 0.3}},
        {"model": str(merge_models / "other"), "parameters": {"weight": -0.4}},
    ]
    merged = assert_same_files(recipe(merge_models, models=entries), tmp_path, streamed_merges)
    assert torch.equal(merged[ffn()], expect(merge_models, ffn(), ("rsft", "other"), (0.5, -0.4), (0.3, 0.8)))


@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtypes(merge_models, tmp_path, streamed_merges, key, name):
    assert_same_files(recipe(merge_models, **{key: name}), tmp_path, streamed_merges)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_in_one_dtype(tmp_path, streamed_merges, dtype):
    make_tiny_model(tmp_path / "base", dtype=dtype)
    edit(tmp_path / "base", tmp_path / "rsft", dtype=dtype)
    assert_same_files(recipe(tmp_path), tmp_path, streamed_merges)


def test_tensors_of_several_dtypes_and_vectors(merge_models, tmp_path, streamed_merges):
    """In the files the wider dtypes come first; a changed norm is kept whole."""
    for name in ("base", "rsft"):
        shutil.copytree(merge_models / name, tmp_path / name)
        tensors = load(tmp_path / name)
        tensors |= {key: tensor.float() for key, tensor in tensors.items() if "layers.0." in key}
        if name == "rsft":
            tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
        save(tensors, tmp_path / name)
    merged = assert_same_files(recipe(tmp_path), tmp_path, streamed_merges, out_shard_size=50_000)
    assert not torch.equal(merged["model.norm.weight"], load(tmp_path / "base")["model.norm.weight"])
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("sharded", [["base"], ["rsft"], ["base", "rsft"]])
@pytest.mark.parametrize("size", [20_000, 5_000_000_000])
def test_files(merge_models, tmp_path, streamed_merges, sharded, size):
    for name in ("base", "rsft"):
        shutil.copytree(merge_models / name, tmp_path / name)
        if name in sharded:
            shard(tmp_path / name)
    assert_same_files(recipe(tmp_path), tmp_path, streamed_merges, out_shard_size=size)
    written = list((tmp_path / "streamed" / "out").glob("*.safetensors"))
    assert (len(written) > 2) == (size == 20_000)


def test_writing_in_threads(merge_models, tmp_path, streamed_merges):
    assert_same_files(
        recipe(merge_models), tmp_path, streamed_merges, out_shard_size=20_000, async_write=True, write_threads=3
    )


def test_an_output_head_that_only_the_base_stores(tmp_path, streamed_merges):
    make_tiny_model(tmp_path / "base", tie_word_embeddings=False)
    edit(tmp_path / "base", tmp_path / "rsft")
    tensors = load(tmp_path / "rsft")
    del tensors["lm_head.weight"]
    save(tensors, tmp_path / "rsft")
    config = json.loads((tmp_path / "rsft" / "config.json").read_text())
    (tmp_path / "rsft" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    merged = run_merge(recipe(tmp_path), tmp_path / "out")
    assert torch.equal(merged[ffn()], expect(tmp_path, ffn()))


def test_layers_in_another_order(merge_models, tmp_path, streamed_merges):
    """`slices`: tensors get other names, and some are used twice."""
    slices = [
        {"sources": [{"model": str(merge_models / name), "layer_range": layers} for name in ("base", "rsft")]}
        for layers in ([2, 4], [0, 3])
    ]
    merged = assert_same_files(recipe(merge_models, models=None, slices=slices), tmp_path, streamed_merges)
    assert torch.equal(merged[ffn(0)], merged[ffn(4)])
    assert torch.equal(merged[ffn(0)], expect(merge_models, ffn()))
    assert torch.equal(merged[ffn(2)], load(merge_models / "base")[ffn(0)])


def test_a_change_of_one_entry_is_found(merge_models, tmp_path, streamed_merges):
    """The last one of the last tensor: neither checking nor copying may overlook it."""
    shutil.copytree(merge_models / "base", tmp_path / "base")
    shutil.copytree(merge_models / "base", tmp_path / "rsft")
    tensors = load(tmp_path / "rsft")
    name = max(tensors)
    tensors[name].view(-1)[-1] += 1
    save(tensors, tmp_path / "rsft")
    merged = assert_same_files(recipe(tmp_path, parameters={"weight": 1}), tmp_path, streamed_merges)
    assert torch.equal(merged[name], tensors[name])


# What is left to mergekit's executor


def test_another_vocabulary(merge_models, tmp_path, streamed_merges):
    merged = run_merge(recipe(merge_models, tokenizer={"source": "base"}), tmp_path / "out")
    assert not streamed_merges
    assert torch.equal(merged[ffn()], expect(merge_models, ffn()))


@pytest.mark.parametrize("pickled", ["base", "rsft"])
def test_pickled_files(merge_models, tmp_path, streamed_merges, pickled):
    for name in ("base", "rsft"):
        shutil.copytree(merge_models / name, tmp_path / name)
    torch.save(load(tmp_path / pickled), tmp_path / pickled / "pytorch_model.bin")
    (tmp_path / pickled / "model.safetensors").unlink()
    merged = run_merge(recipe(tmp_path), tmp_path / "out")
    assert not streamed_merges
    assert torch.equal(merged[ffn()], expect(merge_models, ffn()))


def test_pickled_result(merge_models, tmp_path, streamed_merges):
    run_merge(recipe(merge_models), tmp_path / "out", safe_serialization=False)
    assert not streamed_merges
    assert torch.equal(torch.load(tmp_path / "out" / "pytorch_model.bin")[ffn()], expect(merge_models, ffn()))


def test_other_methods(merge_models, tmp_path, streamed_merges):
    run_merge(recipe(merge_models, merge_method="task_arithmetic", parameters={"weight": 1}), tmp_path / "out")
    assert not streamed_merges


# Failures, memory


def test_not_a_number_that_both_models_have(merge_models, tmp_path):
    for name in ("base", "rsft"):
        shutil.copytree(merge_models / name, tmp_path / name)
        tensors = load(tmp_path / name)
        tensors["model.layers.0.mlp.up_proj.weight"][1, 2] = float("nan")
        save(tensors, tmp_path / name)
    message = rf"{tmp_path}/base: model\.layers\.0\.mlp\.up_proj\.weight: holds NaN"
    refuses(recipe(tmp_path), message, tmp_path)


def test_a_full_disk_leaves_nothing(merge_models, tmp_path, streamed_merges):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(MM4KEError, match="^.*/out: can't be written: File too large; give another place"):
            run_merge(recipe(merge_models), tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert streamed_merges and not list(tmp_path.iterdir())


PEAK = """
import resource, sys
from mergekit.scripts.run_yaml import main

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

before = peak()
main(standalone_mode=False)
print(peak() - before)
"""


def test_memory(tmp_path):
    """Of two models of 77 MB nothing is in memory, mapped files included, but the tensors of one FFN, one after the
    other, each of which is 8 MB in float32."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "layers": 4}
    make_tiny_model(tmp_path / "base", dtype=torch.bfloat16, **sizes)
    edit(tmp_path / "base", tmp_path / "rsft")
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe(tmp_path)))
    (tmp_path / "peak.py").write_text(PEAK)
    run = run_command("python", "peak.py", "merge.yaml", "out", "--quiet", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    size = (tmp_path / "base" / "model.safetensors").stat().st_size / 1e6
    assert size > 60
    assert float(run.stdout.splitlines()[-1]) < size
    assert torch.equal(load(tmp_path / "out")[ffn()], expect(tmp_path, ffn()))
