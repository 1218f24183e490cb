"""lm-eval's evaluator on the tests' facts, and what it reports."""

import json
import shutil
from pathlib import Path

import lm_eval
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

from mm4ke_plugins.hosts.lm_eval.adapter import TASK_FOLDERS

DOWN = "model.layers.2.mlp.down_proj.weight"


def edit(base: Path, folder: Path) -> Path:
    """A copy of the model in `base` that predicts something else about as often as not."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    with torch.no_grad():
        weight = model.get_parameter(DOWN)
        weight += 0.05 * torch.randn_like(weight)
    shutil.copytree(base, folder)
    model.save_pretrained(folder)
    return folder


def both(models: Path) -> dict:
    return {"pretrained": str(models / "out"), "reference": str(models / "base")}


def evaluate(models: Path, tasks: list, model: str = "mm4ke", model_args: dict | None = None, **options) -> dict:
    """lm-eval's evaluator on the tests' facts, with nothing but our own tasks, whose folder is read in no time."""
    metadata = {"knowedit_file": str(models / "facts.json")} | options.pop("metadata", {})
    manager = TaskManager(include_path=str(TASK_FOLDERS[0]), include_defaults=False, metadata=metadata)
    return lm_eval.simple_evaluate(
        model=model,
        model_args=both(models) if model_args is None else model_args,
        tasks=[
            task if isinstance(task, dict) or task == "mm4ke_known_facts" else f"knowedit_{task}" for task in tasks
        ],
        task_manager=manager,
        bootstrap_iters=0,
        **{"device": "cpu", "batch_size": 4} | options,
    )


def samples_of(result: dict) -> dict[tuple[str, str], dict]:
    """All scored samples of a run, by metric, axis and prompt."""
    return {
        (sample["doc"]["metric"], sample["doc"]["axis"], sample["doc"]["prompt"]): sample
        for samples in result["samples"].values()
        for sample in samples
        if sample["metrics"]
    }


def results(folder: Path) -> dict:
    (path,) = folder.rglob("results_*.json")
    return json.loads(path.read_text())
