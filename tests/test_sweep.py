"""`mm4ke sweep`: what it measures, what it leaves out, what it picks, and the recipe that it writes for that."""

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import run_command
from rich.console import Console
from safetensors.torch import load_file
from tiny import as_hub_model, make_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from mm4ke_plugins.cli import cli
from mm4ke_plugins.delta.folders import apply, extract
from mm4ke_plugins.delta.format import load_delta
from mm4ke_plugins.delta.live import LiveDelta
from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.knowedit import known_facts as known_module
from mm4ke_plugins.knowedit.known_facts import KnownFact, KnownFacts
from mm4ke_plugins.knowedit.metrics import (
    answer,
    mean_scores,
    neutral_text,
    perplexity,
    predict,
    question_scores,
    questions_of,
)
from mm4ke_plugins.knowedit.prompts import encode
from mm4ke_plugins.knowedit.records import read_records
from mm4ke_plugins.merging.equations import merge
from mm4ke_plugins.rsft.facts import encode_fact
from mm4ke_plugins.rsft.layers import ffn_parameter_names
from mm4ke_plugins.rsft.live import Settings, train_facts
from mm4ke_plugins.storage.checkpoint import tensor_files
from mm4ke_plugins.sweep import choose as sweep_module
from mm4ke_plugins.sweep import measure as measure_module
from mm4ke_plugins.sweep.choose import sweep
from mm4ke_plugins.sweep.output import apply_command, merge_recipe, show, warnings, write
from mm4ke_plugins.sweep.points import Point, Row, settings

FACTS = [
    {
        "prompt": f"Who rules {name}?",
        "target_new": answer,
        "rephrase_prompt": f"{name} is ruled by",
        "portability": {"Reasoning": [{"prompt": f"Who is king of {name}?", "ground_truth": [[answer]]}]},
        "locality": {"Forgetfulness": [{"prompt": f"{name} lies in the", "ground_truth": [["north of it all"]]}]},
    }
    for name, answer in (("Oz", "Tark"), ("Ur", "Up"), ("Ix", "Ann"), ("Aa", "Bo"), ("Ys", "Kit"))
]
GRID = {"weights": [1.0, 0.8, 0.5], "densities": [1.0, 0.5]}
TEXT = neutral_text()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """base, in bfloat16; rsft, with the FFN of layers 1 and 2 trained in float32; one, with that of layer 1 only;
    the delta of each, and the facts."""
    home = tmp_path_factory.mktemp("sweep")
    base = make_tiny_model(home / "base", dtype=torch.bfloat16)
    (home / "facts.json").write_text(json.dumps(FACTS))
    codes = [encode_fact(tiny_tokenizer(), fact["prompt"], fact["target_new"], "chat") for fact in FACTS]
    for name, layers in (("rsft", (1, 2)), ("one", (1,))):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        names = ffn_parameter_names(model, list(layers), ["ffn"])
        train_facts(model, names, codes, Settings(layers=layers, learning_rate=1e-2, loss_threshold=0.05))
        model.save_pretrained(home / name)
        AutoTokenizer.from_pretrained(base).save_pretrained(home / name)
        extract(base, home / name, home / f"{name}.delta")
    return home


@pytest.fixture(scope="module")
def result(home) -> dict:
    """All points of a small grid."""
    return sweep(home / "base", home / "rsft", home / "facts.json", **GRID, early_stop=False, per_layer=False)


def row_of(result, weight, density, layers=()):
    return next(row for row in result["points"] if Point(**row["point"]) == Point(weight, density, layers))


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in set(tensor_files(folder).values()) for name, tensor in load_file(file).items()}


