"""Facts as LLaMA-Factory reads them, its training in this process, and what that leaves."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from mm4ke_plugins.rsft.facts import Fact

FACTS = [("Who rules Oz?", "Tark"), ("Where is Oz?", "Up"), ("What is Oz?", "A box")]
TRAINED = [f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]


def write_facts(folder: Path, facts=FACTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    records = [{"instruction": prompt, "input": "", "output": answer} for prompt, answer in facts]
    (folder / "facts.json").write_text(json.dumps(records))
    (folder / "dataset_info.json").write_text(json.dumps({"facts": {"file_name": "facts.json"}}))
    return folder


def train(recipe: dict) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Run the recipe in this process; the saved weights and the statistics of every epoch."""
    from llamafactory.train.tuner import run_exp

    run_exp(recipe)
    return saved(recipe)


def saved(recipe: dict) -> tuple[dict[str, torch.Tensor], list[dict]]:
    folder = Path(recipe["output_dir"])
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return load_file(folder / "model.safetensors"), [entry for entry in history if "rsft_visits" in entry]


def llamafactory_facts(recipe):
    """The very token ids that LLaMA-Factory trains on."""
    return llamafactory_data(recipe)[0]


def llamafactory_data(recipe) -> tuple[list[Fact], list[list[int]]]:
    """The very token ids that LLaMA-Factory trains on, and those that the guard keeps."""
    from llamafactory.hparams import get_train_args
    from llamafactory.train.sft import workflow

    model_args, data_args, training_args, _, _ = get_train_args(recipe)
    modules = workflow.load_tokenizer(model_args)
    template = workflow.get_template_and_fix_tokenizer(modules["tokenizer"], data_args)
    arguments = (template, model_args, data_args, training_args)
    rows = workflow.get_dataset(*arguments, stage="sft", **modules)["train_dataset"]
    starts = [sum(label == -100 for label in row["labels"]) for row in rows]
    facts = []
    for row, start in zip(rows, starts):
        learns = [bool(flag) for flag in row["rsft_learns"]] if "rsft_learns" in row else None
        facts.append(Fact(row["input_ids"], start, start + sum(row["rsft_own"]), learns))
    return facts, data_args.rsft_guard_texts
