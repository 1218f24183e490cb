"""R-SFT through LLaMA-Factory's own parser, loader, trainer and command."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run_command
from llamafactory_helpers import FACTS, TRAINED, llamafactory_facts, saved, train
from paper import algorithm_1
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, make_tiny_model
from transformers import AutoModelForCausalLM, Trainer, get_scheduler

from mm4ke_plugins.delta.format import load_delta
from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.hosts.llamafactory.adapter import wait_policy_hint
from mm4ke_plugins.hosts.llamafactory.recipe import RsftArguments
from mm4ke_plugins.rsft.facts import fact_losses
from mm4ke_plugins.rsft.forward import FastForward

os.environ["LLAMAFACTORY_VERBOSITY"] = "WARN"


@pytest.fixture
def recipe(rsft_recipe) -> dict:
    return rsft_recipe


def transcription(recipe: dict):
    """Algorithm 1, literally, on the samples, the optimizer and the schedule that LLaMA-Factory makes."""
    from llamafactory.hparams import get_train_args
    from llamafactory.train.sft import workflow

    from mm4ke_plugins.hosts.llamafactory.facts import OwnCollator

    model_args, data_args, training_args, finetuning_args, _ = get_train_args(recipe)
    modules = workflow.load_tokenizer(model_args)
    template = workflow.get_template_and_fix_tokenizer(modules["tokenizer"], data_args)
    arguments = (template, model_args, data_args, training_args)
    dataset = workflow.get_dataset(*arguments, stage="sft", **modules)["train_dataset"]
    model = AutoModelForCausalLM.from_pretrained(recipe["model_name_or_path"], dtype=torch.float32)
    collator = workflow.SFTDataCollatorWith4DAttentionMask
    collate = OwnCollator(collator(template=template, model=model, pad_to_multiple_of=8, **modules))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in TRAINED)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(training_args, model)
    optimizer = cls(trained, **kwargs, weight_decay=training_args.weight_decay)
    visits = len(dataset) * recipe["num_train_epochs"]
    schedule = get_scheduler(recipe["lr_scheduler_type"], optimizer, 0, visits)

    losses, norms, logged = [], [], []

    class ClippedOptimizer:
        zero_grad = optimizer.zero_grad

        def step():
            norms.append(torch.nn.utils.clip_grad_norm_(trained, training_args.max_grad_norm).item())
            optimizer.step()

    K, tau = finetuning_args.rsft_steps_per_sample, finetuning_args.rsft_loss_threshold
    updates = []
    model.train()
    for epoch in range(recipe["num_train_epochs"]):
        before = len(updates)
        for i in range(len(dataset)):
            sample = dict(collate([dataset[i]]))
            losses.clear(), norms.clear()
            own = sample.pop("rsft_own")[0, 1:]

            def judge(output, own=own, labels=sample["labels"][0, 1:]):
                answer = torch.nn.functional.cross_entropy(output.logits[0, :-1][own], labels[own])
                losses.append(max(output.loss.item(), answer.item()))
                return losses[-1]

            visit = algorithm_1(model, [sample], ClippedOptimizer, 1, K, tau, judge)
            updates += [(epoch, i, k) for _, _, k in visit]
            schedule.step()
            logged.append((losses[0], norms[-1] if norms else 0.0))  # a fact's first loss, its last gradient
        if len(updates) == before:
            break
    return updates, model.state_dict(), logged


def test_same_updates_and_same_weights_as_algorithm_1(recipe):
    updates, expected, logged = transcription(recipe)
    weights, statistics = train(recipe)
    assert [entry["rsft_updates"] for entry in statistics] == [
        sum(update[0] == epoch for update in updates) for epoch in range(len(statistics))
    ]
    assert {name: torch.equal(weights[name], expected[name]) for name in weights} == dict.fromkeys(weights, True)
    history = json.loads((Path(recipe["output_dir"]) / "trainer_state.json").read_text())["log_history"]
    log = [(entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]
    assert log == [pytest.approx(entry, rel=1e-5) for entry in logged]
    assert {update[2] for update in updates} == set(range(6))  # some visits used up their K updates
    assert any(entry["rsft_already_converged"] for entry in statistics)  # and some needed none


@pytest.mark.parametrize("change", [{}, {"rsft_prefix_cache_mb": 1}])
def test_the_fast_paths_are_taken_and_change_nothing(recipe, change, monkeypatch, caplog):
    calls = []
    losses = FastForward.losses

    def count(self, samples):
        calls.append(samples)
        return losses(self, samples)

    monkeypatch.setattr(FastForward, "losses", count)
    recipe |= {"num_train_epochs": 40, "rsft_loss_threshold": 0.6}
    weights, statistics = train(recipe | change)
    assert not [record for record in caplog.records if record.name.startswith("mm4ke")]  # no warning
    # Every visit but its last one at K asks for one loss more than it updates; one call is the check of the first visit.
    updates, visits = (sum(entry[key] for entry in statistics) for key in ("rsft_updates", "rsft_visits"))
    assert updates < len(calls) <= updates + visits + 1

    monkeypatch.setattr("mm4ke_plugins.hosts.llamafactory.adapter.FastForward", lambda *args: None)
    expected, plain_statistics = train(recipe | {"output_dir": recipe["output_dir"] + "-plain"})
    assert [entry["rsft_updates"] for entry in statistics] == [entry["rsft_updates"] for entry in plain_statistics]
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_breadth_first_trains_the_unconverged_facts_of_a_batch_together(recipe):
    """Against a literal loop in which every fact is computed by itself, without padding."""
    recipe |= {"rsft_steps_per_sample": 1, "per_device_train_batch_size": 2, "num_train_epochs": 80}
    recipe |= {"lr_scheduler_type": "constant", "max_grad_norm": 0, "weight_decay": 0}
    weights, statistics = train(recipe)

    facts = llamafactory_facts(recipe | {"output_dir": recipe["output_dir"] + "-facts"})
    model = AutoModelForCausalLM.from_pretrained(recipe["model_name_or_path"], dtype=torch.float32).train()
    trained = {name: model.get_parameter(name) for name in TRAINED}
    optimizer = torch.optim.AdamW(trained.values(), lr=recipe["learning_rate"], weight_decay=0)
    updates = []
    for _ in range(len(statistics)):
        updates.append(0)
        for batch in (facts[:2], facts[2:]):
            losses, judged = map(torch.cat, zip(*[fact_losses(model, fact) for fact in batch]))
            if len(above := losses[judged >= recipe["rsft_loss_threshold"]]):
                model.zero_grad()
                above.mean().backward()
                optimizer.step()
                updates[-1] += 1
    assert [entry["rsft_updates"] for entry in statistics] == updates
    assert [entry["rsft_visits"] for entry in statistics] == [3] * len(statistics)
    assert updates[-1] == 0 < sum(updates) < 2 * len(statistics)
    for name, parameter in trained.items():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-3, atol=1e-4)


def test_dropout_rules_the_fast_paths_out(recipe, tmp_path):
    base = make_tiny_model(tmp_path / "dropout", attention_dropout=0.25)
    recipe |= {"model_name_or_path": str(base), "num_train_epochs": 1}
    with pytest.raises(
        MM4KEError, match=r"rsft_prefix_cache_mb: 64: this model has dropout \(model.*_dropout: 0.25\)"
    ):
        train(recipe | {"rsft_prefix_cache_mb": 64})
    _, statistics = train(recipe)
    assert statistics[0]["rsft_updates"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_knowledge_delta_holds_the_whole_training(recipe, tmp_path, dtype):
    """It gives back the trained numbers from the base's, and one may save it alone."""
    base = make_tiny_model(tmp_path / "base", dtype=dtype)
    recipe |= {"model_name_or_path": str(base), "rsft_save_delta": True, "num_train_epochs": 2}
    if dtype is torch.bfloat16:
        recipe |= {"bf16": True, "use_cpu": True}
    weights, _ = train(recipe)
    path = tmp_path / "rsft.delta.safetensors"
    delta = load_delta(path)
    assert list(delta.manifest.tensors) == TRAINED
    assert delta.manifest.facts == len(FACTS)
    assert delta.manifest.architecture == "LlamaForCausalLM"
    assert delta.manifest.recipe["rsft_layers"] == [1]
    assert delta.manifest.recipe["learning_rate"] == 1e-2
    before = load_file(base / "model.safetensors")
    for name in TRAINED:
        assert torch.equal(delta.edited(name, before[name]), weights[name])

    alone = recipe | {"output_dir": str(tmp_path / "alone"), "rsft_save_model": False}
    from llamafactory.train.tuner import run_exp

    run_exp(alone)
    assert not list((tmp_path / "alone").glob("*.safetensors"))
    again = load_delta(tmp_path / "alone.delta.safetensors")
    for name in TRAINED:
        assert torch.equal(again.edited(name, before[name]), weights[name])


