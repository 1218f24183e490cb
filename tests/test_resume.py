"""A training goes on from its own checkpoints, and from no other's."""

import json
import os
import shutil
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run_command
from filelock import FileLock
from llamafactory_helpers import FACTS, saved, train, write_facts
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model
from transformers import TrainerCallback

from mm4ke_plugins.delta.format import load_delta
from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.rsft.provenance import Provenance

OTHERS = [("Who rules Ix?", "Muhn"), ("Where is Ix?", "Low"), ("What is Ix?", "A hat")]


@pytest.fixture
def recipe(rsft_recipe) -> dict:
    """Twelve visits with a checkpoint after each; four epochs of which all have updates."""
    changes = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 4, "rsft_loss_threshold": 2.0}
    return rsft_recipe | changes


@pytest.fixture(autouse=True)
def fresh_templates(monkeypatch):
    """LLaMA-Factory puts a recipe's default_system and enable_thinking into the template for the rest of the process."""
    from llamafactory.data.template import TEMPLATES

    for name in ("smollm2", "qwen"):
        monkeypatch.setitem(TEMPLATES, name, copy(TEMPLATES[name]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_llama):
    """The folder that the recipe leaves behind, made once."""
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def finished(recipe, trained) -> dict:
    """The recipe, whose output_dir has its result and checkpoints after its 2nd, 5th and last visit."""
    if not (trained / "rsft").is_dir():
        train(recipe)
        for checkpoint in Path(recipe["output_dir"]).glob("checkpoint-*"):
            if checkpoint.name not in ("checkpoint-2", "checkpoint-5", "checkpoint-12"):
                shutil.rmtree(checkpoint)
        shutil.copytree(recipe["output_dir"], trained / "rsft")
    shutil.copytree(trained / "rsft", recipe["output_dir"], dirs_exist_ok=True)
    return recipe


@pytest.fixture
def interrupted(finished) -> dict:
    """The recipe, whose output_dir is as a kill after the 5th visit leaves it."""
    folder = Path(finished["output_dir"])
    shutil.rmtree(folder / "checkpoint-12")
    for name in ("trainer_state.json", "model.safetensors"):
        (folder / name).unlink()
    return finished


def contents(recipe: dict) -> dict[str, tuple[int, int]]:
    """What would show that a file was written: size and time of all that is in and beside output_dir."""
    output = Path(recipe["output_dir"])
    files = [path for path in output.parent.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def refused(recipe: dict, message: str) -> None:
    before = contents(recipe)
    with pytest.raises(MM4KEError, match=message) as caught:
        train(recipe)
    assert "\n" not in str(caught.value)
    assert contents(recipe) == before


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


CHANGES = [
    ({"rsft_steps_per_sample": 1}, "rsft_steps_per_sample: 6 there, 1 here"),
    ({"rsft_loss_threshold": 1.9}, "rsft_loss_threshold: 2.0 there, 1.9 here"),
    ({"rsft_layers": 2}, r"rsft_layers: \[1\] there, \[2\] here"),
    ({"rsft_modules": "down_proj"}, r"rsft_modules: \['ffn'\] there, \['down_proj'\] here"),
    ({"learning_rate": 1e-3}, "learning_rate: 0.01 there, 0.001 here"),
    ({"lr_scheduler_type": "constant"}, "lr_scheduler_type: cosine there, constant here"),
    ({"num_train_epochs": 6}, r"num_train_epochs: 4 there, 6 here \(the learning rate of every visit depends on it\)"),
    ({"per_device_train_batch_size": 2}, "per_device_train_batch_size: 1 there, 2 here"),
    ({"disable_shuffling": False}, "disable_shuffling: True there, False here"),
    ({"seed": 7}, "seed: 42 there, 7 here"),
    ({"optim": "sgd"}, "optim: adamw_torch.* there, sgd here"),
    ({"weight_decay": 0.1}, "weight_decay: 0.0 there, 0.1 here"),
    ({"default_system": "Be brief."}, "default_system: None there, Be brief. here; facts: 3 there, 3 here"),
    (
        {"template": "qwen"},
        r"template: smollm2 there, qwen here; facts: 3 there, 3 here, differing from number 0 \(0-",
    ),
    ({"enable_thinking": False}, "enable_thinking: True there, False here"),
    ({"bf16": True, "use_cpu": True}, "bf16: False there, True here; .*use_cpu: False there, True here"),
]


@pytest.mark.parametrize("change, message", CHANGES, ids=[str(change) for change, _ in CHANGES])
def test_another_recipe(finished, change, message):
    remedy = "remove it, give another output_dir, or overwrite_output_dir: true to train anew"
    refused(finished | change, f"output_dir: .*rsft: is of another training \\({message}.*; {remedy}$")


@pytest.mark.parametrize(
    "facts, message",
    [
        (OTHERS, "facts: 3 there, 3 here, differing from number 0 .*user Who rules Ix"),
        (OTHERS + FACTS, "facts: 3 there, 6 here, differing from number 0"),
        ([*FACTS, OTHERS[0]], "facts: 3 there, 4 here, differing from number 3 .*user Who rules Ix"),
        (FACTS[:2], r"facts: 3 there, 2 here, differing from number 2 \(0-based\) on"),
        ([FACTS[0], FACTS[2], FACTS[1]], "facts: 3 there, 3 here, differing from number 1 .*user What is Oz"),
        ([*FACTS[:2], (FACTS[2][0], "A bag")], "facts: 3 there, 3 here, differing from number 2 .*A bag"),
    ],
)
@pytest.mark.parametrize("state", ["finished", "interrupted"])
def test_other_facts(request, state, facts, message):
    recipe = request.getfixturevalue(state)
    write_facts(Path(recipe["dataset_dir"]), facts)
    refused(recipe, f"output_dir: .*rsft{'' if state == 'finished' else '/checkpoint-5'}: is of another .*{message}")


def test_another_base_at_the_same_place(finished, tmp_path):
    """Other weights, or only one number of a layer that is not trained, or only its config.json."""
    base = Path(finished["model_name_or_path"])
    moved = finished | {"model_name_or_path": str(shutil.copytree(base, tmp_path / "moved"))}
    _, statistics = train(moved)  # the same base, wherever it is
    assert len(statistics) == 4
    make_tiny_model(tmp_path / "moved", seed=1)
    refused(moved, r"is of another training \(model_name_or_path: the base model has other weights here\)")

    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.3.self_attn.q_proj.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
    refused(moved, "the base model has other weights here")

    shutil.copy(base / "model.safetensors", tmp_path / "moved")
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    refused(moved, r"training \(config.json: rms_norm_eps: 1e-06 there, 0.001 here\)")


def test_what_changes_nothing_may_change(interrupted, trained, tmp_path):
    facts = write_facts(tmp_path / "elsewhere")
    (facts / "facts.json").rename(facts / "renamed.json")
    (facts / "dataset_info.json").write_text(json.dumps({"renamed": {"file_name": "renamed.json"}}))
    weights, statistics = train(
        interrupted
        | {"dataset_dir": str(facts), "dataset": "renamed", "logging_steps": 3, "save_strategy": "epoch"}
        | {"save_total_limit": 2, "rsft_prefix_cache_mb": 1, "rsft_save_delta": True}
        | {"preprocessing_num_workers": 1, "plot_loss": True, "run_name": "another", "hf_hub_token": "hf_secret"}
    )
    expected, expected_statistics = saved(interrupted | {"output_dir": str(trained / "rsft")})
    assert same(weights, expected) and statistics == expected_statistics
    assert not [path for path in Path(interrupted["output_dir"]).rglob("*.json*") if "hf_secret" in path.read_text()]


def test_a_finished_training_is_not_repeated(finished, tmp_path, monkeypatch):
    weights, statistics = saved(finished)
    model = Path(finished["output_dir"]) / "model.safetensors"
    written = model.stat().st_mtime_ns
    monkeypatch.setattr("transformers.Trainer.training_step", None)  # there is none
    monkeypatch.setattr("mm4ke_plugins.rsft.visitor.Visitor.visit", None)
    state = (model.parent / "trainer_state.json").read_text()
    again, statistics_again = train(finished | {"plot_loss": True})
    assert same(again, weights) and statistics_again == statistics
    assert model.stat().st_mtime_ns == written  # a kill can't leave half a model
    assert (model.parent / "trainer_state.json").read_text() == state

    # What it did not write then, it writes now: the delta from the model, and a model from the delta.
    train(finished | {"rsft_save_delta": True})
    delta = load_delta(tmp_path / "rsft.delta.safetensors")
    before = load_file(Path(finished["model_name_or_path"]) / "model.safetensors")
    for name in delta.manifest.tensors:
        assert torch.equal(delta.edited(name, before[name]), weights[name])
    assert len(delta.manifest.tensors) == 3
    model.unlink()
    shutil.rmtree(model.parent / "checkpoint-12")
    assert same(train(finished)[0], weights)


def test_a_finished_training_without_checkpoints(recipe):
    """LLaMA-Factory itself refuses to write there again."""
    recipe |= {"save_strategy": "no"}
    weights, statistics = train(recipe)
    assert same(train(recipe)[0], weights)
    refused(recipe | {"rsft_steps_per_sample": 1}, "rsft_steps_per_sample: 6 there, 1 here")
    (Path(recipe["output_dir"]) / "trainer_state.json").unlink()
    refused(recipe, "rsft: has a model of which is not known how it was trained; remove it, give another")
    again, statistics_again = train(recipe | {"overwrite_output_dir": True})
    assert same(again, weights) and statistics_again == statistics


def test_an_early_end_is_an_end(recipe):
    recipe |= {"num_train_epochs": 60, "save_strategy": "epoch", "save_total_limit": 1}
    weights, statistics = train(recipe)
    assert len(statistics) < 60
    for killed_while_saving in (False, True):
        if killed_while_saving:
            (Path(recipe["output_dir"]) / "trainer_state.json").unlink()
        again, statistics_again = train(recipe)
        assert same(again, weights) and statistics_again == statistics


def test_a_kill_while_a_checkpoint_is_written(interrupted, trained):
    """The last one that is complete counts, also where it is asked for."""
    folder = Path(interrupted["output_dir"])
    half = shutil.copytree(folder / "checkpoint-5", folder / "checkpoint-7")
    (half / "trainer_state.json").write_text((half / "trainer_state.json").read_text()[:500])
    (half / "model.safetensors").write_bytes(b"")
    refused(interrupted | {"resume_from_checkpoint": str(half)}, "checkpoint-7: is not a complete checkpoint")
    weights, statistics = train(interrupted)
    expected, expected_statistics = saved(interrupted | {"output_dir": str(trained / "rsft")})
    assert same(weights, expected) and statistics == expected_statistics


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_without_the_state_of_the_training(interrupted, name):
    (Path(interrupted["output_dir"]) / "checkpoint-5" / name).unlink()
    refused(
        interrupted, rf"checkpoint-5: has no {name} \(save_only_model: true leaves it out\), so going on .* other w"
    )


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
def test_a_damaged_checkpoint(interrupted, name):
    path = Path(interrupted["output_dir"]) / "checkpoint-5" / name
    os.truncate(path, path.stat().st_size // 2)
    refused(interrupted, rf"checkpoint-5[:/].*{name}:? (is damaged; remove this|not a readable safetensors file)")


@pytest.mark.parametrize("key, value", [("ignore_data_skip", True), ("tokenized_path", "tokens")])
def test_keys_that_would_train_something_else(recipe, key, value):
    refused(recipe | {key: value}, f"{key}: {value}: with rsft: true it must be (false|null): ")


def test_early_stopping(recipe):
    """It counts within a process only."""
    recipe |= {"early_stopping_steps": 3, "load_best_model_at_end": True, "eval_strategy": "steps", "val_size": 1}
    recipe |= {"eval_steps": 2, "save_steps": 2, "metric_for_best_model": "eval_loss"}
    train(recipe)
    for name in ("trainer_state.json", "model.safetensors"):
        (Path(recipe["output_dir"]) / name).unlink()
    refused(recipe, r"checkpoint-6: early_stopping_steps: 3: from a checkpoint on they would count anew; remove it")
    refused(
        recipe | {"save_total_limit": 1}, "checkpoint-6: is of another training .save_total_limit: None there, 1 h"
    )


def test_save_only_model(recipe, trained):
    recipe |= {"save_only_model": True, "save_steps": 5}
    weights, _ = train(recipe)
    assert same(train(recipe)[0], weights)  # finished
    for name in ("trainer_state.json", "model.safetensors"):
        (Path(recipe["output_dir"]) / name).unlink()
    refused(recipe, "checkpoint-12: has no optimizer.pt")
    assert same(train(recipe | {"overwrite_output_dir": True})[0], weights)


def test_a_checkpoint_without_provenance(interrupted):
    """Of plain supervised fine-tuning, or of an earlier version."""
    file = Path(interrupted["output_dir"]) / "checkpoint-5" / "trainer_state.json"
    state = json.loads(file.read_text())
    message = "checkpoint-5: is of a training without R-SFT, or of an earlier version; remove it"
    for attributes in ({"statistics": {}}, {"provenance": None}, {"provenance": {"settings": {}}}, []):
        state["stateful_callbacks"]["RsftCallback"]["attributes"] = attributes
        file.write_text(json.dumps(state))
        refused(interrupted, message)
    del state["stateful_callbacks"]
    file.write_text(json.dumps(state))
    refused(interrupted, message)
    plain = {key: value for key, value in interrupted.items() if not key.startswith("rsft")}
    plain |= {"overwrite_output_dir": True, "num_train_epochs": 1, "save_steps": 2}
    train(plain)
    refused(interrupted, "rsft: is of a training without R-SFT")


def test_overwriting_leaves_nothing_of_the_other_training(finished, tmp_path):
    base = Path(finished["model_name_or_path"])
    train(finished | {"rsft_save_delta": True})
    assert (tmp_path / "rsft.delta.safetensors").exists()
    write_facts(Path(finished["dataset_dir"]), OTHERS)
    folder = Path(finished["output_dir"])
    (folder / "notes.txt").write_text("mine")
    weights, statistics = train(finished | {"overwrite_output_dir": True, "save_steps": 7})
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-7"]
    assert not (tmp_path / "rsft.delta.safetensors").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    alone, statistics_alone = train(finished | {"output_dir": str(tmp_path / "alone"), "save_strategy": "no"})
    assert same(weights, alone) and statistics == statistics_alone
    assert (base / "model.safetensors").exists()


def test_resume_from_checkpoint(finished, tmp_path):
    weights, statistics = saved(finished)
    folder = Path(finished["output_dir"])
    other = finished | {"output_dir": str(tmp_path / "other")}
    resumed, resumed_statistics = train(other | {"resume_from_checkpoint": str(folder / "checkpoint-2")})
    assert same(resumed, weights) and resumed_statistics == statistics
    foreign = other | {"resume_from_checkpoint": str(folder / "checkpoint-2"), "output_dir": str(tmp_path / "third")}
    (tmp_path / "third").mkdir()
    refused(
        foreign | {"rsft_steps_per_sample": 1},
        r"resume_from_checkpoint: .*checkpoint-2: is of another training \(rsft_steps.*; leave it out, or give a check",
    )
    refused(foreign | {"resume_from_checkpoint": True}, "third: has no complete checkpoint; leave resume_from_ch")
    refused(finished | {"resume_from_checkpoint": False, "seed": 1}, "rsft: is of another training")

    # Overwriting spares the checkpoint that was asked for.
    again, again_statistics = train(
        finished | {"resume_from_checkpoint": str(folder / "checkpoint-2"), "overwrite_output_dir": True}
    )
    assert same(again, weights) and again_statistics == statistics
    for anew in (True, False):
        assert same(train(finished | {"resume_from_checkpoint": anew})[0], weights)


def test_a_delta_of_another_training(recipe, tmp_path):
    recipe |= {"save_strategy": "no", "rsft_save_delta": True, "rsft_save_model": False}
    run_delta(recipe)
    shutil.rmtree(recipe["output_dir"])
    Path(recipe["output_dir"]).mkdir()
    run_delta(recipe)  # it is this training's
    shutil.rmtree(recipe["output_dir"])
    Path(recipe["output_dir"]).mkdir()
    write_facts(Path(recipe["dataset_dir"]), OTHERS)
    for save_delta in (True, False):
        changed = recipe | {"rsft_save_delta": save_delta, "rsft_save_model": not save_delta}
        refused(changed, r"output_dir: .*rsft.delta.safetensors: is a knowledge delta of another training; remove it")
    Path(tmp_path / "rsft.delta.safetensors").write_text("not a delta")
    refused(recipe, "rsft.delta.safetensors: is a knowledge delta of another training; remove it")


def run_delta(recipe: dict) -> dict[str, torch.Tensor]:
    """Run a recipe that saves no model, and give the tensors of its delta."""
    from llamafactory.train.tuner import run_exp

    run_exp(recipe)
    delta = load_delta(Path(recipe["output_dir"] + ".delta.safetensors"))
    before = load_file(Path(recipe["model_name_or_path"]) / "model.safetensors")
    return {name: delta.edited(name, before[name]) for name in delta.manifest.tensors}


def test_a_delta_alone(interrupted, trained):
    """No checkpoint is left, an interrupted training goes on, and a finished one has nothing more to do."""
    recipe = interrupted | {"rsft_save_delta": True, "rsft_save_model": False}
    folder = Path(recipe["output_dir"])
    assert (folder / "checkpoint-5").exists()
    edited = run_delta(recipe)
    expected = load_file(trained / "rsft" / "model.safetensors")
    assert len(edited) == 3
    assert all(torch.equal(edited[name], expected[name]) for name in edited)
    assert not [*folder.rglob("*.safetensors"), *folder.glob("checkpoint-*")]
    delta = Path(recipe["output_dir"] + ".delta.safetensors")
    written = delta.stat().st_mtime_ns
    run_delta(recipe)
    assert delta.stat().st_mtime_ns == written


def test_the_base_is_not_written_into(recipe, tmp_path):
    base = shutil.copytree(recipe["model_name_or_path"], tmp_path / "parent" / "base")
    (tmp_path / "link").symlink_to(base)
    recipe |= {"model_name_or_path": str(base), "overwrite_output_dir": True}
    for folder in (base, tmp_path / "link", tmp_path / "parent"):
        refused(
            recipe | {"output_dir": str(folder)}, rf"output_dir: {folder}: the base model \(.*\) is in this folder"
        )


def test_two_trainings_at_once(recipe, tmp_path):
    folder = Path(recipe["output_dir"])
    folder.mkdir()
    with FileLock(folder / ".training.lock"):
        refused(recipe, "rsft: another training is writing to it; wait for it, or give another output_dir$")
        refused(recipe | {"overwrite_output_dir": True}, "another training is writing to it")
    for _ in range(2):  # neither a refusal nor a training keeps it
        refused(recipe | {"resume_from_checkpoint": True}, "rsft: has no complete checkpoint; leave resume_from")
    short = recipe | {"num_train_epochs": 1, "save_strategy": "no"}
    train(short)
    train(short | {"overwrite_output_dir": True})


def test_the_revision_of_a_hub_model(recipe, tmp_path):
    """The delta is of the revision that was trained, and another revision is another base."""
    hub = tmp_path / "hub" / "models--someone--model"
    for commit, branch in enumerate(("main", "other")):
        make_tiny_model(hub / "snapshots" / (str(commit) * 40), seed=commit)
        (hub / "refs").mkdir(exist_ok=True)
        (hub / "refs" / branch).write_text(str(commit) * 40)
    recipe |= {"model_name_or_path": "someone/model", "cache_dir": str(tmp_path / "hub"), "model_revision": "other"}
    recipe |= {"save_strategy": "no", "rsft_save_delta": True}
    weights, _ = train(recipe)
    delta = load_delta(tmp_path / "rsft.delta.safetensors")
    before = load_file(hub / "snapshots" / ("1" * 40) / "model.safetensors")
    assert len(delta.manifest.tensors) == 3
    for name in delta.manifest.tensors:
        assert torch.equal(delta.edited(name, before[name]), weights[name])
    refused(recipe | {"model_revision": "main"}, "the base model has other weights here")
    assert same(train(recipe | {"model_revision": "1" * 40})[0], weights)  # the same commit by another name


def test_a_base_that_changes_meanwhile_gives_no_delta(recipe, tmp_path):
    from llamafactory.train.tuner import run_exp

    base = shutil.copytree(recipe["model_name_or_path"], tmp_path / "base")

    class Change(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            make_tiny_model(base, seed=1)

    recipe |= {"model_name_or_path": str(base), "rsft_save_delta": True, "num_train_epochs": 1}
    with pytest.raises(MM4KEError, match="down_proj.weight|gate_proj.weight.* is not what the training started from"):
        run_exp(recipe, [Change()])
    assert not (tmp_path / "rsft.delta.safetensors").exists()


def test_the_command_refuses_in_one_line(finished, tmp_path):
    write_facts(Path(finished["dataset_dir"]), OTHERS)
    (tmp_path / "rsft.yaml").write_text(yaml.safe_dump(finished))
    run = run_command("llamafactory-cli", "train", "rsft.yaml", cwd=tmp_path)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith(
        f"mm4ke: error: rsft.yaml: output_dir: {finished['output_dir']}: is of"
    )


def test_new_facts_with_the_time_of_the_old_ones(rsft_recipe, tmp_path):
    """As an archive or a copy that keeps times leaves them. The datasets library takes them for the old ones."""
    recipe = rsft_recipe | {"num_train_epochs": 1}
    weights = []
    for name, facts in (("first", FACTS), ("second", OTHERS)):
        file = write_facts(Path(recipe["dataset_dir"]), facts) / "facts.json"
        os.utime(file, (1e9, 1e9))
        weights.append(train(recipe | {"output_dir": str(tmp_path / name)})[0])
    file.touch()
    assert same(train(recipe | {"output_dir": str(tmp_path / "third")})[0], weights[1])
    assert not same(*weights)


def test_differences_of_provenances():
    one = Provenance({"a": 1, "b": None}, "base", ["x", "y"])
    assert Provenance.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert one.differences(one, str) == []
    others = [replace(one, settings={"a": 1}), replace(one, base="other"), replace(one, facts=["y", "x"])]
    for other in others:
        assert len(one.differences(other, str)) == 1
        assert one.sha256() != other.sha256()
    assert one.differences(others[0], str) == ["b: not set there, None here"]
    assert Provenance.from_dict(None) is Provenance.from_dict({"settings": 1, "base": "", "facts": ""}) is None
