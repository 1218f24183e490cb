"""`merge_method: mm4ke` in the real mergekit: its command where the command matters, else its run_merge in process."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, run_command
from safetensors.torch import load_file, save_file
from test_delta import assert_within_one_rounding
from tiny import FAMILIES, make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import mergekit.merge  # isort: skip  # after torch, which brings the plugin
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.hosts import MERGEKIT
from mm4ke_plugins.hosts.mergekit import adapter
from mm4ke_plugins.hosts.mergekit.recipe import check_recipe
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


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with a bfloat16 `base` whose embeddings are tied, and two edits of it, `rsft` and `other`."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny_model(folder / "base", dtype=torch.bfloat16, tie_word_embeddings=True)
    edit(folder / "base", folder / "rsft")
    edit(folder / "base", folder / "other", seed=2)
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


# What a merge makes


def test_command(models, tmp_path):
    """`mergekit-yaml recipe out/`: the folder is a complete model, and an earlier result is replaced."""
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe(models)))
    out = tmp_path / "merged-model"
    out.mkdir()
    (out / "mergekit_config.yml").touch()
    (out / "model-00001-of-00002.safetensors").touch()

    done = run_command("mergekit-yaml", "merge.yaml", "merged-model/", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merge.yaml", "merged-model"]
    assert not (out / "model-00001-of-00002.safetensors").exists()

    base, rsft, merged = load(models / "base"), load(models / "rsft"), load(out)
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
        assert (out / name).read_bytes() == (models / "base" / name).read_bytes()

    card = (out / "README.md").read_text()
    assert "# merged-model\n" in card
    assert "[MM4KE (Model Merging for Knowledge Editing)](https://arxiv.org/abs/2506.12384) merge method" in card
    assert str(models / "rsft") in card


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


def test_sharded_models(models, tmp_path):
    shutil.copytree(models / "rsft", tmp_path / "rsft")
    shard(tmp_path / "rsft")
    content = recipe(models, models=[{"model": str(tmp_path / "rsft")}])
    merged = run_merge(content, tmp_path / "out", out_shard_size=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert torch.equal(merged[ffn()], expect(models, ffn()))


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


# Parameters and dtypes


def test_defaults_are_those_of_the_paper(models, tmp_path):
    merged = run_merge(recipe(models), tmp_path / "out")
    assert torch.equal(merged[ffn()], expect(models, ffn(), weights=[0.8], densities=[0.8]))


def test_parameters_per_model_and_deltas_add_up(models, tmp_path):
    entries = [
        {"model": str(models / "rsft"), "parameters": {"weight": 0.5, "density": 0.3}},
        {"model": str(models / "other"), "parameters": {"weight": -0.4}},
    ]
    content = recipe(models, models=entries, parameters={"density": 0.6})
    merged = run_merge(content, tmp_path / "out")
    assert torch.equal(merged[ffn()], expect(models, ffn(), ("rsft", "other"), (0.5, -0.4), (0.3, 0.6)))


def test_gradients_and_filters(models, tmp_path):
    """A gradient goes over the layers; a filter picks tensors; a tensor that no filter matches has the default."""
    tensors = load(models / "base")
    for name, tensor in tensors.items():
        if ".mlp." in name:
            tensors[name] = tensor.float() + 0.01 * torch.randn(tensor.shape)
    shutil.copytree(models / "base", tmp_path / "base")
    shutil.copytree(models / "base", tmp_path / "rsft")
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
def test_dtype_is_that_of_the_result_and_not_of_the_inputs(models, tmp_path, key, name):
    """mergekit would cast the edited tensor to bfloat16 before its delta is taken."""
    merged = run_merge(recipe(models, **{key: name}), tmp_path / "out")
    dtype = getattr(torch, name)
    assert all(tensor.dtype == dtype for tensor in merged.values())
    assert torch.equal(merged[ffn()], expect(models, ffn(), dtype=dtype))
    assert torch.equal(merged[ffn(0)], load(models / "base")[ffn(0)].to(dtype))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name


def test_each_tensor_keeps_the_dtype_it_has_in_the_base(models, tmp_path):
    for name in ("base", "rsft"):
        shutil.copytree(models / name, tmp_path / name)
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
def test_bad_recipe(models, tmp_path, changes, message):
    refuses(recipe(models, **changes), f"merge recipe: {message}", tmp_path)


def refuses(content: dict, message: str, tmp_path: Path, out: str = "out", **options) -> None:
    """The merge fails with one line that matches `message`, and leaves the folder as it was."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(MM4KEError, match=f"^{message}") as caught:
        run_merge(content, tmp_path / out, **options)
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_bad_parameters_of_one_model(models, tmp_path):
    entries = [{"model": str(models / "rsft"), "parameters": {"density": 2}}]
    refuses(recipe(models, models=entries), r"merge recipe: models\[0\].parameters.density: 2: ", tmp_path)
    entries = [{"model": str(models / "rsft"), "density": 0.2}]
    message = r"merge recipe: models\[0\].density: 0.2: .* write it under models\[0\].parameters"
    refuses(recipe(models, models=entries), message, tmp_path)


