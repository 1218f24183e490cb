"""Uses every host without asking for anything of ours, and prints what came of it as a JSON object.

    python installed_probe.py MODEL OTHER FACTS

MODEL and OTHER: folders of tiny models of one shape. FACTS: a LLaMA-Factory data set called "facts". Writes to the
working directory.
"""

import contextlib
import copy
import dataclasses
import hashlib
import inspect
import json
import pickle
import sys
from pathlib import Path

model, other, facts = sys.argv[1:]

with contextlib.redirect_stdout(sys.stderr):
    import torch  # noqa: F401  (it brings the plugin, before any host)

    import llamafactory.train.sft.trainer  # isort: skip
    import mergekit.graph
    import mergekit.merge
    import mergekit.plan
    from llamafactory.hparams import FinetuningArguments, get_eval_args, get_infer_args, get_train_args
    from llamafactory.train.sft import workflow
    from llamafactory.train.tuner import run_exp
    from lm_eval.tasks import TaskManager
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

RECIPE = {
    "model_name_or_path": model,
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "freeze",
    "freeze_trainable_layers": 1,
    "dataset_dir": facts,
    "dataset": "facts",
    "template": "smollm2",
    "output_dir": "trained",
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "num_train_epochs": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def tasks() -> dict[str, str]:
    """The file behind each name of lm-eval; for a tag the tasks that have it."""
    index = TaskManager().task_index
    return {name: str(entry.yaml_path or sorted(entry.tags)) for name, entry in index.items()}


def sft() -> dict[str, str]:
    run_exp(dict(RECIPE))
    history = json.loads(Path("trained/trainer_state.json").read_text())["log_history"]
    return hashes(Path("trained"), "*.safetensors") | {"losses": str([entry.get("loss") for entry in history])}


def merge() -> dict[str, str]:
    parameters = {"weight": 0.7, "density": 0.5, "gamma": 0.01}
    config = {
        "merge_method": "breadcrumbs",
        "base_model": model,
        "models": [{"model": other, "parameters": parameters}],
        "dtype": "bfloat16",
    }
    mergekit.merge.run_merge(MergeConfiguration.model_validate(config), "merged", MergeOptions(quiet=True))
    return hashes(Path("merged"), "*")


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob(pattern))}


def arguments() -> dict[str, object]:
    """What LLaMA-Factory parses a recipe into: the class, and what Python makes of the object."""
    infer = {key: RECIPE[key] for key in ("model_name_or_path", "template", "finetuning_type")}
    parsed = {
        "train": get_train_args(RECIPE | {"output_dir": "never"})[3],
        "infer": get_infer_args(dict(infer))[2],
        "eval": get_eval_args(infer | {"task": "mmlu_test"})[3],
    }
    found = {}
    for name, finetuning_args in parsed.items():
        copies = [
            pickle.loads(pickle.dumps(finetuning_args)),
            copy.copy(finetuning_args),
            copy.deepcopy(finetuning_args),
        ]
        found[name] = {
            "class": type(finetuning_args) is FinetuningArguments,
            "repr": repr(finetuning_args),
            "attributes": str(vars(finetuning_args)),
            "asdict": str(dataclasses.asdict(finetuning_args)),
            "replaced": repr(dataclasses.replace(finetuning_args, lora_rank=4)),
            "copies": [one == finetuning_args and type(one) is FinetuningArguments for one in copies],
        }
    return found


def classes() -> dict[str, object]:
    """The classes and functions that hosts look up by name are those that programs import, derive from and pickle."""
    trainer = workflow.CustomSeq2SeqTrainer

    class Derived(trainer):
        pass

    made = trainer.__new__(trainer, finetuning_args=FinetuningArguments())
    derived = Derived.__new__(Derived, FinetuningArguments())
    functions = (workflow.run_sft, mergekit.merge.run_merge, trainer.compute_loss)
    modules = [llamafactory.hparams.parser, llamafactory.model.adapter, workflow, mergekit.merge]
    return {
        "trainer": trainer is llamafactory.train.sft.trainer.CustomSeq2SeqTrainer,
        "made": [type(made) is trainer, type(derived) is Derived],
        "signature": str(inspect.signature(trainer)),
        "executor": mergekit.merge.Executor is mergekit.graph.Executor,
        "planner": mergekit.merge.MergePlanner is mergekit.plan.MergePlanner,
        "pickled": [pickle.loads(pickle.dumps(one)) is one for one in (trainer, mergekit.merge.Executor, *functions)],
        "functions": [f"{one.__module__}.{one.__qualname__}{inspect.signature(one)}" for one in functions],
        "loaders": [len(pickle.dumps(module.__spec__.loader)) > 0 for module in modules],
    }


with contextlib.redirect_stdout(sys.stderr):
    found = {probe.__name__: probe() for probe in (tasks, sft, merge, arguments, classes)}
    found["arguments with rsft"] = None
    if "mm4ke_plugins.hosts.llamafactory.adapter" in sys.modules:
        asked = {"rsft": True, "rsft_layers": 1, "rsft_steps_per_sample": 4, "output_dir": "never"}
        finetuning_args = get_train_args(RECIPE | asked | {"per_device_train_batch_size": 1})[3]
        Path("finetuning_args.pickle").write_bytes(pickle.dumps(finetuning_args))
        copies = [copy.copy(finetuning_args), copy.deepcopy(finetuning_args)]
        found["arguments with rsft"] = {
            "repr": repr(finetuning_args),
            "isinstance": isinstance(finetuning_args, FinetuningArguments),
            "copies": [one == finetuning_args for one in copies],
            "asdict": dataclasses.asdict(finetuning_args)["rsft_steps_per_sample"],
            "replaced": dataclasses.replace(finetuning_args, rsft_steps_per_sample=2).rsft_steps_per_sample,
        }
print(json.dumps(found))
