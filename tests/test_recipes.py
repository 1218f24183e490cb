"""Every recipe is read by its host's own parser, and says what it needs."""

from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from mm4ke_plugins.study.plan import read_study

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
# By a key that only this command's recipes have.
COMMANDS = {"stage": "llamafactory-cli train", "merge_method": "mergekit-yaml", "methods": "mm4ke study"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def recipes_with(key: str) -> list[Path]:
    return [path for path in RECIPES if key in yaml.safe_load(path.read_text())]


def test_there_are_recipes_for_the_default_model_and_the_papers():
    assert {name(path) for path in RECIPES} >= {
        f"recipes/{folder}{host}.yaml"
        for folder in ("", "paper/", "sparing/", "qwen2.5-7b-instruct/", "llama2-7b-chat/")
        for host in ("rsft", "merge")
    }


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_the_header_gives_the_exact_command(path):
    header = path.read_text().partition("\n\n")[0]
    if "easyedit" in path.parts:
        command = (
            f"mm4ke easyedit --easyedit ../EasyEdit --data ZsRE-test-all.json --n 10 --methods {path.parent.name}"
        )
    else:
        keys = yaml.safe_load(path.read_text())
        host = next((command for key, command in COMMANDS.items() if key in keys), "lm_eval run --config")
        command = f"{host} {name(path)}"
    assert f"#     {command}" in header
    assert "# Needs:" in header and "# Takes:" in header


@pytest.mark.parametrize("path", recipes_with("rsft"), ids=name)
def test_llamafactory_parses_it(path, monkeypatch):
    """The checks of the model's and facts' files are left to the runs; everything else is the host's own parsing."""
    from llamafactory.data.template import TEMPLATES
    from llamafactory.hparams import parser
    from transformers import HfArgumentParser

    from mm4ke_plugins.hosts.llamafactory import recipe as llamafactory_recipe

    monkeypatch.setattr(llamafactory_recipe, "_check_model_folder", lambda *_: None)
    monkeypatch.setattr(llamafactory_recipe, "_check_datasets", lambda *_: None)
    recipe = yaml.safe_load(path.read_text())
    if recipe["bf16"]:
        recipe["use_cpu"] = True  # transformers refuses bf16 where there is no GPU, unless the CPU is asked for
    parsed = HfArgumentParser(parser._TRAIN_ARGS).parse_dict(recipe)
    model_args, data_args, training_args, finetuning_args, _ = parsed
    llamafactory_recipe.check_recipe(model_args, data_args, training_args, finetuning_args)
    assert finetuning_args.rsft_layers == ([5, 7, 9] if path.parent.name == "sparing" else [5])
    assert data_args.template in TEMPLATES
    assert Path(training_args.output_dir).parts[0] == "work"


@pytest.mark.parametrize("path", recipes_with("merge_method"), ids=name)
def test_mergekit_parses_it(path):
    from mergekit import merge_methods
    from mergekit.card import is_hf
    from mergekit.config import MergeConfiguration

    config = MergeConfiguration.model_validate(yaml.safe_load(path.read_text()))
    known = {parameter.name for parameter in merge_methods.get(config.merge_method).spec.parameters}
    for model in config.models:
        assert set(model.parameters or {}) <= known
        # mergekit's model card would ask the hub about a path that looks like one of its ids.
        assert not is_hf(model.model.model.path)
    if path.stem != "merge":
        return
    rsft = yaml.safe_load((path.parent / "rsft.yaml").read_text())
    assert rsft["output_dir"] == config.models[0].model.model.path
    assert rsft["model_name_or_path"] == config.base_model.model.path


@pytest.mark.parametrize("path", recipes_with("methods"), ids=name)
def test_a_study_names_what_is_there(path, shared_data, smollm2, monkeypatch):
    """Its own recipes, and settings for each of EasyEdit's methods."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MM4KE_DATA", str(shared_data))
    content = yaml.safe_load(path.read_text())
    monkeypatch.setattr(yaml, "safe_load", lambda text: content | {"model": str(smollm2)})
    study = read_study(path)
    assert study.against in [method.name for method in study.methods]
    for method in study.methods:
        assert not method.easyedit or (ROOT / f"recipes/easyedit/{method.easyedit}/{study.hparams}.yaml").is_file()
        assert not method.run or Path(method.run.split()[-1]).is_file()
