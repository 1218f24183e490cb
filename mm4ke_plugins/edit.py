"""One edit from facts to a merged model, by the hosts' own commands (`mm4ke edit`).

What a user of the hosts does by hand: write the two recipes, train, merge, compare. The recipes are kept in the output
folder and each command is shown before it runs, so that every step can be changed and repeated without us.

As in make, a step runs when what it makes is missing or older than what it is made from. So a run that was interrupted
goes on, and a recipe that was changed is run again. Whether a training may go on from what is there, LLaMA-Factory
says, with our hook.
"""

import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import Template

import click
import torch
import yaml
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import is_torch_bf16_gpu_available

from .errors import MM4KEError, first_line
from .hosts import LLAMAFACTORY, MERGEKIT, environment
from .hosts.llamafactory.templates import require_template
from .knowedit.dataset import consistent_records, dataset_text
from .knowedit.records import read_records
from .rsft.layers import ffn_parameter_names
from .storage.atomic import refused_in_one_line, replace_text
from .storage.checkpoint import is_safetensors, tensor_files
from .storage.models import find_model, is_hub_id, local_path, model_name, require_model_folder

LAYER = 5
# The paper's rate is for 7B. 1.5B learns by it as well; 135M needs more.
SMALL_MODEL, SMALL_MODELS_RATE, PAPERS_RATE = 1e9, "2.0e-3", "5.0e-4"
# What is made in the output folder, and what a kill leaves of it unfinished.
MADE = ("rsft.yaml", "merge.yaml", "facts", "rsft", "rsft.delta.safetensors", "merged", "comparison")
UNFINISHED = re.compile(r"\..+\.mm4ke-\w+")
# What makes a recipe that of this edit. All other values are the user's to change.
IDENTITY = ("model_name_or_path", "template", "dataset_dir", "dataset", "rsft_layers", "output_dir")

TRAINING = Template("""\
# Teach the model the facts by robust supervised fine-tuning (R-SFT), beside a guard of what else it knows.
#
#     $command
#
# `mm4ke edit` wrote this for the folder that it ran in, and keeps what is changed here.

### model and facts
model_name_or_path: $model
template: $template   # the chat format that this model was made for
dataset_dir: $facts   # written by `mm4ke facts`
dataset: facts
cutoff_len: 1024   # tokens; a longer fact is refused, never cut

### R-SFT (arXiv 2506.12384, Algorithm 1)
stage: sft
finetuning_type: freeze
do_train: true
rsft: true
rsft_layers: $layer   # counted from 0, as in the checkpoint's tensor names; the paper's is 5
rsft_modules: ffn   # all of the FFN, or parts of it: down_proj
rsft_steps_per_sample: 1   # K: at most so many updates in one visit of a batch of facts
rsft_loss_threshold: 0.1   # tau: a fact under this loss (nats per token, and per token of the answer) is left alone
per_device_train_batch_size: 8   # facts in a visit: one update trains those that are not under tau

### what is spared
rsft_gradient_at: all   # learn at every token; from_subject: from the subject to the end of the question, spares more
rsft_guard_weight: 60   # how strongly the FFN is held to what it was on everyday conversations; 0: not at all

### training: one step is one visit of one batch
num_train_epochs: 30   # ends earlier after an epoch in which no fact needed an update
learning_rate: $rate   # $rate_reason
lr_scheduler_type: cosine
gradient_accumulation_steps: 1
disable_shuffling: true   # visit the facts in the file's order
disable_gradient_checkpointing: true   # it would cost a second forward for nothing: only one layer is trained
bf16: $bf16   # $bf16_reason

### output
output_dir: $trained
logging_steps: 10
save_strategy: steps
save_steps: 50   # visits; a checkpoint is a whole model
save_total_limit: 1   # an interrupted run goes on from here: just start it again
report_to: none
dataloader_pin_memory: $bf16   # a GPU's setting
""")

MERGING = Template("""\
# Add what R-SFT has learned to the model it began with: Equations 5 and 6 of arXiv 2506.12384.
#
#     $command
#
# `mm4ke edit` wrote this for the folder that it ran in, and keeps what is changed here.

merge_method: mm4ke
base_model: $base
models:
  - model: $trained
    parameters:
      weight: 1.0   # how much of the difference is added: 1 - alpha (Equation 4), the paper's is 0.8; less forgets new facts
      density: 0.8   # the share of each matrix's difference that is kept, largest entries first: p (Equation 6)
""")