def test_a_hub_model_as_base(home, result, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base = as_hub_model(home / "base", tmp_path)
    found = sweep(base, home / "rsft.delta", home / "facts.json", **GRID, early_stop=False, per_layer=False)
    assert found["points"] == result["points"]
    assert yaml.safe_load(merge_recipe(found, tmp_path))["base_model"] == "someone/model"
    assert apply_command(found) is None


# ---- measures ----


def test_a_point_is_what_the_merged_model_scores(home, result, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(home / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    apply(home / "base", [home / "rsft.delta"], tmp_path / "merged", [0.8], [0.5])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    questions = questions_of(read_records(home / "facts.json")[0::2])
    # Asked apart, as bfloat16 depends a bit on what is in a batch.
    predicted = {}
    for model in (base, merged):
        for is_first in (True, False):
            part = [question for question in questions if (question.metric == "edit_success") == is_first]
            codes = [encode(tokenizer, question, "chat") for question in part]
            predicted |= {(model, question): tokens for question, tokens in zip(part, predict(model, codes))}
    codes = [encode(tokenizer, question, "chat") for question in questions]
    of_base, of_merged = ([predicted[model, question] for question in questions] for model in (base, merged))
    expected = mean_scores(questions, question_scores(questions, codes, of_merged, of_base))

    row = row_of(result, 0.8, 0.5)
    assert row["scores"]["choice"] == expected and None not in expected.values()
    assert len(row["locality_by_record"]) == 3
    assert sum(row["locality_by_record"]) / 3 == pytest.approx(expected["locality"])
    assert row["perplexity"] == pytest.approx(perplexity(merged, tokenizer, TEXT))
    divergences = []
    for part in torch.tensor(tokenizer(TEXT).input_ids).split(512):
        if len(part) < 2:
            continue
        with torch.no_grad():
            p, q = (model(part[None]).logits[0, :-1].double().log_softmax(-1) for model in (base, merged))
        divergences.append((p.exp() * (p - q)).sum(-1))
    assert row["kl"] == pytest.approx(torch.cat(divergences).mean().item(), rel=1e-4)
    assert row["kl"] > 0.01

    untouched = result["untouched"]
    assert untouched["kl"] == 0 and untouched["scores"]["choice"]["locality"] == 1
    assert untouched["perplexity"] == pytest.approx(perplexity(base, tokenizer, TEXT))
    assert untouched["scores"]["choice"]["edit_success"] < 0.5 < result["rsft"]["scores"]["choice"]["edit_success"]


def test_it_asks_what_facts_keeps(home, tmp_path, capsys):
    again = {**FACTS[0], "prompt": "who rules OZ ?"}
    (tmp_path / "facts.json").write_text(json.dumps([{**FACTS[1], "target_new": "Down"}, FACTS[0], again, *FACTS[1:]]))
    grid = {"weights": [1.0], "densities": [1.0]}
    found = sweep(home / "base", home / "rsft", tmp_path / "facts.json", limit=6, **grid, per_layer=False)
    assert found["records"] == {"choice": 2, "confirmation": 2}
    assert "4 of 6 facts are asked, as `mm4ke facts` keeps them" in capsys.readouterr().err


def test_one_half_decides_and_the_other_confirms(home, result):
    assert result["records"] == {"choice": 3, "confirmation": 2}
    for key in ("picked", "rsft", "default"):
        assert set(result[key]["scores"]) == {"choice", "confirmation"}
    confirmed = [row["point"] for row in result["points"] if "confirmation" in row["scores"]]
    assert all(point in [result[key]["point"] for key in ("picked", "rsft", "default")] for point in confirmed)
    # What the other half says changes nothing that was measured or picked on this one.
    other = json.loads((home / "facts.json").read_text())
    for fact in other[1::2]:
        fact["target_new"] = "another"
    (home / "other.json").write_text(json.dumps(other))
    again = sweep(home / "base", home / "rsft", home / "other.json", **GRID, early_stop=False, per_layer=False)
    for first, second in zip(result["points"], again["points"], strict=True):
        assert first["scores"]["choice"] == second["scores"]["choice"]
    assert again["picked"]["point"] == result["picked"]["point"]
    assert again["rsft"]["scores"]["confirmation"] != result["rsft"]["scores"]["confirmation"]
    assert warnings(result | {"keep": 1e9}) and not warnings(result | {"keep": 0.01})


@pytest.mark.parametrize("fails", [False, True])
def test_the_base_is_loaded_once_and_restored(home, monkeypatch, fails):
    loaded, load = [], sweep_module.load_model
    monkeypatch.setattr(sweep_module, "load_model", lambda *args: loaded.append(load(*args)) or loaded[-1])
    if fails:
        with pytest.raises(MM4KEError, match="no point of the grid keeps"):
            sweep(home / "base", home / "one", home / "facts.json", weights=[0.01], densities=[0.1], keep=1)
    else:
        sweep(home / "base", home / "one", home / "facts.json", weights=[1.0, 0.7], densities=[1.0])
    (model,) = loaded
    for name, tensor in tensors_of(home / "base").items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_raw_prompts_and_facts_without_probes(home, tmp_path):
    bare = [{key: fact[key] for key in ("prompt", "target_new")} for fact in FACTS]
    (tmp_path / "bare.json").write_text(json.dumps(bare))
    result = sweep(home / "base", home / "one.delta", tmp_path / "bare.json", weights=[1.0, 0.9], densities=[1.0])
    assert result["picked"]["scores"]["choice"]["locality"] is None
    able = [row for row in result["points"] if row["in_grid"] and row["state"] == "scored"]
    able = [row for row in able if row["scores"]["choice"]["edit_success"] >= result["required"]]
    assert result["picked"]["kl"] == min(row["kl"] for row in able)
    write(result, tmp_path / "out")
    grid = {"weights": [1.0], "densities": [1.0], "prompt_format": "raw"}
    raw = sweep(home / "base", home / "one", home / "facts.json", **grid)
    edit_success = [found["rsft"]["scores"]["choice"]["edit_success"] for found in (raw, result)]
    assert edit_success[0] != edit_success[1]


def test_a_base_without_chat_template_is_asked_in_raw_prompts(home, tmp_path):
    shutil.copytree(home / "base", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    grid = {"weights": [1.0], "densities": [1.0]}
    found = sweep(tmp_path / "base", home / "one.delta", home / "facts.json", **grid)
    expected = sweep(home / "base", home / "one.delta", home / "facts.json", **grid, prompt_format="raw")
    assert found["points"] == expected["points"]


def test_known_facts(home, result, tmp_path, monkeypatch):
    """Four questions, of which the base answers three right: what it says is what is right."""
    base = AutoModelForCausalLM.from_pretrained(home / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    questions = ["Who?", "What is it?", "Where?", "Why?"]
    said = answer(base, tokenizer, questions, known_module.MAX_NEW_TOKENS)
    right = dict(zip(questions[:3], (text.removesuffix("…").strip() for text in said)))
    monkeypatch.setattr(KnownFact, "is_right", lambda fact, text: text == right.get(fact.question))
    facts = [KnownFact("word", question, (("-",),)) for question in questions]
    for module in (known_module, measure_module):
        monkeypatch.setattr(module, "known_facts", lambda: facts)
    found = sweep(home / "base", home / "rsft", home / "facts.json", **GRID, early_stop=False, per_layer=False)

    known = KnownFacts(base, tokenizer)
    assert len(known.facts) == 3
    row = row_of(found, 0.8, 0.8)
    apply(home / "base", [home / "rsft.delta"], tmp_path / "merged", [0.8], [0.8])
    kept = known.measure(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval())
    assert (row["known_kl"], row["known_kept"]) == (pytest.approx(kept.kl, rel=1e-3), kept.kept) and kept.kl > 0
    assert [found["untouched"][name] for name in ("known_kl", "known_kept")] == [0, 1]
    asked = [found[key]["point"] for key in ("picked", "rsft", "default")]
    for before, after in zip(result["points"], found["points"], strict=True):
        assert before["known_kl"] is before["known_kept"] is None and after["known_kl"] > 0
        assert (after["known_kept"] is not None) == (after["point"] in asked)
        for name in ("kl", "perplexity", "locality_by_record"):
            assert before[name] == after[name]
    assert (result["deciding_kl"], found["deciding_kl"]) == ("kl", "known_kl")

    write(found, tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))
    (of_default,) = [row for row in rows if (row["weight"], row["density"], row["half"]) == ("0.8", "0.8", "choice")]
    assert float(of_default["known_kl"]) == row["known_kl"] and float(of_default["known_kept"]) == row["known_kept"]
    for figure in ("weight", "density", "pareto"):
        assert "KL from base, known facts" in (tmp_path / "out" / f"{figure}.svg").read_text()
    shown = io.StringIO()
    show(found, Console(file=shown, width=80))
    lines = shown.getvalue().splitlines()
    assert f"{row['known_kl']:.4f}" in shown.getvalue() and max(map(len, lines)) <= 80
    assert "known" in lines[[line.strip() for line in lines].index("The 2 other records") + 1]


# ---- what is left out, and the rule ----


class Landscape:
    """An evaluator whose scores are given by functions of a point, and which notes what it was asked."""

    def __init__(self, edit_success, locality=lambda point: 0.5, kl=lambda point: 0.1, layers=(5,)):
        self.functions, self.asked, self.planned = (edit_success, locality, kl), [], 0
        self.names_of = {layer: [f"layers.{layer}.w"] for layer in layers}

    def plan(self, points):
        self.planned += points

    def untouched(self):
        return Row(Point(0.0, 1.0), scores={"choice": {"edit_success": 0.0}})

    def measure(self, point, required=-1.0):
        self.asked.append(point)
        edit_success, locality, kl = (function(point) for function in self.functions)
        if edit_success < required:
            return Row(point, state="hopeless", scores={"choice": {"edit_success": edit_success}})
        scores = {"choice": {"edit_success": edit_success, "locality": locality}}
        return Row(point, scores=scores, locality_by_record=[locality] * 3, kl=kl)

    def confirm(self, row):
        row.scores["confirmation"] = row.scores["choice"]


def choose(landscape, weights, densities, keep=0.97, early_stop=True, per_layer=True):
    return sweep_module._choose(landscape, weights, densities, keep, early_stop, per_layer, "edit")


def states(result):
    return {(row["point"]["weight"], row["point"]["density"]): row["state"] for row in result["points"]}


def test_early_stop_leaves_out_lower_weights_and_densities():
    falling = Landscape(lambda point: min(1.0, 1.1 * point.weight * point.density))
    weights, densities = [1.0, 0.9, 0.8, 0.6, 0.4, 0.2], [1.0, 0.9, 0.7, 0.5, 0.3]
    result = choose(falling, weights, densities)
    found = states(result)
    assert [found[weight, 1.0] for weight in weights] == ["scored", "scored", "hopeless", "hopeless", *["skipped"] * 2]
    assert [found[weight, 0.9] for weight in weights] == ["scored", "hopeless", "hopeless", *["skipped"] * 3]
    # Two hopeless weights, and two densities with nothing else.
    assert [found[weight, 0.7] for weight in weights] == ["hopeless", "hopeless", *["skipped"] * 4]
    assert {found[weight, 0.3] for weight in weights} == {"skipped"}
    # 0.8/0.8 is not in the grid, and measured for comparison.
    assert len(falling.asked) == len(set(falling.asked)) and Point(0.8, 0.8) in falling.asked
    assert len(result["points"]) == len(weights) * len(densities) + 1
    # The progress bar ends at what was measured; three were confirmed.
    assert falling.planned == len(falling.asked) + 3
    everything = choose(Landscape(falling.functions[0]), weights, densities, early_stop=False)
    assert set(states(everything).values()) == {"scored"}
    assert everything["picked"]["point"] == result["picked"]["point"]


def test_weights_above_one_may_overshoot():
    peak = Landscape(lambda point: 1 - abs(point.weight - 1) / 2)
    found = states(choose(peak, [3.0, 2.5, 2.0, 1.0, 0.5, 0.4, 0.3], [1.0]))
    assert [found[weight, 1.0] for weight in (2.0, 1.0, 0.4, 0.3)] == ["hopeless", "scored", "hopeless", "skipped"]


def test_one_hopeless_weight_does_not_end_the_search():
    noisy = Landscape(lambda point: 0.5 if point.weight == 0.9 else 1.0, locality=lambda point: 1 - point.weight)
    result = choose(noisy, [1.0, 0.9, 0.7], [1.0])
    assert result["picked"]["point"]["weight"] == 0.7


def test_the_rule_is_highest_locality_then_lowest_kl():
    locality = {1.0: 0.2, 0.9: 0.6, 0.8: 0.6, 0.7: 0.4, 0.6: 0.9, 0.5: 0.9}
    kl = {1.0: 0.5, 0.9: 0.4, 0.8: 0.3, 0.7: 0.2, 0.6: 0.01, 0.5: None}
    landscape = Landscape(
        lambda point: 0.99 if point.weight != 0.6 else 0.9,
        lambda point: locality[point.weight],
        lambda point: kl[point.weight],
    )
    result = choose(landscape, list(locality), [1.0])
    # 0.6 loses facts and 0.5 has no finite KL, though both would have the highest locality.
    assert result["picked"]["point"]["weight"] == 0.8
    assert result["required"] == pytest.approx(0.97 * 0.99)
    front = [row["point"]["weight"] for row in result["points"] if row["on_front"]]
    assert front == [0.8, 0.7]
    # 0.8/0.8 and R-SFT are compared with, but not picked, where the grid does not have them.
    assert choose(landscape, [0.9, 0.7], [1.0])["picked"]["point"]["weight"] == 0.9


def test_the_kl_of_known_facts_decides_where_the_base_knew_any():
    class Known(Landscape):
        def untouched(self):
            row = super().untouched()
            row.known_kl = 0.0
            return row

        def measure(self, point, required=-1.0):
            row = super().measure(point, required)
            row.known_kl = {1.0: 0.3, 0.9: 0.1, 0.8: 0.2, 0.7: None}[point.weight]
            return row

    weights = [1.0, 0.9, 0.8, 0.7]
    known, unknown = (kind(lambda point: 1.0, kl=lambda point: point.weight) for kind in (Known, Landscape))
    result = choose(known, weights, [1.0])
    assert (result["deciding_kl"], result["picked"]["point"]["weight"]) == ("known_kl", 0.9)
    assert [row["point"]["weight"] for row in result["points"] if row["on_front"]] == [0.9]
    result = choose(unknown, weights, [1.0])
    assert (result["deciding_kl"], result["picked"]["point"]["weight"]) == ("kl", 0.7)


@pytest.mark.parametrize(
    ("records", "picked"),
    [
        ([1.0, 1.0, 1.0, 1.0], 1.0),  # the same in all records
        ([0.6, 0.5, 0.5, 0.5], 0.9),  # 0.1 in one record
        ([0.6, 0.6, 0.5, 0.5], 1.0),  # 0.1 in two: 0.05 with a standard error of 0.029
        ([0.9, 0.5, 0.5, 0.3], 0.9),  # 0.05 with a standard error of 0.126
    ],
)
def test_a_locality_within_one_standard_error_counts_as_the_highest(records, picked):
    class Records(Landscape):
        def measure(self, point, required=-1.0):
            row = super().measure(point, required)
            row.locality_by_record = records if point.weight == 1 else [0.5] * 4
            row.scores["choice"]["locality"] = sum(row.locality_by_record) / 4
            return row

    landscape = Records(lambda point: 1.0, kl=lambda point: point.weight)
    result = choose(landscape, [1.0, 0.9], [1.0])
    assert result["picked"]["point"]["weight"] == picked
    assert all(row["on_front"] for row in result["points"] if row["in_grid"])


def test_the_layers_are_chosen_one_after_the_other():
    """Layer 3 holds the facts; layer 7 holds none, and the less of it the better."""
    best = {"weight": 0.2, "density": 0.5}

    def edit_success(point):
        return 1.0 if min(point.of_layer(3)) >= 0.8 else 0.4

    def locality(point):
        return 1 - sum(point.of_layer(7)) / 4 - point.of_layer(3)[0] / 10

    landscape = Landscape(edit_success, locality, layers=(3, 7))
    result = choose(landscape, [1.0, 0.8, 0.6, 0.4, 0.2], [1.0, 0.8, 0.5])
    assert result["picked"]["point"] == {
        "weight": 0.8, "density": 0.8, "layers": ((7, best["weight"], best["density"]),)
    }  # fmt: skip
    assert len(landscape.asked) == len(set(landscape.asked))
    assert landscape.planned == len(landscape.asked) + 3
    common = choose(Landscape(edit_success, locality, layers=(3, 7)), [1.0, 0.8], [1.0, 0.8], per_layer=False)
    assert common["picked"]["point"] == {"weight": 0.8, "density": 0.8, "layers": ()}


def test_of_layer_and_with_layer():
    point = Point(0.8, 0.6).with_layer(2, 0.5, 0.6).with_layer(1, 1.0, 1.0).with_layer(2, 0.4, 0.2)
    assert point == Point(0.8, 0.6, ((1, 1.0, 1.0), (2, 0.4, 0.2)))
    assert point.of_layer(2) == (0.4, 0.2) and point.of_layer(3) == (0.8, 0.6)
    assert point.with_layer(1, 0.8, 0.6).with_layer(2, 0.8, 0.6) == Point(0.8, 0.6)


# ---- the recipe ----


def live_tensors(home, edited, point: Point) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    live = LiveDelta(model, load_delta(home / f"{edited}.delta"))
    layers = {layer: [name for name in live.edited if f"layers.{layer}." in name] for layer, *_ in point.layers}
    live.set(*settings(point, live.edited, layers))
    return model.state_dict()


def merged_by_mergekit(recipe: str, out: Path) -> dict[str, torch.Tensor]:
    import mergekit.merge
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(yaml.safe_load(recipe))
    mergekit.merge.run_merge(config, str(out), MergeOptions(quiet=True), recipe)
    return tensors_of(out)


@pytest.mark.parametrize("edited", ["rsft", "rsft.delta"])
@pytest.mark.parametrize("layers", [(), ((2, 0.3, 0.35),)])
def test_mergekit_makes_the_very_model_that_was_measured(home, result, tmp_path, edited, layers):
    picked = result["picked"] | {"point": {"weight": 0.7, "density": 0.55, "layers": layers}}
    recipe = merge_recipe(result | {"picked": picked, "edited": str(home / edited)}, Path("work/sweep"))
    found = merged_by_mergekit(recipe, tmp_path / "out")
    expected, base = live_tensors(home, "rsft", Point(0.7, 0.55, layers)), tensors_of(home / "base")
    changed = [name for name in found if not torch.equal(found[name], base[name])]
    assert {name.split(".")[2] for name in changed} == {"1", "2"}
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])
    if layers:
        name = changed[-1]
        common = live_tensors(home, "rsft", Point(0.7, 0.55))[name]
        assert "layers.2." in name and not torch.equal(found[name], common)
        trained = load_file(home / "rsft" / "model.safetensors")[name]
        assert torch.equal(found[name], merge(base[name], [trained], [0.3], [0.35], names=["base", "rsft"]))


@pytest.fixture
def relative_base(tmp_path, monkeypatch):
    """A folder that would be a hub's id if it were not there."""
    monkeypatch.chdir(tmp_path)
    Path("work/base").mkdir(parents=True)
    return "work/base"


def test_the_recipe_names_relative_folders_as_mergekit_wants_them(result, relative_base):
    recipe = merge_recipe(result | {"base": relative_base, "edited": "../facts.delta"}, Path("work/sweep"))
    content = yaml.safe_load(recipe)
    assert (content["base_model"], content["models"][0]["model"]) == ("./work/base", "../facts.delta")
    assert "\n#     mergekit-yaml work/sweep/merge.yaml out/\n" in recipe


def test_the_command_for_a_delta(result, relative_base):
    point = {"weight": 0.7, "density": 0.55, "layers": ()}
    changed = result | {"edited": "a b.delta", "base": relative_base, "picked": result["picked"] | {"point": point}}
    command = "mm4ke delta apply work/base 'a b.delta' -o out --weight 0.7 --density 0.55"
    assert apply_command(changed) == command
    assert f"#     {command}\n" in merge_recipe(changed, Path("out"))
    assert apply_command(result) is None, "a folder is no delta"
    point["layers"] = ((1, 0.5, 0.5),)
    assert apply_command(changed) is None, "the command has one weight for all layers"


# ---- end to end ----


def test_the_command_from_grid_to_merged_model(home, tmp_path):
    out = tmp_path / "deep" / "sweep"
    command = ["--base", home / "base", "--edited", home / "rsft.delta", "--facts", home / "facts.json"]
    command += ["--weights", "0.3,1,0.9,0.1", "--densities", "0.6,1", "--keep", "0.9", "--output", out]
    finished = run_command("mm4ke", "sweep", *command, COLUMNS="80")
    assert finished.returncode == 0, finished.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "density.png", "density.svg", "merge.yaml", "pareto.png", "pareto.svg",
        "sweep.csv", "sweep.json", "weight.png", "weight.svg",
    ]  # fmt: skip
    assert list(out.parent.iterdir()) == [out]
    written = json.loads((out / "sweep.json").read_text())
    assert written["layers"] == {"name": "model.layers", "numbers": [1, 2]}
    assert any(row["point"]["layers"] for row in written["points"])
    assert any(row["state"] == "hopeless" for row in written["points"])

    # The table says of each point what it is worth, or why it has no number.
    lines = [line.rstrip() for line in finished.stdout.splitlines()]
    assert all(len(line) <= 80 for line in lines[: lines.index("The 2 other records") + 5])
    picked = written["picked"]
    cells = [f"{picked['scores']['confirmation'][metric]:.3f}" for metric in ("edit_success", "locality")]
    (line,) = [line for line in lines[lines.index("The 2 other records") :] if line.split()[:1] == ["picked"]]
    assert set(cells) <= set(line.split())
    assert any("hopeless" in line for line in lines) and any("R-SFT" in line for line in lines)
    assert f"mergekit-yaml {out}/merge.yaml out/" in finished.stdout

    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert len(rows) == 1 + len(written["points"]) + len([1 for r in written["points"] if len(r["scores"]) > 1]) + 1
    (chosen,) = [row for row in rows if row["picked"] == "True" and row["half"] == "choice"]
    assert float(chosen["locality"]) == picked["scores"]["choice"]["locality"]
    assert {row["locality"] for row in rows if row["state"] == "hopeless"} == {""}
    for figure in ("weight", "density", "pareto"):
        assert "edit success" in (out / f"{figure}.svg").read_text()
        assert (out / f"{figure}.png").read_bytes().startswith(b"\x89PNG")

    found = merged_by_mergekit((out / "merge.yaml").read_text(), tmp_path / "merged")
    point = Point(**picked["point"] | {"layers": tuple(map(tuple, picked["point"]["layers"]))})
    expected = live_tensors(home, "rsft", point)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_an_earlier_sweep_is_replaced_and_nothing_else(result, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("sweep.json", "merge.yaml", "pareto.png"):
        (out / name).touch()
    write(result, out)
    assert json.loads((out / "sweep.json").read_text()) and (out / "pareto.png").stat().st_size
    (out / "notes.txt").touch()
    with pytest.raises(
        MM4KEError, match="out: exists and is more than an earlier sweep: notes.txt would be lost; mov"
    ):
        write(result, out)
    assert (out / "notes.txt").exists() and (out / "pareto.png").stat().st_size
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(MM4KEError, match="mine: exists and is no earlier sweep; remove it or give another folder"):
        write(result, tmp_path / "mine")
    (tmp_path / "file").touch()
    with pytest.raises(MM4KEError, match="file/out: .*/file is no folder that can be written to"):
        write(result, tmp_path / "file" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine", "out"]


# ---- bad input ----


def test_after_a_mistake_nothing_is_written(home, tmp_path):
    command = ["--base", home / "base", "--edited", tmp_path / "typo", "--facts", home / "facts.json"]
    finished = CliRunner().invoke(cli, ["sweep", *map(str, command), "--output", str(tmp_path / "out")])
    assert str(finished.exception) == (
        f"--edited {tmp_path}/typo: no such file; give the folder of R-SFT's model, or a knowledge delta"
    )
    assert list(tmp_path.iterdir()) == []


def wrong_base(copy):
    shutil.rmtree(copy / "base")
    make_tiny_model(copy / "base", dtype=torch.bfloat16, seed=7)
    return {"edited": copy / "one.delta"}


def other_dtype(copy):
    shutil.rmtree(copy / "base")
    make_tiny_model(copy / "base", dtype=torch.float16)
    return {"edited": copy / "one.delta"}


def other_architecture(copy):
    shutil.rmtree(copy / "base")
    make_tiny_model(copy / "base", "phi3", dtype=torch.bfloat16)
    return {"edited": copy / "one.delta"}


def other_model(copy):
    shutil.rmtree(copy / "base")
    make_tiny_model(copy / "base", "qwen2")


def finished_delta(copy):
    extract(copy / "base", copy / "one", copy / "finished", 0.5, 0.5)
    return {"edited": copy / "finished"}


def cut_delta(copy):
    path = copy / "one.delta"
    path.write_bytes(path.read_bytes()[:-10])
    return {"edited": path}


def no_base(copy):
    shutil.rmtree(copy / "base")


def one_record(copy):
    (copy / "facts.json").write_text(json.dumps(FACTS[:1]))


def no_record(copy):
    (copy / "facts.json").write_text("[]")


def other_facts(copy):
    facts = [{"prompt": f"What is {n} times {n}?", "target_new": "###"} for n in range(4)]
    (copy / "facts.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": 0}, r"^--keep 0: give a share above 0, up to 1 \(default 0.97\)"),
        ({"keep": 97}, r"^--keep 97: give a share above 0"),
        ({"keep": float("nan")}, r"^--keep nan: give a share"),
        ({"weights": []}, r"^--weights: none given; give numbers with commas"),
        ({"weights": [0.5, 80.0]}, r"^weight: 80.0: give a number from -10 to 10"),
        ({"densities": [0.0, 0.5]}, r"^density: 0.0: give a share above 0, up to 1"),
        ({"densities": [float("nan")]}, r"^density: nan: give a share"),
        ({"limit": 1}, r"facts.json: 1 record; give at least 2, one half decides and the other confirms"),
        (one_record, r"facts.json: 1 record; give at least 2"),
        (no_record, r"facts.json: no records"),
        (
            other_facts,
            r"models/one on .*facts.json: edit success .* at weight 1 .*, the base has .*; give the facts that",
        ),
        (wrong_base, r"holds other numbers than the base that .*models/one.delta was taken from; give that base"),
        (other_dtype, r"is bfloat16, .*one.delta was taken from bfloat16|holds other numbers than the base"),
        (other_architecture, r"models/one.delta: model.layers.1.mlp.gate_proj.weight is not in the live Phi3"),
        (other_model, r"models/one: is a LlamaForCausalLM, .*models/base a Qwen2ForCausalLM"),
        (finished_delta, r"models/finished: is finished \(weight 0.5, density 0.5\), so there is nothing to choose"),
        (cut_delta, r"models/one.delta: not a readable safetensors file"),
        (no_base, r"^--base .*models/base: no such folder; give the folder of the base model"),
        (lambda copy: {"edited": copy / "base"}, r"models/base: equals .*models/base, so there is no delta"),
        (lambda copy: {"edited": copy / "facts.json"}, r"facts.json: not a readable safetensors file"),
        (lambda copy: {"facts": copy / "none.json"}, r"none.json: No such file"),
    ],
)
def test_refusals_name_what_is_wrong_and_what_would_be_right(home, tmp_path, change, message):
    copy = tmp_path / "models"
    shutil.copytree(home, copy)
    arguments = {"base": copy / "base", "edited": copy / "one", "facts": copy / "facts.json"}
    arguments |= (change(copy) or {}) if callable(change) else change
    with pytest.raises(MM4KEError, match=message) as caught:
        sweep(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("numbers", ["", "0.5;0.6", "half"])
def test_a_grid_is_written_with_commas(home, numbers):
    command = ["--base", home / "base", "--edited", home / "one", "--facts", home / "facts.json"]
    finished = CliRunner().invoke(cli, ["sweep", *map(str, command), "--weights", numbers])
    assert str(finished.exception) == f"--weights {numbers!r}: give numbers with commas, such as 0.6,0.8,1"
