"""The keys that R-SFT adds to a LLaMA-Factory recipe, and what a recipe that uses them may not say.

Everything that can be known before the model is loaded is checked here, so that a typo costs seconds.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import MM4KEError, first_line
from ...rsft.prefix import PREFIX_CACHE_MB
from ...rsft.settings import Settings, is_count, wrong
from ...storage.checkpoint import is_safetensors, tensor_files


@dataclass
class RsftArguments:
    """Arguments of robust supervised fine-tuning (arXiv 2506.12384, Algorithm 1)."""

    rsft: bool = field(
        default=False,
        metadata={
            "help": "Train every fact for at most rsft_steps_per_sample consecutive steps, stopping as soon as its "
            "loss is under rsft_loss_threshold (robust supervised fine-tuning)."
        },
    )
    rsft_layers: str = field(
        default="5",
        metadata={"help": "The layer whose FFN R-SFT trains, counted from 0; several as a list or with commas."},
    )
    rsft_modules: str = field(
        default="ffn",
        metadata={"help": "What R-SFT trains in these layers: ffn, or parts of it such as down_proj, with commas."},
    )
    rsft_steps_per_sample: int = field(
        default=Settings.steps_per_sample,
        metadata={"help": "K: the most updates that R-SFT makes in one visit of one fact."},
    )
    rsft_loss_threshold: float = field(
        default=Settings.loss_threshold,
        metadata={
            "help": "tau: R-SFT leaves a fact whose mean loss per token is under this (nats), both over the answer's "
            "own tokens and over all that are trained, with the end of the turn."
        },
    )
    rsft_gradient_at: str = field(
        default=Settings.gradient_at,
        metadata={
            "help": "Where a fact is learned: at all of its tokens (all), or at those of its question from the subject on "
            "(from_subject), which spares other questions. Without a subject: from its first name on."
        },
    )
    rsft_guard_weight: float = field(
        default=Settings.guard_weight,
        metadata={
            "help": "How strongly every update is held to leave the trained FFN as it was on everyday conversations and "
            "on the facts' questions with other subjects; 0 is without this guard."
        },
    )
    rsft_guard_file: str | None = field(
        default=None,
        metadata={
            "help": "A JSON list of conversations that the guard shall keep as well: "
            '[{"instruction": "...", "output": "..."}].'
        },
    )
    rsft_prefix_cache_mb: int | None = field(
        default=None,
        metadata={
            "help": "How many megabytes R-SFT may use to keep what the layers below the trained one compute for a "
            f"fact. Same result. By default {PREFIX_CACHE_MB}, and none in a model with dropout."
        },
    )
    rsft_save_delta: bool = field(
        default=False,
        metadata={
            "help": "Also write what R-SFT changed as a knowledge delta, OUTPUT_DIR.delta.safetensors, from which weight "
            "and density can still be chosen."
        },
    )
    rsft_save_model: bool = field(
        default=True,
        metadata={"help": "Write the whole trained model; false only with rsft_save_delta: true."},
    )


@cache
def with_rsft_keys(original: type) -> type:
    """LLaMA-Factory's `FinetuningArguments` with the keys of `RsftArguments`, under the original's name.

    It is pickled by its original and its values, so that any process reads it, whether or not the hook was there.
    """

    @dataclass
    class FinetuningArguments(RsftArguments, original):
        __module__, __qualname__, __doc__ = original.__module__, original.__qualname__, original.__doc__

        def __reduce__(self) -> tuple:
            return _restored, (original, vars(self))

    return FinetuningArguments


def _restored(original: type, values: dict[str, Any]) -> Any:
    return _with_values(with_rsft_keys(original), values)


def without_rsft_keys(arguments: Any) -> Any:
    """What LLaMA-Factory makes of a recipe without us; with `rsft: true`, and of other classes, the arguments as given."""
    if not isinstance(arguments, RsftArguments) or arguments.rsft:
        return arguments
    ours = {entry.name for entry in fields(RsftArguments)}
    _, original = type(arguments).__bases__
    return _with_values(original, {key: value for key, value in vars(arguments).items() if key not in ours})


def _with_values(cls: type, values: dict[str, Any]) -> Any:
    """An instance without its checks, which `values` have gone through."""
    instance = object.__new__(cls)
    vars(instance).update(values)
    return instance


def recipe_name() -> str:
    """The recipe as the user wrote it on the command line, for error messages.

    LLaMA-Factory takes it from the first word only; a later one may be a value, such as a file of DeepSpeed's.
    """
    return next((word for word in sys.argv[1:2] if word.endswith((".yaml", ".yml", ".json"))), "command line")


def asks_for_rsft(args: dict | list[str]) -> bool:
    """Whether a recipe says `rsft: true`: its keys, or the words of a command line."""
    if isinstance(args, dict):
        return str(args.get("rsft")).lower() == "true"
    return any(word.lower() in ("--rsft", "--rsft=true") for word in args)


def advice_on(error: ValueError) -> str:
    """What transformers found wrong with the training arguments, in one line that says what would be right."""
    if "use_cpu" in str(error):
        return "bf16: true: no GPU here computes in bfloat16; on a CPU set bf16: false, which is faster, or add use_cpu: true"
    return first_line(error)


def check_recipe(model_args, data_args, training_args, finetuning_args) -> None:
    """Refuse what R-SFT cannot mean, and bring the `rsft_` values into one form: lists of layers and of modules.

    Raises MM4KEError, which names the recipe, the key, its value and what would be right.
    """

    def refuse(key: str, value: object, right: str) -> None:
        raise MM4KEError(f"{recipe_name()}: {wrong(key, value, right)}")

    shared = ("layers", "modules", "steps_per_sample", "loss_threshold", "gradient_at", "guard_weight")
    try:
        settings = Settings(**{key: getattr(finetuning_args, f"rsft_{key}") for key in shared})
    except MM4KEError as error:
        raise MM4KEError(f"{recipe_name()}: rsft_{error}") from None
    finetuning_args.rsft_layers = list(settings.layers)
    finetuning_args.rsft_modules = list(settings.modules)

    for arguments, key, reason in (
        (finetuning_args, "rsft_prefix_cache_mb", "give a whole number of megabytes, at least 1"),
        (training_args, "per_device_train_batch_size", "give a whole number of at least 1, the facts of one visit"),
    ):
        value = getattr(arguments, key)
        if value is not None and not is_count(value):
            refuse(key, value, reason)

    if not (finetuning_args.rsft_save_model or finetuning_args.rsft_save_delta):
        refuse("rsft_save_model", False, "nothing would be saved; set rsft_save_delta: true")

    for arguments, key, right, reason in (
        (finetuning_args, "stage", "sft", "R-SFT is supervised fine-tuning"),
        (finetuning_args, "finetuning_type", "freeze", "R-SFT trains the FFN of chosen layers, nothing else"),
        (training_args, "gradient_accumulation_steps", 1, "an update of R-SFT is one step on one batch"),
        (training_args, "auto_find_batch_size", False, "the batch is what R-SFT visits at once"),
        (data_args, "packing", False, "packed facts have no loss of their own"),
        (data_args, "neat_packing", False, "packed facts have no loss of their own"),
        (data_args, "train_on_prompt", False, "the question is given, the answer is what R-SFT trains and judges"),
        (data_args, "streaming", False, "R-SFT counts visits by epochs, which a stream does not have"),
        (data_args, "tokenized_path", None, "what was tokenized there would be trained, whatever the facts are now"),
        (model_args, "quantization_bit", None, "quantized weights can't be trained; give the model in 16 or 32 bit"),
        (
            model_args,
            "enable_liger_kernel",
            False,
            "its fused loss keeps to itself what tau judges, the answer's part",
        ),
        (model_args, "use_unsloth", False, "its kernels replace the layers that R-SFT selects"),
        (model_args, "use_kt", False, "its kernels replace the layers that R-SFT selects"),
        (model_args, "mixture_of_depths", None, "then a fact does not pass every layer"),
        (training_args, "fp16", False, "the loss scaler skips steps that R-SFT would count; use bf16"),
        (finetuning_args, "pure_bf16", False, "the trained weights stay in float32; use bf16, on a CPU with use_cpu"),
        (training_args, "fp8", False, "the trained weights stay in float32; use bf16"),
        (training_args, "deepspeed", None, "R-SFT is sequential and runs in one process"),
        (training_args, "label_smoothing_factor", 0, "the threshold is for the plain cross-entropy"),
        (training_args, "neftune_noise_alpha", None, "the threshold is for the loss without noise"),
        (training_args, "restore_callback_states_from_checkpoint", False, "R-SFT restores its statistics by itself"),
        (training_args, "ignore_data_skip", False, "a run that is resumed would visit facts again"),
        (finetuning_args, "use_dft_loss", False, "the threshold is for the plain cross-entropy"),
        (finetuning_args, "use_asft_loss", False, "the threshold is for the plain cross-entropy"),
        (finetuning_args, "use_eaft_loss", False, "the threshold is for the plain cross-entropy"),
        (finetuning_args, "use_galore", False, "R-SFT steps the optimizer within a visit; use a torch optimizer"),
        (finetuning_args, "use_apollo", False, "R-SFT steps the optimizer within a visit; use a torch optimizer"),
        (finetuning_args, "use_badam", False, "R-SFT steps the optimizer within a visit; use a torch optimizer"),
        (finetuning_args, "use_llama_pro", False, "rsft_layers says which layers are trained"),
        (finetuning_args, "use_hyper_parallel", False, "R-SFT is sequential and runs in one process"),
        (finetuning_args, "freeze_extra_modules", None, "rsft_modules says what is trained"),
    ):
        value = getattr(arguments, key)
        if value != right and (value or right):  # an unset key may be None, False or empty
            refuse(key, value, f"with rsft: true it must be {json.dumps(right)}: {reason}")

    if training_args.world_size > 1:
        refuse(
            "processes",
            training_args.world_size,
            "R-SFT is sequential, every visit starts from the weights the last one left: run it in one process "
            "(NPROC_PER_NODE=1, or CUDA_VISIBLE_DEVICES=0 where there are several GPUs)",
        )
    # For where the facts are tokenized, which sees these arguments only.
    data_args.rsft = True
    data_args.rsft_gradient_at = settings.gradient_at
    data_args.rsft_guard_file = finetuning_args.rsft_guard_file if settings.guard_weight else None
    data_args.rsft_guard_texts = [] if settings.guard_weight else None
    if settings.gradient_at != "all" and not model_args.disable_gradient_checkpointing:
        refuse("disable_gradient_checkpointing", False, f"rsft_gradient_at: {settings.gradient_at} needs true")
    if finetuning_args.rsft_guard_file and not settings.guard_weight:
        refuse("rsft_guard_file", finetuning_args.rsft_guard_file, "needs a guard; give rsft_guard_weight, such as 10")
    if training_args.do_train:
        _check_model_folder(model_args.model_name_or_path, refuse)
        _check_datasets(data_args, refuse)


def _check_model_folder(name: str, refuse) -> None:
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            refuse("model_name_or_path", name, "this folder has no config.json; give a model in transformers' format")
        if is_safetensors(folder):
            tensor_files(folder)  # it says which file is damaged or missing
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1:  # what no hub id looks like
        refuse("model_name_or_path", name, "no such folder; give a model's folder or a hub id such as org/name")


def _check_datasets(data_args, refuse) -> None:
    """The files behind `dataset` exist, are JSON, and every record has a question and an answer."""
    folder = data_args.dataset_dir
    if not isinstance(folder, str) or folder == "ONLINE" or folder.startswith("REMOTE:"):
        return
    info_file = Path(folder) / "dataset_info.json"
    if not info_file.is_file():
        refuse("dataset_dir", folder, f"{info_file} does not exist; `mm4ke facts FILE --output {folder}` writes it")
    info = _read_json(info_file)
    for name in data_args.dataset or []:
        if name not in info:
            refuse("dataset", name, f"not in {info_file}, which has: {', '.join(info)}")
        entry = info[name]
        if "file_name" not in entry or not entry["file_name"].endswith(".json"):
            continue  # a hub's dataset, a script, a folder, or another format: LLaMA-Factory reads and checks these
        file = Path(folder) / entry["file_name"]
        if not file.is_file():
            refuse("dataset", name, f"{file}, named in {info_file}, does not exist")
        for problem in _problems(_read_json(file), entry):
            raise MM4KEError(f"{file}: {problem}")


def _read_json(file: Path):
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise MM4KEError(f"{file}: line {error.lineno}, column {error.colno}: broken JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise MM4KEError(f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def _problems(records: object, entry: dict) -> Iterator[str]:
    if not isinstance(records, list):
        yield f"a JSON {type(records).__name__} where a list of facts should be"
        return
    if not records:
        yield "has no facts; give at least one"
    if entry.get("formatting", "alpaca") != "alpaca":
        return
    columns = {"prompt": "instruction", "response": "output"} | entry.get("columns", {})
    for index, record in enumerate(records):
        for role in ("prompt", "response"):
            value = record.get(columns[role]) if isinstance(record, dict) else None
            if not isinstance(value, str) or not value.strip():
                yield f"record {index} (0-based): {columns[role]}: {json.dumps(value)}: give a text that is not empty"
