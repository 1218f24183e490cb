"""`merge_method: mm4ke` in the real mergekit: its command where the command matters, else its run_merge in process."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, run_command
from mergekit.config import MergeConfiguration
from mergekit_helpers import LAYER, edit, expect, ffn, load, recipe, refuses, run_merge, save, shard
from paper import assert_within_one_rounding
from tiny import FAMILIES, make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mm4ke_plugins.hosts import MERGEKIT
from mm4ke_plugins.hosts.mergekit import adapter
from mm4ke_plugins.hosts.mergekit.recipe import check_recipe

# What a merge makes


def test_command(merge_models, tmp_path):
    """`mergekit-yaml recipe out/`: the folder is a complete model, and an earlier result is replaced."""
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe(merge_models)))
    out = tmp_path / "merged-model"
    out.mkdir()
    (out / "mergekit_config.yml").touch()
    (out / "model-00001-of-00002.safetensors").touch()

    done = run_command("mergekit-yaml", "merge.yaml", "merged-model/", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merge.yaml", "merged-model"]
    assert not (out / "model-00001-of-00002.safetensors").exists()

    base, rsft, merged = load(merge_models / "base"), load(merge_models / "rsft"), load(out)
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        assert tensor.dtype == torch.bfloat16
        if f"layers.{LAYER}.mlp" in name:
            assert not torch.equal(tensor, base[name])
            assert_within_one_rounding(tensor, base[name], [rsft[name]], [0.8], [0.8])
        else:
            assert torch.equal(tensor, base[name])

    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**prompt, max_new_tokens=3).shape[1] > prompt["input_ids"].shape[1]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (merge_models / "base" / name).read_bytes()

    card = (out / "README.md").read_text()
    assert "# merged-model\n" in card
    assert "[MM4KE (Model Merging for Knowledge Editing)](https://arxiv.org/abs/2506.12384) merge method" in card
    assert str(merge_models / "rsft") in card


# mergekit 0.1.5 describes Gemma with tied and Phi-3 with untied embeddings only.
@pytest.mark.parametrize(
    "family, tied",
    [*((name, False) for name in FAMILIES if name != "gemma"), *((name, True) for name in FAMILIES if name != "phi3")],
)
def test_families(family, tied, tmp_path):
    make_tiny_model(tmp_path / "base", family, dtype=torch.bfloat16, tie_word_embeddings=tied)
    edit(tmp_path / "base", tmp_path / "rsft")
    merged = run_merge(recipe(tmp_path), tmp_path / "out")
    base = load(tmp_path / "base")
    assert merged.keys() == base.keys()
    changed = [name for name in base if not torch.equal(merged[name], base[name])]
    assert changed == [name for name in base if f"layers.{LAYER}.mlp" in name]
    for name in changed:
        assert torch.equal(merged[name], expect(tmp_path, name))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_equals_breadcrumbs_without_gamma(tmp_path):
    """mergekit's own method does the same maths where there are no ties and density * numel is a whole number."""
    make_tiny_model(tmp_path / "base")
    edit(tmp_path / "base", tmp_path / "rsft")
    parameters = {"weight": 0.8, "density": 0.25}
    ours = run_merge(recipe(tmp_path, parameters=parameters), tmp_path / "ours")
    stock = recipe(tmp_path, merge_method="breadcrumbs", parameters=parameters | {"gamma": 0})
    theirs = run_merge(stock, tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)
    assert not torch.equal(ours[ffn()], load(tmp_path / "base")[ffn()])


