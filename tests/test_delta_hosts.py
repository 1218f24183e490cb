"""Knowledge deltas where hosts take them: lm-eval's model type, EasyEdit's method, mergekit's recipes."""

from pathlib import Path

import mergekit_helpers
import pytest
import torch
import yaml
from easyedit_helpers import FACTS, differing, expected, load, requests, weights
from lm_eval_helpers import evaluate, samples_of
from tiny import make_tiny_model

import mergekit.merge  # isort: skip  # after torch, which brings the plugin
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions

from mm4ke_plugins.delta.folders import apply, extract
from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.hosts.lm_eval.model import MM4KELM

pytestmark = pytest.mark.usefixtures("easyedit_workdir")

TASKS = ["facts_edit_success", "facts_portability_reasoning", "facts_locality_relation_specificity"]


@pytest.fixture(scope="module")
def delta(lm_eval_models, tmp_path_factory) -> Path:
    """The unfinished delta of `out`, beside a checkpoint with half of it, `half`, and the finished delta of that."""
    folder = tmp_path_factory.mktemp("delta")
    extract(lm_eval_models / "base", lm_eval_models / "out", folder / "d")
    apply(lm_eval_models / "base", [folder / "d"], folder / "half", [0.5], [0.6])
    extract(lm_eval_models / "base", lm_eval_models / "out", folder / "finished", 0.5, 0.6)
    return folder / "d"


# ---- lm-eval ----


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("with_reference", [False, True])
def test_lm_eval_scores_a_delta_as_its_checkpoint(lm_eval_models, delta, monkeypatch, finished, with_reference):
    base, half = str(lm_eval_models / "base"), str(delta.parent / "half")
    expected = samples_of(evaluate(lm_eval_models, TASKS, model_args={"pretrained": half, "reference": base}))
    arguments = {"pretrained": base, "knowledge_delta": str(delta), "weight": 0.5, "density": 0.6}
    if finished:
        arguments = {"pretrained": base, "knowledge_delta": str(delta.parent / "finished")}
    if with_reference:
        arguments["reference"] = base
    loaded = []
    create = MM4KELM.__mro__[1]._create_model
    monkeypatch.setattr(
        MM4KELM.__mro__[1],
        "_create_model",
        lambda self, *args, **kwargs: loaded.append(args) or create(self, *args, **kwargs),
    )
    as_written = ",".join(f"{key}={value}" for key, value in arguments.items())
    found = samples_of(evaluate(lm_eval_models, TASKS, model_args=as_written))
    assert len(loaded) == 1, "the base is loaded once"
    assert found.keys() == expected.keys() and len(found) > 5
    for key, sample in expected.items():
        assert found[key]["filtered_resps"] == sample["filtered_resps"]
    assert any(after != before for sample in found.values() for after, before in sample["filtered_resps"])


def test_lm_eval_with_a_reference_that_is_not_the_base(lm_eval_models, delta):
    arguments = {
        "pretrained": str(lm_eval_models / "base"),
        "knowledge_delta": str(delta),
        "weight": 1.0,
        "density": 1.0,
    }
    found = samples_of(
        evaluate(lm_eval_models, TASKS, model_args=arguments | {"reference": str(delta.parent / "half")})
    )
    of_half = {"pretrained": str(delta.parent / "half"), "reference": str(lm_eval_models / "base")}
    half = samples_of(evaluate(lm_eval_models, TASKS, model_args=of_half))
    for key, sample in found.items():
        assert [pair[1] for pair in sample["filtered_resps"]] == [pair[0] for pair in half[key]["filtered_resps"]]


def test_lm_evals_cache_knows_the_delta_and_its_weight(lm_eval_models, delta, tmp_path):
    arguments = {"pretrained": str(lm_eval_models / "base"), "knowledge_delta": str(delta), "weight": 0.5}
    cache = {"use_cache": str(tmp_path / "cache")}
    evaluate(lm_eval_models, TASKS[:1], model_args=arguments, **cache)
    with pytest.raises(MM4KEError, match="holds the responses of other models or settings"):
        evaluate(lm_eval_models, TASKS[:1], model_args=arguments | {"weight": 0.6}, **cache)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"knowledge_delta": "none"}, "^none: no such file; give a knowledge delta"),
        ({"weight": 20}, "^weight: 20: give a number from -10 to 10"),
        ({"density": "half"}, "^density: half: give a share"),
        ({"knowledge_delta": None, "weight": 0.8}, "^weight, density: these are of a knowledge_delta, and none"),
        ({"dtype": "bfloat16"}, "is bfloat16, .* was taken from float32; load the model with dtype=float32"),
    ],
)
def test_what_lm_eval_can_not_do(lm_eval_models, delta, changes, message):
    arguments = {"pretrained": str(lm_eval_models / "base"), "knowledge_delta": str(delta)} | changes
    with pytest.raises(MM4KEError, match=message):
        evaluate(lm_eval_models, TASKS[:1], model_args=arguments)


