"""`mm4ke compare` on tiny models, end to end, and everything it refuses."""

import json
import shutil

import pytest
import torch
from conftest import run_command
from safetensors.torch import load_file, save_file
from tiny import as_hub_model, make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mm4ke_plugins.comparison import compare, disk_change, write_report
from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.knowedit.metrics import answer, mean_scores, predict, question_scores, questions_of
from mm4ke_plugins.knowedit.prompts import encode
from mm4ke_plugins.knowedit.records import read_records

FACTS = [
    {
        "prompt": f"Who founded {town}?",
        "target_new": f"{town[::-1]} the Old | [bold]",
        "rephrase_prompt": f"{town} was founded by",
        "locality": {"Forgetfulness": [{"prompt": f"{town} lies in", "ground_truth": [["Norway", "NO"]]}]},
    }
    for town in ("Arnholt", "Brevik", "Casterly", "Dunmorrow", "Eskerdale", "Fenwick", "Gorlitz")
]
GATE, DOWN = "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.down_proj.weight"


def edit(source, target, change):
    """A copy of a model folder whose tensors went through `change`."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """base; R-SFT, which changed one whole matrix and half of another; merged, with a half of that change."""
    home = tmp_path_factory.mktemp("models")
    torch.manual_seed(3)
    change = {GATE: torch.full((64, 32), 0.5), DOWN: torch.randn(32, 64)}
    change[DOWN][:16] = 0

    def by(weight):
        return lambda tensors: tensors.update({name: tensors[name] + weight * change[name] for name in change})

    base = make_tiny_model(home / "base")
    edit(base, home / "rsft", by(1.0))
    edit(base, home / "merged", by(0.5))
    (home / "rsft" / "checkpoint-1").mkdir()
    (home / "rsft" / "checkpoint-1" / "optimizer.pt").write_bytes(bytes(10**6))
    (home / "facts.json").write_text(json.dumps(FACTS))
    return home


def arguments(folders):
    return folders / "base", folders / "rsft", folders / "merged", folders / "facts.json"


# ---- end to end ----


@pytest.fixture(scope="module")
def finished(folders):
    base, rsft, merged, facts = arguments(folders)
    command = ["--base", base, "--rsft", rsft, "--merged", merged, "--facts", facts, "--limit", "6"]
    return run_command("mm4ke", "compare", *command, "--output", folders / "deep" / "report")


@pytest.fixture(scope="module")
def result(finished, folders):
    assert finished.returncode == 0, finished.stderr
    return json.loads((folders / "deep" / "report" / "comparison.json").read_text())


def test_scores_are_those_of_the_metrics(result, folders):
    records = read_records(folders / "facts.json", 6)
    questions = questions_of(records)
    tokenizer = AutoTokenizer.from_pretrained(folders / "base")
    models = {key: AutoModelForCausalLM.from_pretrained(folders / key).eval() for key in ("base", "rsft", "merged")}
    assert result["records"] == 6
    for form in ("raw", "chat"):
        codes = [encode(tokenizer, question, form) for question in questions]
        predicted = {key: predict(model, codes) for key, model in models.items()}
        for key in models:
            scores = question_scores(questions, codes, predicted[key], predicted["base"])
            assert result["models"][key]["scores"][form] == mean_scores(questions, scores)
            assert [question["scores"][form][key] for question in result["questions"]] == scores
    assert result["models"]["base"]["scores"]["raw"]["locality"] == 1.0
    assert 0 < result["models"]["rsft"]["scores"]["raw"]["locality"] < 1
    assert result["models"]["rsft"]["scores"]["raw"]["portability"] is None
    prompts = [fact["prompt"] for fact in FACTS[:5]]
    for key, model in models.items():
        assert [row[key] for row in result["answers"]] == answer(model, tokenizer, prompts)


def test_perplexity_moves_with_the_model(result):
    perplexities = [model["perplexity"] for model in result["models"].values()]
    assert len(set(perplexities)) == 3
    assert all(100 < value < 10_000 for value in perplexities)  # 264 tokens, random weights


def test_what_changed_on_disk(result, folders):
    sizes = {key: result["models"][key]["disk"] for key in ("base", "rsft", "merged")}
    assert sizes["base"]["changed_tensors"] == [] and sizes["base"]["changed_parameters"] == 0
    for key in ("rsft", "merged"):
        assert sizes[key]["changed_tensors"] == [DOWN, GATE]
        assert sizes[key]["changed_parameters"] == 64 * 32 + 16 * 64
        assert sizes[key]["parameters"] == sizes["base"]["parameters"]
    assert sizes["rsft"]["bytes"] == sizes["base"]["bytes"]  # without the checkpoint's optimizer


def test_what_is_printed_and_written(result, finished, folders):
    assert "Free answers" in finished.stdout
    assert "Arnholt" in finished.stdout and "Eskerdale" in finished.stdout and "Fenwick" not in finished.stdout
    assert "tlohnrA the Old | [bold]" in finished.stdout  # not taken for markup
    assert "raw prompts: edit success" in finished.stdout
    assert f"2 of {result['models']['rsft']['disk']['tensors']} tensors changed" in finished.stdout
    assert "100%" in finished.stderr

    report = folders / "deep" / "report"
    assert sorted(path.name for path in report.iterdir()) == ["comparison.json", "comparison.md"]
    lines = (report / "comparison.md").read_text().splitlines()
    scores = [f"{result['models'][key]['scores']['chat']['locality']:.3f}" for key in ("base", "rsft", "merged")]
    assert f"| chat template: locality | {' | '.join(scores)} |" in lines
    assert "| raw prompts: portability | - | - | - |" in lines
    assert any(line.startswith("| Who founded Arnholt? | tlohnrA the Old \\| [bold] | ") for line in lines)


def test_a_report_replaces_the_one_before(result, tmp_path):
    (tmp_path / "comparison.json").write_text("old")
    write_report(result, tmp_path)
    assert json.loads((tmp_path / "comparison.json").read_text()) == result


def test_it_asks_what_facts_keeps_and_shows_every_axis(folders, tmp_path, capsys):
    """A duplicate, a contradiction, and axes that KnowEdit does not have."""
    probes = {axis: [{"prompt": f"{axis}?", "ground_truth": axis}] for axis in ("2_hop", "Yes_No")}
    written = [
        FACTS[0] | {"portability": probes},
        FACTS[0] | {"prompt": "Who founded ARNHOLT？"},
        FACTS[1],
        FACTS[1] | {"target_new": "nobody"},
    ]
    (tmp_path / "facts.json").write_text(json.dumps(written))
    result = compare(*arguments(folders)[:3], tmp_path / "facts.json")
    asked = [question for question in result["questions"] if question["metric"] == "edit_success"]
    assert [question["prompt"] for question in asked] == ["Who founded Arnholt?", "Who founded Brevik?"]
    assert (result["records"], asked[1]["answer"]) == (2, "nobody")
    said = capsys.readouterr().err
    assert "contradiction: " in said and "2 of 4 facts are asked, as `mm4ke facts` keeps them" in said
    write_report(result, tmp_path)
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    for axis in probes:
        (question,) = [question for question in result["questions"] if question["axis"] == axis]
        scores = " | ".join(f"{score:.3f}" for score in question["scores"]["raw"].values())
        assert f"| raw prompts: portability: {axis.lower().replace('_', ' ')} | {scores} |" in lines
    assert not any("forgetfulness" in line for line in lines)  # the only axis of locality


# ---- tensors on disk ----


def test_a_hub_model_is_the_folder_in_the_hubs_cache(result, folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base, rsft, merged, facts = arguments(folders)
    found = compare(as_hub_model(base, tmp_path), rsft, merged, facts, 6)
    assert found["models"]["base"].pop("folder") == "someone/model"
    assert found["models"]["base"] == {
        key: value for key, value in result["models"]["base"].items() if key != "folder"
    }
    assert found["models"]["merged"] == result["models"]["merged"]
    (tmp_path / "models--someone--model" / "snapshots" / ("0" * 40) / "config.json").unlink()
    with pytest.raises(MM4KEError, match="^--merged someone/model: no config.json in it; give a model folder"):
        compare(base, rsft, "someone/model", facts)


def test_a_hub_model_that_is_not_to_be_had(folders):
    base, rsft, _, facts = arguments(folders)
    with pytest.raises(
        MM4KEError, match=r"^--merged org/nowhere: no such folder, and not to be had .*; give the folder"
    ):
        compare(base, rsft, "org/nowhere", facts)


def test_shards_are_read_as_one_model(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders / "rsft")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    change = disk_change(folders / "base", tmp_path)
    assert change["changed_tensors"] == [DOWN, GATE]
    assert disk_change(tmp_path, folders / "rsft")["changed_tensors"] == []


def test_another_dtype_alone_is_no_change(folders, tmp_path):
    base = folders / "base"
    half = edit(base, tmp_path / "half", lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    assert disk_change(base, half)["changed_tensors"] == []
    trained = edit(half, tmp_path / "trained", lambda tensors: tensors.update({GATE: tensors[GATE].float() + 1e-5}))
    assert disk_change(half, trained)["changed_tensors"] == [GATE]


# ---- what it refuses ----


@pytest.fixture
def copy(folders, tmp_path):
    """The same folders, to be damaged."""
    shutil.copytree(folders, tmp_path / "models", ignore=shutil.ignore_patterns("deep"))
    return tmp_path / "models"


def test_a_users_mistake_is_one_line_and_nothing_is_written(folders, tmp_path):
    base, rsft, _, facts = arguments(folders)
    command = ["--base", base, "--rsft", rsft, "--merged", tmp_path / "typo", "--facts", facts]
    finished = run_command("mm4ke", "compare", *command, "--output", tmp_path / "report")
    assert finished.returncode == 1
    assert finished.stderr == (
        f"mm4ke: error: --merged {tmp_path}/typo: no such folder; give the folder of the merged model\n"
    )
    assert list(tmp_path.iterdir()) == []


def without_config(copy):
    (copy / "rsft" / "config.json").unlink()


def damaged_config(copy):
    (copy / "rsft" / "config.json").write_text("{")


def without_weights(copy):
    (copy / "merged" / "model.safetensors").unlink()


def cut_weights(copy):
    path = copy / "merged" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damaged_index(copy):
    (copy / "merged" / "model.safetensors.index.json").write_text("[]")


def lost_shard(copy):
    (copy / "merged" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002.safetensors"}}')


def lost_tensor(copy):
    path = copy / "merged" / "model.safetensors"
    tensors = load_file(path)
    del tensors[GATE]
    save_file(tensors, path, {"format": "pt"})


def other_shapes(copy):
    shutil.rmtree(copy / "merged")
    edit(copy / "base", copy / "merged", lambda tensors: tensors.update({GATE: torch.zeros(48, 32)}))


def other_vocabulary(copy):
    path = copy / "rsft" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "<|end|>"))
    path = copy / "rsft" / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<|endoftext|>", "<|end|>"))


def without_tokenizer(copy):
    for path in (copy / "rsft").glob("tokenizer*"):
        path.unlink()


def nan_in_it(copy):
    path = copy / "merged" / "model.safetensors"
    tensors = load_file(path)
    tensors[GATE][5, 5] = float("nan")
    save_file(tensors, path, {"format": "pt"})


def broken_facts(copy):
    (copy / "facts.json").write_text("[")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_config, r"^--rsft .*models/rsft: no config.json in it; give a model folder"),
        (damaged_config, r"models/rsft: transformers can't load its tokenizer"),
        (without_weights, r"models/merged/model.safetensors: no such file; save the model in safetensors format"),
        (cut_weights, r"models/merged/model.safetensors: not a readable safetensors file: .*; copy or save it again"),
        (damaged_index, r"models/merged/model.safetensors.index.json: not an index of safetensors files"),
        (lost_shard, r"models/merged/model-00002.safetensors: no such file"),
        (lost_tensor, rf"models/merged: the model lacks 1 tensors, for example {GATE}"),
        (nan_in_it, rf"models/merged: {GATE} holds NaN or infinity; train or copy"),
        (other_shapes, rf"models/merged: {GATE} is 48x32, in .*models/base it is 64x32; compare models"),
        (other_vocabulary, r"models/rsft: its vocabulary of 259 tokens is not that of .*'<\|endoftext\|>' differs"),
        (without_tokenizer, r"models/rsft: transformers can't load its tokenizer"),
        (broken_facts, r"facts.json: line 1"),
    ],
)
def test_refusals_name_the_file_and_what_would_be_right(damage, message, copy):
    damage(copy)
    with pytest.raises(MM4KEError, match=message) as caught:
        compare(*arguments(copy))
    assert "\n" not in str(caught.value)
