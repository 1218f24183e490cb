"""What lies in a training's `output_dir`, and where the training may go on from.

LLaMA-Factory resumes whatever checkpoint it finds there. Here every `trainer_state.json` has the provenance of its
training, and one of another training is refused. The host writes that file last, after the weights: in a checkpoint's
folder it says that the checkpoint is complete, in `output_dir` itself that the training is finished.
"""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from llamafactory.extras.constants import CHECKPOINT_NAMES
from safetensors import SafetensorError
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from ...delta.format import load_delta
from ...errors import MM4KEError, first_line
from ...rsft.provenance import Provenance
from ...storage.atomic import refused_in_one_line
from ...storage.checkpoint import is_safetensors, tensor_files
from .recipe import recipe_name

# What no weight depends on: where things are (the base and the facts count by what is in them), what is logged, saved
# or uploaded, how fast it goes. All other keys count, so that one that a later version brings is on the safe side.
WITHOUT_EFFECT = re.compile(
    r"model_name_or_path|model_revision|cache_dir|offload_folder|low_cpu_mem_usage|print_param_status|infer_backend"
    r"|dataset|dataset_dir|media_dir|tokenized_path|overwrite_cache|data_shared_file_system|preprocessing_.*"
    r"|output_dir|overwrite_output_dir|resume_from_checkpoint|do_eval|do_predict|generation_.*|eval_num_beams"
    r"|log_.*|logging_.*|disable_tqdm|report_to|run_name|project|trackio_.*|swanlab_.*|use_swanlab|plot_loss"
    r"|save_.*|enable_jit_checkpoint|push_to_hub|hub_.*|export_.*|vllm_.*|sglang_.*"
    r"|include_num_input_tokens_seen|include_effective_tokens_per_second|skip_memory_metrics|torch_empty_cache_steps"
    r"|dataloader_num_workers|dataloader_pin_memory|dataloader_persistent_workers|dataloader_prefetch_factor"
    r"|local_rank|ddp_.*|ray_.*|master_addr|master_port|enable_torch_profiler|profiler_.*|profile_modules"
    r"|rsft_prefix_cache_mb|rsft_save_.*|rsft_guard_file"
    r"|.*_(token|secret|api_key)"
)
# Where the best checkpoint becomes the result, it matters which ones there are.
SAVING = {"save_strategy", "save_steps", "save_total_limit"}
# Of a config.json: who wrote it, and from where it was read.
ABOUT_CONFIG = {"_name_or_path", "transformers_version"}

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STATE_OF_TRAINING = (OPTIMIZER_NAME, SCHEDULER_NAME, "rng_state.pth")


@dataclass(frozen=True)
class Recipe:
    """What LLaMA-Factory's parser knows and does not tell its trainer.

    settings:   the recipe's part of `Provenance.settings`
    resume:     its resume_from_checkpoint: a folder, True (there must be a checkpoint), False (begin anew), or None
    model_args, data_args: LLaMA-Factory's ModelArguments and DataArguments
    """

    settings: dict[str, Any]
    resume: Path | bool | None
    model_args: Any
    data_args: Any


def take_recipe(model_args, data_args, training_args, finetuning_args) -> Recipe:
    """Note the recipe for the trainer, and take the choice of a checkpoint away from LLaMA-Factory.

    Raises MM4KEError where the training would write into its base model, or can't write at all.
    """
    _refuse_to_write_into_the_base(Path(model_args.model_name_or_path), Path(training_args.output_dir))
    _refuse_where_nothing_can_be_written(Path(training_args.output_dir))
    counted = SAVING if training_args.load_best_model_at_end else set()
    settings = {
        key: value
        for arguments in (model_args, data_args, training_args, finetuning_args)
        for key, value in arguments.to_dict().items()
        if key in counted or not WITHOUT_EFFECT.fullmatch(key)
    }
    resume = training_args.resume_from_checkpoint
    if isinstance(resume, str):
        resume = {"true": True, "false": False}.get(resume.lower(), Path(resume))
    # For both hosts: something was said, and it is not a checkpoint.
    training_args.resume_from_checkpoint = False
    return Recipe(_as_json(settings), resume, model_args, data_args)