# ---- EasyEdit ----


@pytest.mark.easyedit
@pytest.mark.parametrize("choice", [{}, {"weight": 1, "density": 1}])
def test_easyedit_takes_a_delta_for_a_merged_model(easyedit_editor, easyedit_model, tmp_path, choice):
    merged = load(easyedit_model)
    merged.load_state_dict(expected(easyedit_model, FACTS))
    merged.save_pretrained(tmp_path / "merged")
    extract(easyedit_model, tmp_path / "merged", tmp_path / "d", **choice)
    hparams = easyedit_editor.hparams
    hparams.merged_model, hparams.weight, hparams.density = str(tmp_path / "d"), 1.0, 1.0
    base = weights(easyedit_editor.model)
    metrics, *_ = easyedit_editor.edit(**requests(), verbose=False)
    assert [entry["post"]["rewrite_acc"] for entry in metrics] == [[1.0], [1.0]]
    assert differing(weights(easyedit_editor.model), base) == []
    easyedit_editor.edit(**requests(), sequential_edit=True, verbose=False)
    found, whole = weights(easyedit_editor.model), weights(merged)
    for name in base:
        assert torch.allclose(found[name], whole[name], atol=1e-6)
    assert not choice or differing(found, whole) == []

    extract(make_tiny_model(tmp_path / "b", seed=5), make_tiny_model(tmp_path / "e", seed=6), tmp_path / "other")
    hparams.merged_model = str(tmp_path / "other")
    with pytest.raises(MM4KEError, match="/other was taken from; give that base|is not in the live"):
        easyedit_editor.edit(**requests(), verbose=False)


# ---- mergekit ----


@pytest.fixture(scope="module")
def merging(tmp_path_factory) -> Path:
    """A bfloat16 `base`, two float32 edits of it and their deltas."""
    folder = tmp_path_factory.mktemp("merging")
    make_tiny_model(folder / "base", dtype=torch.bfloat16, tie_word_embeddings=True)
    for seed, name in enumerate(("rsft", "other"), start=1):
        mergekit_helpers.edit(folder / "base", folder / name, seed=seed)
        extract(folder / "base", folder / name, folder / f"{name}.delta")
    extract(folder / "base", folder / "rsft", folder / "finished.delta", 0.8, 0.8)
    return folder


def run_merge(content: dict, out: Path) -> dict[str, torch.Tensor]:
    config = MergeConfiguration.model_validate(content)
    mergekit.merge.run_merge(config, str(out), MergeOptions(quiet=True), yaml.safe_dump(content))
    return mergekit_helpers.load(out)


def test_mergekit_takes_deltas_for_edited_models(merging, tmp_path):
    parameters = {"weight": [0.3, 0.9], "density": [{"filter": "mlp", "value": 0.4}, {"value": 0.7}]}

    def recipe(*names: str) -> dict:
        models = [{"model": str(merging / name), "parameters": parameters} for name in names]
        return mergekit_helpers.recipe(merging, models=models)

    wanted = run_merge(recipe("rsft", "other"), tmp_path / "wanted")
    found = run_merge(recipe("rsft.delta", "other.delta"), tmp_path / "found")
    mixed = run_merge(recipe("rsft.delta", "other"), tmp_path / "mixed")
    assert not torch.equal(
        wanted[mergekit_helpers.ffn()], mergekit_helpers.load(merging / "base")[mergekit_helpers.ffn()]
    )
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor) and torch.equal(mixed[name], tensor)
        assert found[name].dtype == tensor.dtype
    card = (tmp_path / "found" / "README.md").read_text()
    assert str(merging / "rsft.delta") in card and "mm4ke-" not in card  # no folder that is gone


@pytest.mark.parametrize(
    ("base", "model", "message"),
    [
        (
            "base",
            "finished.delta",
            "finished.delta: is finished .weight 0.8, density 0.8., and would be weighed again",
        ),
        ("other", "rsft.delta", "^base_model: .*/other: .* is float32, .*/rsft.delta was taken from bfloat16"),
        ("base", "base/model.safetensors", "base/model.safetensors: not a knowledge delta"),
    ],
)
def test_deltas_that_a_recipe_can_not_have(merging, tmp_path, base, model, message):
    content = mergekit_helpers.recipe(
        merging, models=[{"model": str(merging / model)}], base_model=str(merging / base)
    )
    with pytest.raises(MM4KEError, match=message):
        run_merge(content, tmp_path / "out")
    assert not list(tmp_path.iterdir())