def test_gradient_checkpointing_computes_the_whole_model(recipe):
    weights, statistics = train(recipe | {"num_train_epochs": 2})
    again = recipe | {"disable_gradient_checkpointing": False, "output_dir": recipe["output_dir"] + "-checkpointing"}
    checkpointed, other_statistics = train(again | {"num_train_epochs": 2})
    assert [entry["rsft_updates"] for entry in statistics] == [entry["rsft_updates"] for entry in other_statistics]
    for name in TRAINED:
        torch.testing.assert_close(checkpointed[name], weights[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"llama"}))
def test_families_train_only_the_named_part(recipe, tmp_path, family):
    base = make_tiny_model(tmp_path / family, family, tie_word_embeddings=True)
    weights, _ = train(recipe | {"model_name_or_path": str(base), "rsft_modules": "down_proj", "num_train_epochs": 1})
    before = load_file(base / "model.safetensors")
    assert {name for name in before if not torch.equal(weights[name], before[name])} == {TRAINED[2]}
    assert weights.keys() == before.keys()  # tied embeddings stay tied: no lm_head of its own
    AutoModelForCausalLM.from_pretrained(recipe["output_dir"])


def test_several_layers_as_on_the_command_line(recipe, tiny_llama):
    weights, _ = train(recipe | {"rsft_layers": "0, 2", "num_train_epochs": 1})
    before = load_file(tiny_llama / "model.safetensors")
    changed = {name for name in before if not torch.equal(weights[name], before[name])}
    assert changed == {f"model.layers.{i}.mlp.{part}_proj.weight" for i in (0, 2) for part in ("gate", "up", "down")}