def _refuse_to_write_into_the_base(base: Path, output: Path) -> None:
    if base.is_dir() and output.resolve() in (base.resolve(), *base.resolve().parents):
        raise MM4KEError(
            f"{recipe_name()}: output_dir: {output}: the base model ({base}) is in this folder, and would be "
            "overwritten; give another output_dir"
        )


def _refuse_where_nothing_can_be_written(output: Path) -> None:
    """Before the model is loaded; and the Trainer makes the folder on its own, with a traceback."""
    there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise MM4KEError(
            f"{recipe_name()}: output_dir: {output}: nothing can be written in {there}; give another output_dir"
        )


def config_settings(config) -> dict[str, Any]:
    """The part of `Provenance.settings` that a base model's config.json says."""
    return {
        f"config.json: {key}": value for key, value in _as_json(config.to_dict()).items() if key not in ABOUT_CONFIG
    }


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values, default=str))


def read_state(folder: Path) -> dict[str, Any] | None:
    """The folder's trainer_state.json; None where there is none, or one that was not written to its end."""
    try:
        state = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def needed_no_update(log_history: list[dict[str, Any]]) -> bool:
    """Whether the last epoch in a training's log was one that ends it, whatever its num_train_epochs."""
    return [entry["rsft_updates"] for entry in log_history if "rsft_updates" in entry][-1:] == [0]


@contextmanager
def written_to(folder: Path) -> Iterator[None]:
    """Turn what the libraries that write a training's files raise on a full disk into an MM4KEError in one line."""
    with refused_in_one_line(folder):
        try:
            yield
        except (RuntimeError, SafetensorError) as error:
            if isinstance(error, SafetensorError) or "inline_container" in str(error):  # torch.save's C++
                raise MM4KEError(f"{folder}: can't be written: {first_line(error)}; give another place") from error
            raise