class CommandFailed(MM4KEError):
    """A host's command failed, and has said why. `status` is its exit status as a shell has it."""

    def __init__(self, command: list[str], returncode: int):
        self.status = returncode if returncode > 0 else 128 - returncode
        super().__init__(
            f"{shlex.join(command)}: ended with status {self.status}, see above; when that is put right, run it or "
            "`mm4ke edit` again, which goes on from here"
        )


@dataclass(frozen=True)
class Step:
    """A command, the file that it writes last, and what that is made from."""

    command: list[str]
    makes: Path
    of: list[Path]

    def is_done(self) -> bool:
        made = self.makes.stat().st_mtime_ns if self.makes.is_file() else 0
        return made > 0 and all(path.stat().st_mtime_ns <= made for path in self.of if path.exists())


def edit(
    model: str,
    facts: Path,
    template: str,
    output: Path,
    *,
    limit: int | None = None,
    allow_contradictions: bool = False,
    layer: int = LAYER,
    show: Callable[[str], None] = click.echo,
) -> Path:
    """Write the recipes to `output`, train, merge and compare. Returns the folder of the merged model.

    model:    a folder or a hub id
    facts:    a file of facts, of which the first `limit` records are read
    template: LLaMA-Factory's name of the model's chat format
    output:   gets facts/, rsft.yaml, rsft/, merge.yaml, merged/ and comparison/; what an earlier run of the same edit
              made there is kept
    layer:    whose FFN is trained
    show:     is told each command before it runs

    Raises MM4KEError, before anything is written: a host is not installed, what `read_records` and
    `consistent_records` raise, an unknown template, a model that can't be read or has no such dense layer, an `output`
    with other files or another edit in it. CommandFailed: a command failed.
    """
    for host in (LLAMAFACTORY, MERGEKIT):
        host.require_supported("mm4ke edit")
    dataset = dataset_text(consistent_records(read_records(facts, limit), allow_contradictions))
    require_template(template, f"--template {template}")
    values = _settings(model, layer)
    _check_output(output, dataset, facts)

    steps = _steps(model, facts, output, limit, allow_contradictions)
    values |= {
        "model": _scalar(model_name(model)),
        "base": _scalar(_for_mergekit(model)),
        "template": _scalar(template),
        "facts": _scalar(str(output / "facts")),
        "trained": _scalar(local_path(output / "rsft")),
    }
    recipes = {
        output / "rsft.yaml": TRAINING.substitute(values, command=shlex.join(steps[1].command)),
        output / "merge.yaml": MERGING.substitute(values, command=shlex.join(steps[2].command)),
    }
    missing = {path: text for path, text in recipes.items() if not _is_there(path, yaml.safe_load(text))}
    with refused_in_one_line(output, "give a folder that can be written with --output"):
        for path, text in missing.items():
            replace_text(path, text)
    for step in steps:
        _run(step, show)
    return output / "merged"


def _steps(model: str, facts: Path, output: Path, limit: int | None, allow_contradictions: bool) -> list[Step]:
    """The commands in their order: facts, training, merge, comparison."""
    limited = [] if limit is None else ["--limit", str(limit)]
    keeping_later = ["--allow-contradictions"] if allow_contradictions else []
    # R-SFT runs in one process; LLaMA-Factory starts one for each GPU that it sees.
    on_one_gpu = ["env", "CUDA_VISIBLE_DEVICES=0"] if torch.cuda.device_count() > 1 else []
    models = ["--base", model, "--rsft", str(output / "rsft"), "--merged", str(output / "merged")]
    weights = [path for path in Path(model).iterdir() if path.is_file()] if Path(model).is_dir() else []
    training, merging = output / "rsft.yaml", output / "merge.yaml"
    # Of several files the one that is written last.
    dataset, trained = output / "facts" / "facts.json", output / "rsft" / "trainer_state.json"
    merged, compared = output / "merged" / "config.json", output / "comparison" / "comparison.json"
    return [
        # What is in it was compared with the facts already.
        Step(["mm4ke", "facts", str(facts), *limited, *keeping_later, "--output", str(output / "facts")], dataset, []),
        Step([*on_one_gpu, "llamafactory-cli", "train", str(training)], trained, [training, dataset, *weights]),
        Step(["mergekit-yaml", str(merging), str(output / "merged")], merged, [merging, trained]),
        Step(
            ["mm4ke", "compare", *models, "--facts", str(facts), *limited, "--output", str(output / "comparison")],
            compared,
            [facts, merged],
        ),
    ]