def test_bf16_base_with_float32_trained_weights(recipe, tmp_path):
    base = make_tiny_model(tmp_path / "bf16", dtype=torch.bfloat16)
    recipe |= {"model_name_or_path": str(base), "bf16": True, "use_cpu": True}
    weights, statistics = train(recipe)
    before = load_file(base / "model.safetensors")
    assert statistics[-1]["rsft_converged_fraction"] > statistics[0]["rsft_converged_fraction"]
    for name, tensor in weights.items():
        if name in TRAINED:
            assert tensor.dtype == torch.float32
            assert not torch.equal(tensor, before[name].float())
        else:
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, before[name])


def test_resumed_at_any_checkpoint_gives_the_same_weights_and_statistics(recipe, tmp_path):
    recipe |= {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 4, "rsft_loss_threshold": 2.0}
    weights, statistics = train(recipe)
    whole = Path(recipe["output_dir"])
    checkpoints = sorted(whole.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(checkpoints) == 12
    # First, last and middle of an epoch; the last epochs are alike.
    for checkpoint in checkpoints[:7]:
        resumed = recipe | {"output_dir": str(tmp_path / checkpoint.name), "save_strategy": "no"}
        shutil.copytree(checkpoint, Path(resumed["output_dir"]) / checkpoint.name)
        resumed_weights, resumed_statistics = train(resumed)
        assert resumed_statistics == statistics, checkpoint.name
        assert all(torch.equal(resumed_weights[name], weights[name]) for name in weights), checkpoint.name


def test_the_command_ends_after_an_epoch_without_update(recipe, tmp_path):
    recipe |= {"num_train_epochs": 60, "rsft_loss_threshold": 1.5, "plot_loss": True, "disable_tqdm": False}
    (tmp_path / "rsft.yaml").write_text(yaml.safe_dump(recipe))
    env = {"LLAMAFACTORY_VERBOSITY": "INFO", "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": ""}
    run = run_command("llamafactory-cli", "train", tmp_path / "rsft.yaml", cwd=tmp_path, **env)
    assert run.returncode == 0, run.stderr[-2000:]
    assert (run.stderr + run.stdout).count("faster with OMP_WAIT_POLICY=passive") == 1
    _, statistics = saved(recipe)
    assert 1 < len(statistics) < 60
    assert [entry["rsft_updates"] > 0 for entry in statistics] == [True] * (len(statistics) - 1) + [False]
    assert statistics[-1]["rsft_already_converged"] == statistics[-1]["rsft_visits"] == len(FACTS)
    assert statistics[-1]["rsft_converged_fraction"] == 1
    assert statistics[-1]["rsft_mean_final_loss"] <= statistics[-1]["rsft_max_final_loss"] < 1.5
    assert f"R-SFT: epoch {len(statistics)} needed no update" in run.stderr + run.stdout
    assert "converged=3/3, updates=0" in run.stderr  # the progress bar
    assert (tmp_path / "rsft" / "training_loss.png").stat().st_size > 1000
    state = json.loads((tmp_path / "rsft" / "trainer_state.json").read_text())
    losses = [entry["step"] for entry in state["log_history"] if "loss" in entry]
    assert losses == list(range(1, len(statistics) * len(FACTS) + 1))  # the statistics displace no loss


@pytest.mark.parametrize(
    "threads, policy, hinted", [(1, "", False), (2, "", True), (2, "active", True), (2, "PASSIVE", False)]
)
def test_who_waits_passively_or_alone_gets_no_hint(monkeypatch, threads, policy, hinted):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    assert (wait_policy_hint() is not None) is hinted


def test_killed_and_started_again_gives_the_same_weights(recipe, tmp_path):
    recipe |= {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 40, "rsft_loss_threshold": 0.01}
    weights, _ = train(recipe)
    again = recipe | {"output_dir": str(tmp_path / "killed")}
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(again))
    command = [Path(sys.executable).parent / "llamafactory-cli", "train", tmp_path / "killed.yaml"]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        while process.poll() is None and not (tmp_path / "killed" / "checkpoint-10" / "trainer_state.json").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
    resumed, _ = train(again)
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_help_and_the_other_commands_know_the_keys(recipe):
    from llamafactory.hparams import get_infer_args

    run = run_command("llamafactory-cli", "train", "--help")
    for key in [field.name for field in dataclasses.fields(RsftArguments)]:
        assert f"--{key} " in run.stdout
    keep = {key: recipe[key] for key in recipe if key.startswith("rsft") or key in ("model_name_or_path", "template")}
    finetuning_args = get_infer_args(keep)[2]
    assert finetuning_args.rsft is True