class Output:
    """A training's output_dir, and the knowledge delta beside it."""

    def __init__(self, folder: Path, provenance: Provenance, fact: Callable[[int], str]):
        """provenance: this training's; fact: shows one of its facts in an error message."""
        self.folder = folder
        self.delta = folder.with_name(f"{folder.name}.delta.safetensors")
        self.provenance = provenance
        self.fact = fact
        self.is_finished = False
        self.lock = FileLock(folder / ".training.lock", timeout=0)

    @property
    def has_model(self) -> bool:
        return any((self.folder / name).is_file() for name in CHECKPOINT_NAMES)

    def checkpoints(self) -> list[Path]:
        """The complete ones, the newest last. One that was being written when a training was killed is none."""
        found = [path for path in self.folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
        return sorted((path for path in found if read_state(path)), key=lambda path: int(path.name.split("-")[1]))

    def prepare(self, resume: Path | bool | None, overwrite: bool) -> Path | None:
        """The checkpoint to go on from, or None; sets `is_finished` where this very training has been done.

        What is not of this training is removed if it shall be overwritten, and refused if not.

        Raises MM4KEError, which says what is there and what differs.
        """
        try:
            with refused_in_one_line(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self.lock.acquire()
        except Timeout:
            raise self._error(
                self.folder, "another training is writing to it", "wait for it, or give another output_dir"
            ) from None
        checkpoint = resume if isinstance(resume, Path) else None
        newest = (self.checkpoints() or [None])[-1]
        if resume is True and not newest:
            raise self._error(self.folder, "has no complete checkpoint", "leave resume_from_checkpoint: true out")
        if resume is True or (resume is None and not overwrite):
            checkpoint = newest
        if not overwrite:
            self._require_own(newest)
            self.is_finished = resume is None and self._is_finished()
        if self.is_finished:
            return None
        if checkpoint:
            self._require_resumable(checkpoint)
        if overwrite:
            self._clear(checkpoint)
        (self.folder / TRAINER_STATE_NAME).unlink(
            missing_ok=True
        )  # what is in output_dir is not finished from here on
        return checkpoint

    def _error(self, path: Path, problem: str, remedy: str = "") -> MM4KEError:
        key = "output_dir"
        if self.folder not in (path, path.parent) and path != self.delta:
            key, remedy = (
                "resume_from_checkpoint",
                remedy or "leave it out, or give a checkpoint of this very training",
            )
        remedy = remedy or "remove it, give another output_dir, or overwrite_output_dir: true to train anew"
        return MM4KEError(f"{recipe_name()}: {key}: {path}: {problem}; {remedy}")

    def _require_own(self, newest: Path | None) -> None:
        """Whatever is here and would be taken for this training's result, or for a part of it, is of this training."""
        if state := read_state(self.folder):
            self._require_same(self.folder, state)
        elif self.has_model and not newest:
            raise self._error(self.folder, "has a model of which is not known how it was trained")
        if newest:
            self._require_same(newest, read_state(newest))
        if self.delta.exists() and not self._delta_is_own():
            raise self._error(self.delta, "is a knowledge delta of another training")

    def _require_same(self, folder: Path, state: dict[str, Any]) -> None:
        there = _provenance(state)
        if there is None:
            raise self._error(folder, "is of a training without R-SFT, or of an earlier version")
        if differences := self.provenance.differences(there, self.fact):
            more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise self._error(folder, f"is of another training ({'; '.join(differences[:3])}{more})")

    def _require_resumable(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        if state is None:
            raise self._error(checkpoint, "is not a complete checkpoint")
        self._require_same(checkpoint, state)
        if (steps := self.provenance.settings.get("early_stopping_steps")) is not None:
            raise self._error(checkpoint, f"early_stopping_steps: {steps}: from a checkpoint on they would count anew")
        for name in STATE_OF_TRAINING:
            if not (checkpoint / name).is_file():
                raise self._error(
                    checkpoint,
                    f"has no {name} (save_only_model: true leaves it out), so going on from it would give other weights",
                )
            if not zipfile.is_zipfile(checkpoint / name):  # as torch saves it, with the directory at the end
                raise self._error(checkpoint, f"{name} is damaged", "remove this checkpoint, or train anew")
        if is_safetensors(checkpoint):
            tensor_files(checkpoint)  # it says which file is damaged or missing

    def _is_finished(self) -> bool:
        state = read_state(self.folder)
        if state is None or not (self.has_model or self.delta.exists()):
            return False
        return state["global_step"] >= state["max_steps"] or needed_no_update(state["log_history"])

    def _delta_is_own(self) -> bool:
        try:
            recipe = load_delta(self.delta).manifest.recipe or {}
        except MM4KEError:
            return False
        return recipe.get("provenance") == self.provenance.sha256()

    def _clear(self, but: Path | None) -> None:
        """Remove what an earlier training wrote and could be taken for this one's."""
        (self.folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        for name in CHECKPOINT_NAMES:
            (self.folder / name).unlink(missing_ok=True)
        for shard in self.folder.glob("model-*-of-*.safetensors"):
            shard.unlink()
        self.delta.unlink(missing_ok=True)
        self.remove_checkpoints(but)

    def remove_checkpoints(self, but: Path | None = None) -> None:
        for path in self.folder.glob("checkpoint-*"):
            if CHECKPOINT.fullmatch(path.name) and path.is_dir() and not (but and path.samefile(but)):
                shutil.rmtree(path)


def _provenance(state: dict[str, Any]) -> Provenance | None:
    callbacks = state.get("stateful_callbacks")
    saved = callbacks.get("RsftCallback") if isinstance(callbacks, dict) else None
    attributes = saved.get("attributes") if isinstance(saved, dict) else None
    return Provenance.from_dict(attributes.get("provenance")) if isinstance(attributes, dict) else None