def test_nothing_but_the_base(models, tmp_path):
    refuses(recipe(models, ("base",)), "merge recipe: models: nothing but the base_model", tmp_path)


@pytest.mark.parametrize("key", ["base_model", "models"])
@pytest.mark.parametrize("kind", ["missing", "empty", "no weights", "no such hub id"])
def test_missing_model(models, tmp_path, key, kind):
    folder = tmp_path / "model"
    if kind != "missing":
        folder.mkdir()
    if kind == "no weights":
        shutil.copy(models / "base" / "config.json", folder)
    path = "no-such-organisation/no-such-model" if kind == "no such hub id" else str(folder)
    changes = {"base_model": path} if key == "base_model" else {"models": [{"model": path}]}
    reason = "no such folder; give a model's folder or a hub id" if kind == "missing" else ""
    refuses(recipe(models, **changes), f"merge recipe: {key}: {path}: {reason}", tmp_path)


def test_a_folder_that_looks_like_a_hub_id(models, tmp_path, monkeypatch):
    """mergekit's model card would ask the hub after the merge, and offline lose the result."""
    monkeypatch.chdir(models)
    content = recipe(models, base_model="base", models=[{"model": "./rsft"}])
    refuses(content, r"merge recipe: base_model: base: .*; write \./base", tmp_path)
    run_merge(content, tmp_path / "without-card", write_model_card=False)
    run_merge(content | {"base_model": "./base"}, tmp_path / "with-card")


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_damaged_file(models, tmp_path, damage):
    shutil.copytree(models / "rsft", tmp_path / "rsft")
    file = tmp_path / "rsft" / "model.safetensors"
    damage_file(file, damage)
    refuses(recipe(models, models=[{"model": str(tmp_path / "rsft")}]), f"{file}: damaged: ", tmp_path)


def damage_file(file: Path, damage: str) -> None:
    content = file.read_bytes()
    file.write_bytes({"truncated": content[:-100], "header": b"\xff" * 8 + content[8:], "empty": b""}[damage])


@pytest.mark.parametrize("damage", ["truncated", "header", "missing", "another's"])
def test_damaged_shard(models, tmp_path, damage):
    shutil.copytree(models / "rsft", tmp_path / "rsft")
    first, second, _ = shard(tmp_path / "rsft")
    if damage == "missing":
        second.unlink()
    elif damage == "another's":
        shutil.copy(first, second)
    else:
        damage_file(second, damage)
    refuses(recipe(models, models=[{"model": str(tmp_path / "rsft")}]), f"{second}: damaged: ", tmp_path)


def test_models_of_different_depth(models, tmp_path):
    make_tiny_model(tmp_path / "rsft", layers=3)
    content = recipe(models, models=[{"model": str(tmp_path / "rsft")}])
    refuses(content, "merge recipe: models: .*: num_hidden_layers is 3, in base_model .* 4;", tmp_path)


def test_models_of_different_shapes(models, tmp_path):
    make_tiny_model(tmp_path / "rsft", head_dim=16)
    content = recipe(models, models=[{"model": str(tmp_path / "rsft")}])
    message = r"merge recipe: models: .*: model.layers.\d.self_attn.\w+.weight has the shape .*, in base_model .* \["
    refuses(content, message, tmp_path)


def test_models_of_different_architectures(models, tmp_path):
    make_tiny_model(tmp_path / "rsft", "qwen2")
    content = recipe(models, models=[{"model": str(tmp_path / "rsft")}])
    refuses(content, "merge recipe: models: .*: architectures is .*Qwen2ForCausalLM.*, in base_model ", tmp_path)