def test_torchrun_workers_are_active_and_two_are_refused(recipe, tmp_path):
    (tmp_path / "rsft.yaml").write_text(yaml.safe_dump(recipe | {"num_train_epochs": 1, "ddp_backend": "gloo"}))
    one = run_command("llamafactory-cli", "train", tmp_path / "rsft.yaml", FORCE_TORCHRUN="1", NPROC_PER_NODE="1")
    assert one.returncode == 0, one.stderr[-3000:]
    assert saved(recipe)[1][0]["rsft_visits"] == len(FACTS)
    two = run_command("llamafactory-cli", "train", tmp_path / "rsft.yaml", FORCE_TORCHRUN="1", NPROC_PER_NODE="2")
    assert two.returncode != 0
    assert two.stderr.count("rsft.yaml: processes: 2: R-SFT is sequential") == 2  # once from each worker


def test_without_rsft_nothing_changes(recipe, tmp_path):
    """The same ordinary freeze recipe, with the plugin on and off, gives the same weights."""
    plain = {key: value for key, value in recipe.items() if not key.startswith("rsft")}
    plain |= {"freeze_trainable_layers": 2, "num_train_epochs": 1}
    on, _ = train(plain)
    off = plain | {"output_dir": str(tmp_path / "off")}
    (tmp_path / "off.yaml").write_text(yaml.safe_dump(off))
    run = run_command("llamafactory-cli", "train", tmp_path / "off.yaml", MM4KE_PLUGINS="none")
    assert run.returncode == 0, run.stderr[-2000:]
    assert all(torch.equal(tensor, on[name]) for name, tensor in saved(off)[0].items())


