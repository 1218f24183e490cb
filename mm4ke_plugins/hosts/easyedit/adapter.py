"""`MM4KE` as an editing method of EasyEdit: R-SFT and merge of the requests, or the copy of a finished edit.

Two seams of EasyEdit (commit 14cea82):

    easyeditor.util.alg_dict            ALG_DICT, where BaseEditor looks the method up, and beside the others'
                                        classes MM4KEHyperParams, which EasyEdit's star imports carry on from there
    easyeditor.editors.batch_editor     which methods `batch_edit` takes

What EasyEdit asks of a method: change the model in place, and return it with the original tensors by name, which
`edit` copies back unless it edits sequentially.
"""

import copy as copy_module
import functools
import weakref
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from easyeditor.util.hparams import HyperParams

from ...delta.format import load_delta
from ...delta.live import LiveDelta
from ...errors import MM4KEError, first_line, report_in_one_line
from ...knowedit.prompts import PROMPT_FORMATS
from ...merging.choice import DEFAULT_DENSITY, DEFAULT_WEIGHT
from ...rsft.facts import encode_fact
from ...rsft.guard import guard_texts
from ...rsft.live import Editor, changed_tensors
from ...rsft.settings import Settings, is_count, wrong
from ...rsft.subject import subjects_alone

METHOD = "MM4KE"

# What the edits of a live model have to know of each other, for as long as the model lives.
editors: weakref.WeakKeyDictionary[torch.nn.Module, Editor] = weakref.WeakKeyDictionary()

# The delta that was put on a live model, and the tensors that this gave it.
deltas: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Path, dict[str, torch.Tensor]]] = weakref.WeakKeyDictionary()


@dataclass
class MM4KEHyperParams(HyperParams):
    """EasyEdit's own keys, then either `merged_model` alone or what `rsft.settings.Settings` says.

    merged_model:  folder of a checkpoint into which the requests were edited before, or a knowledge delta; it is
                   copied into the model, and the other keys don't count, but weight and density of an unfinished delta
    prompt_format: what the facts are trained on: "raw", EasyEdit's bare prompts, or "chat", the model's template
    batch_size:    how many requests `batch_edit` hands over at once; `edit` wants 1
    """

    alg_name: str
    model_name: str
    device: int | str | None = None
    batch_size: int = 1
    max_length: int = 40
    model_parallel: bool = False
    fp16: bool = False

    merged_model: str | None = None
    prompt_format: str = "raw"
    layers: list[int] = field(default_factory=lambda: list(Settings.layers))
    modules: list[str] = field(default_factory=lambda: list(Settings.modules))
    steps_per_sample: int = Settings.steps_per_sample
    loss_threshold: float = Settings.loss_threshold
    num_epochs: int = Settings.num_epochs
    learning_rate: float = Settings.learning_rate
    lr_scheduler_type: str = Settings.lr_scheduler_type
    facts_per_visit: int = Settings.facts_per_visit
    gradient_at: str = Settings.gradient_at
    guard_weight: float = Settings.guard_weight
    weight: float = DEFAULT_WEIGHT
    density: float = DEFAULT_DENSITY

    def __post_init__(self) -> None:
        """Raises MM4KEError, which names the key, its value and what would be right."""
        for key, right, advice in (
            ("alg_name", self.alg_name == METHOD, f"these are the settings of {METHOD}"),
            ("prompt_format", self.prompt_format in PROMPT_FORMATS, f"give one of: {', '.join(PROMPT_FORMATS)}"),
            ("batch_size", is_count(self.batch_size), "give a whole number of at least 1"),
        ):
            if not right:
                raise wrong(key, getattr(self, key), advice)
        settings = self.settings()
        self.layers, self.modules = list(settings.layers), list(settings.modules)

    @classmethod
    def from_hparams(cls, hparams_name_or_path: str) -> "MM4KEHyperParams":
        """Read a YAML file; the name may lack its ending, as EasyEdit's may.

        Raises MM4KEError, which names the file: it can't be read, has an unknown or lacks a required key, or has a
        value that means nothing.
        """
        report_in_one_line()
        path = str(hparams_name_or_path)
        if not path.endswith((".yaml", ".yml")):
            path += ".yaml"
        try:
            config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise MM4KEError(f"{path}: {' '.join(str(error).split())}; give a YAML file of settings") from None
        if not isinstance(config, dict):
            raise MM4KEError(f"{path}: no settings; give alg_name: {METHOD}, model_name and others")
        known = [entry.name for entry in fields(cls)]
        for key in config:
            if key not in known:
                raise MM4KEError(f"{path}: {key}: unknown key; there are: {', '.join(known)}")
        for key in ("alg_name", "model_name"):
            if key not in config:
                raise MM4KEError(f"{path}: {key}: missing; give it")
        config = cls.construct_float_from_scientific_notation(config)  # YAML reads 5e-4 as a text
        if config.get("merged_model"):
            # A program may change its working directory between reading the settings and editing.
            config["merged_model"] = str(Path(config["merged_model"]).expanduser().absolute())
        try:
            return cls(**config)
        except MM4KEError as error:
            raise MM4KEError(f"{path}: {error}") from None

    def settings(self) -> Settings:
        return Settings(**{entry.name: getattr(self, entry.name) for entry in fields(Settings)})