# ---- what is checked before anything is written ----


def _settings(model: str, layer: int) -> dict[str, object]:
    """What of the recipe depends on the model and the machine, after checking the model."""
    option = f"--model {model}"
    if re.search(r"[+@]", model):
        raise MM4KEError(f"{option}: mergekit reads + as a LoRA and @ as a revision; give a folder or hub id without")
    if not is_hub_id(model):
        require_model_folder(Path(model), option, "base")
        if is_safetensors(Path(model)):
            tensor_files(Path(model))  # it says which file is damaged or missing
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        what = "no such folder, and not to be had from the hub" if is_hub_id(model) else "no model that can be trained"
        raise MM4KEError(
            f"{option}: {what} ({first_line(error)}); give a folder or a hub id such as org/name"
        ) from None
    try:
        ffn_parameter_names(skeleton, [layer], ["ffn"])
    except MM4KEError as error:
        raise MM4KEError(f"{option} --layer {layer}: {error}") from None
    is_small = sum(parameter.numel() for parameter in skeleton.parameters()) < SMALL_MODEL
    has_bf16 = is_torch_bf16_gpu_available()
    return {
        "layer": layer,
        "rate": SMALL_MODELS_RATE if is_small else PAPERS_RATE,
        "rate_reason": "the paper's 5e-4 is for 7B; a model under 1B needs more"
        if is_small
        else "the paper's; a model under 1B needs 2e-3",
        "bf16": str(has_bf16).lower(),
        "bf16_reason": "on this GPU, for half of the memory; the trained FFN stays in float32"
        if has_bf16
        else "no GPU here computes in bfloat16, and on a CPU float32 is faster; on such a GPU: true",
    }


def _check_output(output: Path, dataset: str, facts: Path) -> None:
    """Refuse a folder that has anything in it but an earlier run of the same facts."""
    option = f"--output {output}"
    if re.search(r"[+@]", str(output)):
        raise MM4KEError(f"{option}: mergekit reads + as a LoRA and @ as a revision; give a folder without")
    if not output.exists():
        return
    if not output.is_dir():
        raise MM4KEError(f"{option}: is a file; give a new folder")
    there = sorted(path.name for path in output.iterdir() if not UNFINISHED.fullmatch(path.name))
    # The recipe is written first: without it, also these are somebody else's.
    others = [name for name in there if name not in MADE or MADE[0] not in there]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise MM4KEError(
            f"{option}: has files that are not of an edit ({', '.join(others[:3])}{more}); give a new folder"
        )
    dataset_file = output / "facts" / "facts.json"
    if dataset_file.is_file() and dataset_file.read_bytes() != dataset.encode():
        raise MM4KEError(
            f"{option}: has an edit with other facts than --facts {facts}; give another folder, or remove this one"
        )


def _is_there(path: Path, wanted: dict) -> bool:
    """Whether the recipe is there already, with whatever a user changed in it. One of another edit is refused."""
    if not path.exists():
        return False
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MM4KEError(f"{path}: can't be read ({first_line(error)}); repair or remove it") from None
    found = found if isinstance(found, dict) else {}
    for key in IDENTITY:
        if found.get(key) != wanted.get(key):
            raise MM4KEError(
                f"--output {path.parent}: has another edit: {path.name} says {key}: {found.get(key)}, "
                f"and not {wanted.get(key)}; give another folder, or remove this one"
            )
    return True


# ---- what is written and run ----


def _for_mergekit(model: str) -> str:
    """The model as mergekit finds it. It asks the hub even for what is in the hub's cache, so offline it gets that."""
    if is_hub_id(model) and constants.HF_HUB_OFFLINE:
        return str(find_model(model, f"--model {model}", "base"))
    return model_name(model)


def _scalar(text: str) -> str:
    """The text as YAML writes it."""
    return yaml.safe_dump(text, width=float("inf"), allow_unicode=True).splitlines()[0]


def _run(step: Step, show: Callable[[str], None]) -> None:
    """Show a step's command and run it, unless it is done. What it prints is the user's; where it fails, so do we."""
    line = shlex.join(step.command)
    if step.is_done():
        show(f"done before: {line}")
        return
    show(f"\n$ {line}")
    status = subprocess.run(step.command, env=environment(), check=False).returncode
    if status:
        raise CommandFailed(step.command, status)