def test_sharded_models(merge_models, tmp_path):
    shutil.copytree(merge_models / "rsft", tmp_path / "rsft")
    shard(tmp_path / "rsft")
    content = recipe(merge_models, models=[{"model": str(tmp_path / "rsft")}])
    merged = run_merge(content, tmp_path / "out", out_shard_size=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert torch.equal(merged[ffn()], expect(merge_models, ffn()))


# Parameters and dtypes


def test_defaults_are_those_of_the_paper(merge_models, tmp_path):
    merged = run_merge(recipe(merge_models), tmp_path / "out")
    assert torch.equal(merged[ffn()], expect(merge_models, ffn(), weights=[0.8], densities=[0.8]))


def test_parameters_per_model_and_deltas_add_up(merge_models, tmp_path):
    entries = [
        {"model": str(merge_models / "rsft"), "parameters": {"weight": 0.5, "density": 0.3}},
        {"model": str(merge_models / "other"), "parameters": {"weight": -0.4}},
    ]
    content = recipe(merge_models, models=entries, parameters={"density": 0.6})
    merged = run_merge(content, tmp_path / "out")
    assert torch.equal(merged[ffn()], expect(merge_models, ffn(), ("rsft", "other"), (0.5, -0.4), (0.3, 0.6)))


def test_gradients_and_filters(merge_models, tmp_path):
    """A gradient goes over the layers; a filter picks tensors; a tensor that no filter matches has the default."""
    tensors = load(merge_models / "base")
    for name, tensor in tensors.items():
        if ".mlp." in name:
            tensors[name] = tensor.float() + 0.01 * torch.randn(tensor.shape)
    shutil.copytree(merge_models / "base", tmp_path / "base")
    shutil.copytree(merge_models / "base", tmp_path / "rsft")
    save(tensors, tmp_path / "rsft")

    weight = [{"filter": "up_proj", "value": 0}, {"filter": "mlp", "value": [0.3, 0.9]}]
    merged = run_merge(
        recipe(tmp_path, parameters={"weight": weight, "density": {"filter": "down_proj", "value": 0.5}}),
        tmp_path / "out",
    )
    base = load(tmp_path / "base")
    for layer, value in enumerate([0.3, 0.5, 0.7, 0.9]):
        prefix = f"model.layers.{layer}.mlp."
        assert torch.equal(merged[f"{prefix}up_proj.weight"], base[f"{prefix}up_proj.weight"])
        for name, density in ((f"{prefix}gate_proj.weight", 0.8), (f"{prefix}down_proj.weight", 0.5)):
            expected = expect(tmp_path, name, weights=[value], densities=[density])
            torch.testing.assert_close(merged[name], expected, rtol=2**-8, atol=0)  # the gradient's own rounding
            assert (merged[name] != base[name]).float().mean() < density + 0.01


@pytest.mark.parametrize(
    "key, name", [("dtype", "bfloat16"), ("out_dtype", "bfloat16"), ("dtype", "float32"), ("out_dtype", "float32")]
)
def test_dtype_is_that_of_the_result_and_not_of_the_inputs(merge_models, tmp_path, key, name):
    """mergekit would cast the edited tensor to bfloat16 before its delta is taken."""
    merged = run_merge(recipe(merge_models, **{key: name}), tmp_path / "out")
    dtype = getattr(torch, name)
    assert all(tensor.dtype == dtype for tensor in merged.values())
    assert torch.equal(merged[ffn()], expect(merge_models, ffn(), dtype=dtype))
    assert torch.equal(merged[ffn(0)], load(merge_models / "base")[ffn(0)].to(dtype))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name


def test_each_tensor_keeps_the_dtype_it_has_in_the_base(merge_models, tmp_path):
    for name in ("base", "rsft"):
        shutil.copytree(merge_models / name, tmp_path / name)
        tensors = load(tmp_path / name)
        save(tensors | {"model.norm.weight": tensors["model.norm.weight"].float()}, tmp_path / name)
    merged = run_merge(recipe(tmp_path), tmp_path / "out")
    assert merged["model.norm.weight"].dtype == torch.float32
    assert merged[ffn()].dtype == torch.bfloat16


# Bad input: one line, and nothing left behind


BAD_RECIPES = {
    "misspelt parameter": ({"parameters": {"wieght": 0.5}}, "parameters.wieght: unknown; mm4ke has: weight, density"),
    "another method's parameter": ({"parameters": {"gamma": 0}}, "parameters.gamma: unknown"),
    "weight too large": ({"parameters": {"weight": 80}}, "parameters.weight: 80: Input should be less than or equal"),
    "weight NaN": ({"parameters": {"weight": float("nan")}}, "parameters.weight: nan: Input should be a finite"),
    "weight infinite": ({"parameters": {"weight": float("-inf")}}, "parameters.weight: -inf: Input should be a"),
    "weight no number": ({"parameters": {"weight": "much"}}, "parameters.weight: much: Input should be a valid"),
    "density 0": ({"parameters": {"density": 0}}, "parameters.density: 0: Input should be greater than 0"),
    "density above 1": ({"parameters": {"density": 20}}, "parameters.density: 20: Input should be less than or equal"),
    "in a gradient": ({"parameters": {"density": [0.1, 1.5]}}, r"parameters.density\[1\]: 1.5: Input should be less"),
    "in a filter": (
        {"parameters": {"weight": [{"filter": "mlp", "value": 11}, {"value": 0}]}},
        r"parameters.weight\[0\].value: 11: Input",
    ),
    "misspelt filter": (
        {"parameters": {"weight": [{"filtre": "mlp", "value": 1}]}},
        r"parameters.weight\[0\].filtre: unknown key; there are: value, filter",
    ),
    "parameter outside parameters": ({"weight": 0.5}, "weight: 0.5: mergekit would ignore it here; write it under"),
    "unknown key": ({"out_dtpye": "float32"}, "out_dtpye: unknown key; there are: .*out_dtype"),
    "unknown dtype": ({"dtype": "bf16"}, "dtype: bf16: give bfloat16, float16 or float32"),
    "no base": ({"base_model": None}, "base_model: missing"),
}


@pytest.mark.parametrize("changes, message", BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_bad_recipe(merge_models, tmp_path, changes, message):
    refuses(recipe(merge_models, **changes), f"merge recipe: {message}", tmp_path)


def test_bad_parameters_of_one_model(merge_models, tmp_path):
    entries = [{"model": str(merge_models / "rsft"), "parameters": {"density": 2}}]
    refuses(recipe(merge_models, models=entries), r"merge recipe: models\[0\].parameters.density: 2: ", tmp_path)
    entries = [{"model": str(merge_models / "rsft"), "density": 0.2}]
    message = r"merge recipe: models\[0\].density: 0.2: .* write it under models\[0\].parameters"
    refuses(recipe(merge_models, models=entries), message, tmp_path)


def test_nothing_but_the_base(merge_models, tmp_path):
    refuses(recipe(merge_models, ("base",)), "merge recipe: models: nothing but the base_model", tmp_path)


@pytest.mark.parametrize("key", ["base_model", "models"])
@pytest.mark.parametrize("kind", ["missing", "empty", "no weights", "no such hub id"])
def test_missing_model(merge_models, tmp_path, key, kind):
    folder = tmp_path / "model"
    if kind != "missing":
        folder.mkdir()
    if kind == "no weights":
        shutil.copy(merge_models / "base" / "config.json", folder)
    path = "no-such-organisation/no-such-model" if kind == "no such hub id" else str(folder)
    changes = {"base_model": path} if key == "base_model" else {"models": [{"model": path}]}
    reason = "no such folder; give a model's folder or a hub id" if kind == "missing" else ""
    refuses(recipe(merge_models, **changes), f"merge recipe: {key}: {path}: {reason}", tmp_path)


def test_a_folder_that_looks_like_a_hub_id(merge_models, tmp_path, monkeypatch):
    """mergekit's model card would ask the hub after the merge, and offline lose the result."""
    monkeypatch.chdir(merge_models)
    content = recipe(merge_models, base_model="base", models=[{"model": "./rsft"}])
    refuses(content, r"merge recipe: base_model: base: .*; write \./base", tmp_path)
    run_merge(content, tmp_path / "without-card", write_model_card=False)
    run_merge(content | {"base_model": "./base"}, tmp_path / "with-card")


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_damaged_file(merge_models, tmp_path, damage):
    shutil.copytree(merge_models / "rsft", tmp_path / "rsft")
    file = tmp_path / "rsft" / "model.safetensors"
    damage_file(file, damage)
    refuses(recipe(merge_models, models=[{"model": str(tmp_path / "rsft")}]), f"{file}: damaged: ", tmp_path)


def damage_file(file: Path, damage: str) -> None:
    content = file.read_bytes()
    file.write_bytes({"truncated": content[:-100], "header": b"\xff" * 8 + content[8:], "empty": b""}[damage])


@pytest.mark.parametrize("damage", ["truncated", "header", "missing", "another's"])
def test_damaged_shard(merge_models, tmp_path, damage):
    shutil.copytree(merge_models / "rsft", tmp_path / "rsft")
    first, second, _ = shard(tmp_path / "rsft")
    if damage == "missing":
        second.unlink()
    elif damage == "another's":
        shutil.copy(first, second)
    else:
        damage_file(second, damage)
    refuses(recipe(merge_models, models=[{"model": str(tmp_path / "rsft")}]), f"{second}: damaged: ", tmp_path)


def test_models_of_different_depth(merge_models, tmp_path):
    make_tiny_model(tmp_path / "rsft", layers=3)
    content = recipe(merge_models, models=[{"model": str(tmp_path / "rsft")}])
    refuses(content, "merge recipe: models: .*: num_hidden_layers is 3, in base_model .* 4;", tmp_path)


def test_models_of_different_shapes(merge_models, tmp_path):
    make_tiny_model(tmp_path / "rsft", head_dim=16)
    content = recipe(merge_models, models=[{"model": str(tmp_path / "rsft")}])
    message = r"merge recipe: models: .*: model.layers.\d.self_attn.\w+.weight has the shape .*, in base_model .* \["
    refuses(content, message, tmp_path)


def test_models_of_different_architectures(merge_models, tmp_path):
    make_tiny_model(tmp_path / "rsft", "qwen2")
    content = recipe(merge_models, models=[{"model": str(tmp_path / "rsft")}])
    refuses(content, "merge recipe: models: .*: architectures is .*Qwen2ForCausalLM.*, in base_model ", tmp_path)


def test_models_of_different_vocabulary_size(merge_models, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(merge_models / "rsft")
    model.resize_token_embeddings(272)
    model.save_pretrained(tmp_path / "rsft")
    content = recipe(merge_models, models=[{"model": str(tmp_path / "rsft")}])
    refuses(content, "merge recipe: models: .*: vocab_size is 272, in base_model .* 264", tmp_path)


def test_models_of_different_vocabularies(merge_models, tmp_path):
    shutil.copytree(merge_models / "rsft", tmp_path / "rsft")
    file = tmp_path / "rsft" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    content = recipe(merge_models, models=[{"model": str(tmp_path / "rsft")}])
    refuses(content, "merge recipe: models: .*: 2 tokens have another id than in base_model .*, such as 'a'", tmp_path)


def test_tensors_that_mergekit_would_drop(tmp_path):
    make_tiny_model(tmp_path / "base", "gemma", tie_word_embeddings=False)
    edit(tmp_path / "base", tmp_path / "rsft")
    message = "merge recipe: base_model: .*: mergekit does not know 1 of its tensors, such as lm_head.weight"
    refuses(recipe(tmp_path), message, tmp_path)


def test_edited_model_equals_base(merge_models, tmp_path):
    shutil.copytree(merge_models / "base", tmp_path / "rsft")
    save({name: tensor.float() for name, tensor in load(tmp_path / "rsft").items()}, tmp_path / "rsft")
    content = recipe(merge_models, models=[{"model": str(tmp_path / "rsft")}])
    message = "merge recipe: models: .*/rsft: equals base_model .*/base, so there is nothing to merge; did training"
    refuses(content, message, tmp_path)


@pytest.mark.parametrize("place", ["base", "rsft"])
def test_not_a_number(merge_models, tmp_path, place):
    """Found in the middle of the merge, when files have been written aside."""
    for name in ("base", "rsft"):
        shutil.copytree(merge_models / name, tmp_path / name)
    tensors = load(tmp_path / place)
    tensors["model.layers.3.mlp.up_proj.weight"][1, 2] = float("nan")
    save(tensors, tmp_path / place)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mergekit_config.yml").write_text("an earlier result")
    message = rf"{tmp_path / place}: model\.layers\.3\.mlp\.up_proj\.weight: holds NaN"
    refuses(recipe(tmp_path), message, tmp_path, out_shard_size=10_000)


def test_command_fails_in_one_line(merge_models, tmp_path):
    shutil.copytree(merge_models / "rsft", tmp_path / "rsft")
    tensors = load(tmp_path / "rsft")
    tensors[ffn()][0, 0] = float("inf")
    save(tensors, tmp_path / "rsft")
    content = recipe(merge_models, models=[{"model": "./rsft"}])
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(content))
    done = run_command("mergekit-yaml", "--quiet", "merge.yaml", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"mm4ke: error: ./rsft: {ffn()}: holds an infinite number")
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merge.yaml", "rsft"]


def test_unsupported_version(merge_models, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter, "MERGEKIT", dataclasses.replace(MERGEKIT, supported="<0.1.5"))
    refuses(recipe(merge_models), r"merge_method: mm4ke needs mergekit<0\.1\.5, found 0\.1\.", tmp_path)


# The output folder


def test_output_is_not_an_earlier_result(merge_models, tmp_path):
    (tmp_path / "file").touch()
    refuses(recipe(merge_models), f"{tmp_path}: exists and is no earlier result of mergekit", tmp_path, out=".")
    refuses(recipe(merge_models), f"{tmp_path}/file: exists and is no earlier result", tmp_path, out="file")


def test_output_is_an_input(merge_models, tmp_path):
    shutil.copytree(merge_models / "base", tmp_path / "base")
    (tmp_path / "base" / "mergekit_config.yml").touch()
    content = recipe(merge_models, base_model=str(tmp_path / "base"))
    refuses(content, f"{tmp_path}/base: is one of the models to merge", tmp_path, out="base")


def test_output_is_an_empty_folder_or_one_to_be_made(merge_models, tmp_path):
    (tmp_path / "empty").mkdir()
    assert run_merge(recipe(merge_models), tmp_path / "empty")
    assert run_merge(recipe(merge_models), tmp_path / "new" / "folder")


def test_an_interrupted_merge_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), adapter.replaced_folder(tmp_path / "out") as folder:
        folder.mkdir()
        (folder / "model.safetensors").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_an_earlier_result_survives_a_failed_renaming(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError), adapter.replaced_folder(tmp_path / "out"):
        pass  # nothing was written, so nothing can be renamed
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["out", "model.safetensors"]


# Other recipes, other ways to import mergekit


def test_other_methods_are_left_alone(merge_models, tmp_path):
    """They take unknown parameters and write into a folder that has other files, as without the plugin."""
    (tmp_path / "notes.txt").touch()
    stock = recipe(merge_models, merge_method="task_arithmetic", parameters={"weight": 1, "wieght": 2})
    merged = run_merge(stock, tmp_path)
    assert merged[ffn()].dtype == torch.float32
    assert (tmp_path / "notes.txt").exists()


def test_mergekit_imported_before_torch(merge_models, tmp_path):
    """mergekit.merge is half-imported when PyTorch calls us; the method still is there and checks its tensors."""
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe(merge_models)))
    (tmp_path / "program.py").write_text(
        "import mergekit.merge, sys, yaml, warnings\n"
        "from mergekit.config import MergeConfiguration\n"
        "config = MergeConfiguration.model_validate(yaml.safe_load(open('merge.yaml')))\n"
        "mergekit.merge.run_merge(config, 'out', mergekit.merge.MergeOptions(quiet=True))\n"
    )
    done = run_command("python", "-W", "error::UserWarning:mm4ke_plugins", "program.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load(tmp_path / "out")[ffn()], expect(merge_models, ffn()))


@pytest.mark.parametrize("name", sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("recipes/**/merge.yaml")))
def test_recipe_files(name):
    source = (ROOT / name).read_text()
    config = MergeConfiguration.model_validate(yaml.safe_load(source))
    assert config.merge_method == adapter.METHOD.spec.name
    check_recipe(config, source, adapter.METHOD.spec)
    for model in config.referenced_models():
        path = str(model)
        assert path.startswith("./") or path == str(config.base_model)
    assert f"mergekit-yaml {name} out" in source