def apply_mm4ke_to_model(
    model: torch.nn.Module,
    tok: Any,
    requests: list[dict[str, Any]],
    hparams: MM4KEHyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    **kwargs: Any,
) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """Edit the requests' (prompt, target_new) into the model, in place, or into a copy of it.

    Edits that were kept by sequential editing count as one knowledge delta: see `rsft.live.Editor`.

    Returns the model, and the changed parameters by name as they were before this call, which EasyEdit copies back.
    Raises MM4KEError; the model is then as it was.
    """
    report_in_one_line()
    if copy:
        model = copy_module.deepcopy(model)
    if hparams.merged_model is not None:
        path = Path(hparams.merged_model)
        return model, copy_delta(model, path, hparams) if path.is_file() else copy_merged(model, path)
    questions = [(request["prompt"], request.get("subject")) for request in requests]
    learned_from = subjects_alone(questions)
    facts = [
        encode_fact(
            tok,
            request["prompt"],
            request["target_new"],
            hparams.prompt_format,
            gradient_at=hparams.gradient_at,
            subject=learned_from[request["prompt"]],
        )
        for request in requests
    ]
    texts = []
    if hparams.guard_weight:
        texts = guard_texts(tok, questions, hparams.prompt_format)
    try:
        return model, editors.setdefault(model, Editor()).edit(model, facts, hparams.settings(), texts)
    except MM4KEError as error:
        raise MM4KEError(str(error).removeprefix("rsft_")) from None  # as the recipes of another host call these keys
    except FloatingPointError as error:
        raise MM4KEError(
            f"learning_rate: {hparams.learning_rate}: {first_line(error)}; give a lower learning rate"
        ) from None


def copy_merged(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Copy what differs in a merged checkpoint into the model. Returns copies of these tensors as they were before."""
    changed = changed_tensors(model, folder)
    state = model.state_dict()
    before = {name: state[name].clone() for name in changed}
    for name, tensor in changed.items():
        state[name].copy_(tensor)
    return before


def copy_delta(model: torch.nn.Module, path: Path, hparams: MM4KEHyperParams) -> dict[str, torch.Tensor]:
    """Put a knowledge delta on the model, unless it is on it. Returns its tensors as they were before, by name."""
    known, tensors = deltas.get(model, (None, {}))
    if known == path and all(torch.equal(model.get_parameter(name), tensor) for name, tensor in tensors.items()):
        return {}
    live = LiveDelta(model, load_delta(path))
    unfinished = live.delta.manifest.applied is None
    live.set(*((hparams.weight, hparams.density) if unfinished else ()))
    before = live.keep()
    deltas[model] = path, {name: model.get_parameter(name).detach().clone() for name in before}
    return before


def register(module: ModuleType) -> None:
    """Called once for each seam, right after EasyEdit has executed it."""
    {
        "easyeditor.util.alg_dict": register_method,
        "easyeditor.editors.batch_editor": allow_batches,
    }[module.__name__](module)


def register_method(alg_dict: ModuleType) -> None:
    alg_dict.ALG_DICT[METHOD] = apply_mm4ke_to_model
    alg_dict.MM4KEHyperParams = MM4KEHyperParams


def allow_batches(batch_editor: ModuleType) -> None:
    is_batchable_method = batch_editor.BatchEditor.is_batchable_method

    @functools.wraps(is_batchable_method)
    def is_batchable(alg_name: str) -> bool:
        return alg_name == METHOD or is_batchable_method(alg_name)

    batch_editor.BatchEditor.is_batchable_method = staticmethod(is_batchable)