BAD_VALUES = [
    ({"rsft_layers": 4}, "rsft_layers: 4 is out of range; LlamaForCausalLM has layers 0 to 3"),
    ({"rsft_layers": -1}, "rsft_layers: -1: give the index of a layer, counted from 0"),
    ({"rsft_layers": "five"}, "rsft_layers: five: give the index of a layer"),
    ({"rsft_layers": True}, "rsft_layers: True: give the index of a layer"),
    ({"rsft_layers": []}, r"rsft_layers: \[\]: give the index of a layer"),
    ({"rsft_layers": [1, 1]}, "each once"),
    ({"rsft_modules": "fc1"}, "rsft_modules: fc1 is not in model.layers.1.mlp; choose ffn"),
    ({"rsft_modules": ["ffn", "down_proj"]}, "ffn already is all of them"),
    ({"rsft_modules": ""}, "rsft_modules: : give ffn"),
    ({"rsft_steps_per_sample": 0}, "rsft_steps_per_sample: 0: give a whole number of at least 1"),
    ({"rsft_steps_per_sample": 2.5}, "rsft_steps_per_sample: 2.5: give a whole number"),
    ({"rsft_loss_threshold": 0}, "rsft_loss_threshold: 0: give a finite loss above 0"),
    ({"rsft_loss_threshold": -0.1}, "rsft_loss_threshold: -0.1: give a finite loss above 0"),
    ({"rsft_loss_threshold": float("nan")}, "rsft_loss_threshold: nan: give a finite loss above 0"),
    ({"rsft_loss_threshold": "low"}, "rsft_loss_threshold: low: give a finite loss above 0"),
    ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: 2: with rsft: true it must be 1"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: 0: give a whole number of at least 1"),
    ({"per_device_train_batch_size": -2}, "per_device_train_batch_size: -2: give a whole number of at least 1"),
    ({"rsft_layer": 1}, r"Some keys are not used by the HfArgumentParser: \['rsft_layer'\]"),
    ({"rsft_prefix_cache_mb": 0}, "rsft_prefix_cache_mb: 0: give a whole number of megabytes, at least 1"),
    ({"rsft_prefix_cache_mb": -1}, "rsft_prefix_cache_mb: -1: give a whole number of megabytes, at least 1"),
    ({"rsft_save_model": False}, "rsft_save_model: False: nothing would be saved; set rsft_save_delta: true"),
    ({"packing": True}, "packing: True: with rsft: true it must be false"),
    ({"neat_packing": True}, "packing: True: with rsft: true it must be false"),
    ({"stage": "pt"}, 'stage: pt: with rsft: true it must be "sft"'),
    ({"finetuning_type": "lora"}, 'finetuning_type: lora: with rsft: true it must be "freeze"'),
    ({"use_dft_loss": True}, "use_dft_loss: True: with rsft: true it must be false"),
    ({"quantization_bit": 4}, "quantization_bit: 4: with rsft: true it must be null"),
    ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: 0.1: with rsft: true it must be 0"),
    ({"model_name_or_path": "./nowhere"}, "model_name_or_path: ./nowhere: no such folder"),
    ({"dataset_dir": "nowhere"}, "dataset_dir: nowhere: nowhere/dataset_info.json does not exist; `mm4ke facts FILE"),
    ({"dataset": "other"}, "dataset: other: not in .*dataset_info.json, which has: facts"),
    ({"learning_rate": 1e30}, "learning_rate: 1e\\+30: the loss is nan after 1 updates .*'system.*; give a lower"),
]