def test_models_of_different_vocabulary_size(models, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(models / "rsft")
    model.resize_token_embeddings(272)
    model.save_pretrained(tmp_path / "rsft")
    content = recipe(models, models=[{"model": str(tmp_path / "rsft")}])
    refuses(content, "merge recipe: models: .*: vocab_size is 272, in base_model .* 264", tmp_path)


def test_models_of_different_vocabularies(models, tmp_path):
    shutil.copytree(models / "rsft", tmp_path / "rsft")
    file = tmp_path / "rsft" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    content = recipe(models, models=[{"model": str(tmp_path / "rsft")}])
    refuses(content, "merge recipe: models: .*: 2 tokens have another id than in base_model .*, such as 'a'", tmp_path)


def test_tensors_that_mergekit_would_drop(tmp_path):
    make_tiny_model(tmp_path / "base", "gemma", tie_word_embeddings=False)
    edit(tmp_path / "base", tmp_path / "rsft")
    message = "merge recipe: base_model: .*: mergekit does not know 1 of its tensors, such as lm_head.weight"
    refuses(recipe(tmp_path), message, tmp_path)


def test_edited_model_equals_base(models, tmp_path):
    shutil.copytree(models / "base", tmp_path / "rsft")
    save({name: tensor.float() for name, tensor in load(tmp_path / "rsft").items()}, tmp_path / "rsft")
    content = recipe(models, models=[{"model": str(tmp_path / "rsft")}])
    message = "merge recipe: models: .*/rsft: equals base_model .*/base, so there is nothing to merge; did training"
    refuses(content, message, tmp_path)


@pytest.mark.parametrize("place", ["base", "rsft"])
def test_not_a_number(models, tmp_path, place):
    """Found in the middle of the merge, when files have been written aside."""
    for name in ("base", "rsft"):
        shutil.copytree(models / name, tmp_path / name)
    tensors = load(tmp_path / place)
    tensors["model.layers.3.mlp.up_proj.weight"][1, 2] = float("nan")
    save(tensors, tmp_path / place)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mergekit_config.yml").write_text("an earlier result")
    message = rf"{tmp_path / place}: model\.layers\.3\.mlp\.up_proj\.weight: holds NaN"
    refuses(recipe(tmp_path), message, tmp_path, out_shard_size=10_000)


def test_command_fails_in_one_line(models, tmp_path):
    shutil.copytree(models / "rsft", tmp_path / "rsft")
    tensors = load(tmp_path / "rsft")
    tensors[ffn()][0, 0] = float("inf")
    save(tensors, tmp_path / "rsft")
    content = recipe(models, models=[{"model": "./rsft"}])
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(content))
    done = run_command("mergekit-yaml", "--quiet", "merge.yaml", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"mm4ke: error: ./rsft: {ffn()}: holds an infinite number")
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merge.yaml", "rsft"]


def test_unsupported_version(models, tmp_path, monkeypatch):
    monkeypatch.setattr(adapter, "MERGEKIT", dataclasses.replace(MERGEKIT, supported="<0.1.5"))
    refuses(recipe(models), r"merge_method: mm4ke needs mergekit<0\.1\.5, found 0\.1\.", tmp_path)


# The output folder


def test_output_is_not_an_earlier_result(models, tmp_path):
    (tmp_path / "file").touch()
    refuses(recipe(models), f"{tmp_path}: exists and is no earlier result of mergekit", tmp_path, out=".")
    refuses(recipe(models), f"{tmp_path}/file: exists and is no earlier result", tmp_path, out="file")


def test_output_is_an_input(models, tmp_path):
    shutil.copytree(models / "base", tmp_path / "base")
    (tmp_path / "base" / "mergekit_config.yml").touch()
    content = recipe(models, base_model=str(tmp_path / "base"))
    refuses(content, f"{tmp_path}/base: is one of the models to merge", tmp_path, out="base")


def test_output_is_an_empty_folder_or_one_to_be_made(models, tmp_path):
    (tmp_path / "empty").mkdir()
    assert run_merge(recipe(models), tmp_path / "empty")
    assert run_merge(recipe(models), tmp_path / "new" / "folder")


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


def test_other_methods_are_left_alone(models, tmp_path):
    """They take unknown parameters and write into a folder that has other files, as without the plugin."""
    (tmp_path / "notes.txt").touch()
    stock = recipe(models, merge_method="task_arithmetic", parameters={"weight": 1, "wieght": 2})
    merged = run_merge(stock, tmp_path)
    assert merged[ffn()].dtype == torch.float32
    assert (tmp_path / "notes.txt").exists()


def test_mergekit_imported_before_torch(models, tmp_path):
    """mergekit.merge is half-imported when PyTorch calls us; the method still is there and checks its tensors."""
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe(models)))
    (tmp_path / "program.py").write_text(
        "import mergekit.merge, sys, yaml, warnings\n"
        "from mergekit.config import MergeConfiguration\n"
        "config = MergeConfiguration.model_validate(yaml.safe_load(open('merge.yaml')))\n"
        "mergekit.merge.run_merge(config, 'out', mergekit.merge.MergeOptions(quiet=True))\n"
    )
    done = run_command("python", "-W", "error::UserWarning:mm4ke_plugins", "program.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load(tmp_path / "out")[ffn()], expect(models, ffn()))


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