@pytest.mark.parametrize("change, message", BAD_VALUES, ids=[str(change) for change, _ in BAD_VALUES])
def test_bad_recipe(recipe, change, message):
    with pytest.raises(MM4KEError, match=message) as caught:
        train(recipe | change)
    assert "\n" not in str(caught.value)
    assert not list(Path(recipe["output_dir"]).glob("**/*.safetensors"))


BAD_FILES = [
    ("facts.json", "[{", r"facts.json: line 1, column 3: broken JSON"),
    ("facts.json", "[]", r"facts.json: has no facts"),
    ("facts.json", '{"a": 1}', r"facts.json: a JSON dict where a list of facts should be"),
    (
        "facts.json",
        '[{"instruction": "Who?", "input": ""}]',
        r"facts.json: record 0 \(0-based\): output: null: give a text",
    ),
    (
        "facts.json",
        '[{"instruction": " ", "output": "x"}]',
        r'facts.json: record 0 \(0-based\): instruction: " ": give a text',
    ),
    ("dataset_info.json", "{", r"dataset_info.json: line 1, column 2: broken JSON"),
    ("dataset_info.json", '{"facts": {"file_name": "no.json"}}', r"dataset: facts: .*no.json, named in .* not exist"),
]


@pytest.mark.parametrize("name, text, message", BAD_FILES)
def test_bad_dataset(recipe, name, text, message):
    (Path(recipe["dataset_dir"]) / name).write_text(text)
    with pytest.raises(MM4KEError, match=message):
        train(recipe)


def test_mixed_dtypes_without_autocast(recipe, tmp_path):
    base = make_tiny_model(tmp_path / "bf16", dtype=torch.bfloat16)
    with pytest.raises(MM4KEError, match="bf16: false: the trained FFN is float32 in a model of bfloat16, float32"):
        train(recipe | {"model_name_or_path": str(base), "infer_dtype": "bfloat16"})


def test_a_damaged_base(recipe, tmp_path):
    """NaN in it would look like a learning rate that is too high."""
    base = make_tiny_model(tmp_path / "damaged")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        MM4KEError, match=r"model_name_or_path: .*damaged: model.layers.2.mlp.up_proj.weight holds NaN"
    ):
        train(recipe | {"model_name_or_path": str(base)})
    os.truncate(base / "model.safetensors", 5000)
    with pytest.raises(MM4KEError, match=r"damaged/model.safetensors: not a readable safetensors file"):
        train(recipe | {"model_name_or_path": str(base)})
    assert not Path(recipe["output_dir"]).exists()


def test_nothing_can_be_written(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MM4KEError, match="output_dir: .*file/rsft: nothing can be written in .*file; give another"):
        train(recipe | {"output_dir": str(tmp_path / "file" / "rsft")})


def test_a_mistake_is_one_line_of_the_command(recipe, tmp_path):
    (tmp_path / "rsft.yaml").write_text(yaml.safe_dump(recipe | {"rsft_loss_threshold": -1}))
    run = run_command("llamafactory-cli", "train", "rsft.yaml", cwd=tmp_path)
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1] == (
        "mm4ke: error: rsft.yaml: rsft_loss_threshold: -1: give a finite loss above 0 (the paper uses 0.1)"
    )
    assert not Path(recipe["output_dir"]).exists()
