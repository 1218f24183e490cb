"""What a mergekit recipe with `merge_method: mm4ke` may say, and what the models that it names must be like.

mergekit ignores keys that it does not know, and finds damaged or unlike models only after it has begun to write.
Everything that can be known before is checked here.
"""

import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NoReturn

import click
import torch
import yaml
from mergekit.architecture import WeightInfo, get_architecture_info
from mergekit.card import is_hf
from mergekit.common import ModelReference, dtype_from_name, get_config_value, set_config_value
from mergekit.config import (
    ConditionalParameter,
    InputModelDefinition,
    InputSliceDefinition,
    MergeConfiguration,
    OutputModuleDefinition,
    OutputSliceDefinition,
)
from mergekit.io.tasks import LoaderCache
from mergekit.merge_methods.base import MergeMethodSpec, ParameterSpec
from mergekit.options import MergeOptions
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoConfig

from ...errors import MM4KEError, first_line
from ...storage.tensors import equal
from .caches import open_model
from .heads import differ_in_the_head
from .plan import listed, names_of, not_loadable, not_stored, takes_models_as_they_are

# What attention needs and no training changes. Whether it is in a file depends on the version of transformers.
BUFFERS = re.compile(r"(attention|attn)\.(bias|masked_bias)$|\.(inv_freq|position_ids)$")

# The class with which mergekit reads what stands under a key.
READERS = {
    "models": InputModelDefinition,
    "slices": OutputSliceDefinition,
    "sources": InputSliceDefinition,
    "modules": OutputModuleDefinition,
}


def recipe_name() -> str:
    """The recipe as the user wrote it on the command line, for error messages."""
    context = click.get_current_context(silent=True)
    if context and (path := context.params.get("config_file") or context.params.get("config_path")):
        return path
    return next((word for word in sys.argv[1:] if word.endswith((".yaml", ".yml"))), "merge recipe")


def refuse(problem: str) -> NoReturn:
    raise MM4KEError(f"{recipe_name()}: {problem}")


def check_recipe(config: BaseModel, source: str, spec: MergeMethodSpec) -> None:
    """Refuse unknown keys, parameters out of their range, unknown dtypes, and a recipe without base or edited model.

    config: mergekit's MergeConfiguration, or what `mergekit-pytorch` reads a recipe with, which has fewer keys
    source: the recipe's YAML text, which still has the keys that mergekit drops

    Raises MM4KEError, which names the recipe, the key, its value and what would be right.
    """
    check_keys(yaml.safe_load(source), type(config), spec)
    for key in ("dtype", "out_dtype"):
        if (name := getattr(config, key)) and not _is_float_dtype(name):
            refuse(f"{key}: {name}: give bfloat16, float16 or float32")
    if isinstance(config, MergeConfiguration):
        slices, models = _slices(config), config.referenced_models()
    else:
        slices, models = [], [entry.model for entry in config.models]
    if config.base_model is None and not (slices and all(slice_out.base_model for slice_out in slices)):
        refuse("base_model: missing; give the model before the edit, which the delta is taken from")
    if not set(models) - {config.base_model}:
        refuse("models: nothing but the base_model; give the edited model")


def check_keys(recipe: dict, reader: type[BaseModel], spec: MergeMethodSpec) -> None:
    """Refuse keys that mergekit would ignore when it reads the recipe with `reader`, and bad values of parameters."""
    for problem in _problems(recipe, reader, spec, ""):
        refuse(problem)


def _problems(part: object, reader: type[BaseModel], spec: MergeMethodSpec, where: str) -> Iterator[str]:
    """What is wrong in one part of the recipe, which mergekit reads with `reader`, and in the parts below it."""
    parameters = {parameter.name: parameter for parameter in spec.parameters}
    if not isinstance(part, dict):
        yield f"{where.removesuffix('.')}: {part}: give keys and values; there are: {', '.join(reader.model_fields)}"
        return
    for key, value in part.items():
        if key in parameters:
            yield f"{where}{key}: {value}: mergekit would ignore it here; write it under {where}parameters"
        elif key not in reader.model_fields:
            yield f"{where}{key}: unknown key; there are: {', '.join(reader.model_fields)}"
        elif value is None:
            continue
        elif key == "parameters" and not isinstance(value, dict):
            yield f"{where}parameters: {value}: give names and numbers; there are: {', '.join(parameters)}"
        elif key == "parameters":
            for name, setting in value.items():
                if name in parameters:
                    yield from _setting_problems(setting, parameters[name], f"{where}parameters.{name}")
                else:
                    yield f"{where}parameters.{name}: unknown; {spec.name} has: {', '.join(parameters)}"
        elif key in READERS and not isinstance(value, (list, dict)):
            yield f"{where}{key}: {value}: give a list"
        elif key in READERS:
            for index, entry in value.items() if isinstance(value, dict) else enumerate(value):
                yield from _problems(entry, READERS[key], spec, f"{where}{key}[{index}].")


def check_references(config: MergeConfiguration, names: Collection[str], options: MergeOptions) -> None:
    """Refuse models that are neither here nor on a hub. names: of merges, whose results will be here."""
    for model in config.referenced_models():
        path = model.model.path
        if path in names or Path(path).is_file():
            continue
        key = "base_model" if model == config.base_model else "models"
        _check_location(model, key, config.base_model, options)
        try:
            model.config(options.trust_remote_code)
        except (OSError, RuntimeError, ValueError) as error:
            refuse(
                f"{key}: {model}: no merge of this name ({', '.join(sorted(names))}) and no model: {first_line(error)}"
            )


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1


def _setting_problems(setting: object, parameter: ParameterSpec, where: str) -> Iterator[str]:
    """The same for one parameter's value: a number, a gradient (a list of them), or a list of filters."""
    if isinstance(setting, list):
        for index, entry in enumerate(setting):
            yield from _setting_problems(entry, parameter, f"{where}[{index}]")
    elif isinstance(setting, dict):
        for key in sorted(setting.keys() - ConditionalParameter.model_fields.keys(), key=str):
            yield f"{where}.{key}: unknown key; there are: {', '.join(ConditionalParameter.model_fields)}"
        yield from _setting_problems(setting.get("value"), parameter, f"{where}.value")
    else:
        try:
            parameter.validate(setting)
        except ValidationError as error:
            yield f"{where}: {setting}: {error.errors()[0]['msg']}"


def _is_float_dtype(name: str) -> bool:
    try:
        return dtype_from_name(name).is_floating_point
    except RuntimeError:
        return False


def _slices(config: MergeConfiguration) -> list[OutputSliceDefinition]:
    modules = (config.modules or {}).values()
    return [*(config.slices or []), *(part for module in modules for part in module.slices or [])]


def check_models(config: MergeConfiguration, options: MergeOptions) -> None:
    """Refuse models that are missing, damaged, unlike the base, equal to it, or not wholly known to mergekit.

    Models that are on a hub are fetched by mergekit, as it would do a moment later. Shapes and vocabularies are not
    compared where the recipe asks mergekit to change them (`slices`, `tokenizer`, --unsafe-truncate-embeddings),
    architectures not with --allow-crimes, pickled checkpoints not at all.

    Raises MM4KEError, which names the recipe and the model, or the damaged file.
    """
    LoaderCache().setup(options)
    base = config.base_model
    models = sorted(config.referenced_models(), key=lambda model: (model != base, str(model)))
    checkpoints, stored = {}, {}
    for model in models:
        key = "base_model" if model == base else "models"
        _check_location(model, key, base, options)
        checkpoints[model] = _open_checkpoint(model, key, options)
        stored[model] = set(open_model(model, options).tensor_paths)
    others = [model for model in models if model != base]
    changes = bool(_slices(config) or config.tokenizer or config.tokenizer_source)
    for model in others if not changes else ():
        _check_alike(base, model, options)
        _check_quantized(checkpoints[base], checkpoints[model], model, config)
        _check_tensors(checkpoints[base], checkpoints[model], base, model, options)

    absent = {model: not_stored(_listed(model, config, options), stored[model]) for model in models}
    by_stored_tensors = any(absent.values()) and takes_models_as_they_are(config, options)
    for model in models if not by_stored_tensors else ():
        model_type = model.config(options.trust_remote_code).model_type
        for name in not_loadable(absent[model], stored[model], model_type):
            key = "base_model" if model == base else "models"
            refuse(
                f"{key}: {model}: mergekit needs {name}, which is not in it; without slices, modules, tokenizer and "
                "--unsafe-truncate-embeddings it can be merged, also by `mm4ke delta extract` and `apply`"
            )
    for model in others if not changes else ():
        if by_stored_tensors:
            _check_stored(stored, model, config, options)
        else:
            _check_known(stored, model, config, options)


def _listed(model: ModelReference, config: MergeConfiguration, options: MergeOptions) -> list[WeightInfo]:
    key = "base_model" if model == config.base_model else "models"
    try:
        if not model.config(options.trust_remote_code).architectures:
            raise ValueError("config.json names no architectures")
        return listed(model, config, options)
    except Exception as error:  # noqa: BLE001  (of as many kinds as there are odd configurations)
        refuse(
            f"{key}: {model}: mergekit can't tell its architecture: {first_line(error)}; "
            "merge it by `mm4ke delta extract` and `apply`"
        )


def _check_location(model: ModelReference, key: str, base: ModelReference | None, options: MergeOptions) -> None:
    for path in (model.model.path, model.lora.path if model.lora else model.model.path):
        if _looks_local(path) and not Path(path).is_dir():
            refuse(f"{key}: {path}: no such folder; give a model's folder or a hub id such as org/name")
        if path == model.model.path and is_lora(Path(path)):
            refuse(
                f"{key}: {path}: is a LoRA, not a model; write {base or 'MODEL'}+{path} and give --lora-merge-cache "
                "FOLDER, where the model with the LoRA in it is kept"
            )
        try:
            if options.write_model_card:
                is_hf(path)
        except Exception as error:  # noqa: BLE001  (whatever goes wrong on the network)
            refuse(
                f"{key}: {path}: the model card would link it if it is a hub id too, and the hub can't be asked "
                f"({first_line(error)}); write ./{path}"
            )


def is_lora(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def _open_checkpoint(model: ModelReference, key: str, options: MergeOptions) -> dict[str, safe_open]:
    """Each tensor's name and the open file that holds it. Opening compares a file's length with its header."""
    try:
        model.config(options.trust_remote_code)
        index = open_model(model, options)
    except MM4KEError as error:
        refuse(f"{key}: {error}")
    except SafetensorError as error:  # mergekit opens the file at once only where there is but one
        if model.lora:
            refuse(f"{key}: {model}: a damaged file: {first_line(error)}; copy or make the model and the LoRA again")
        _refuse_damaged(Path(model.model.path, "model.safetensors"), first_line(error))
    except (OSError, RuntimeError, ValueError) as error:
        refuse(f"{key}: {model}: {first_line(error)}")
    checkpoint = {}
    for shard in index.shards if index.is_safetensors else []:
        path = Path(index.base_path, shard.filename)
        try:
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            _refuse_damaged(path, first_line(error))
        if absent := set(shard.contained_keys) - set(file.keys()):
            _refuse_damaged(path, f"{min(absent)} is not in it")
        checkpoint |= dict.fromkeys(shard.contained_keys, file)
    return checkpoint


def _refuse_damaged(path: Path, reason: str) -> NoReturn:
    raise MM4KEError(f"{path}: damaged: {reason}; copy or make this file again")


BASES_VOCABULARY = "add `tokenizer: {source: base}` to the recipe, which takes the base's vocabulary"


def _check_alike(base: ModelReference, edited: ModelReference, options: MergeOptions) -> None:
    """Compare what the configurations and the tokenizers say."""

    def described(model: ModelReference) -> dict[str, object]:
        config = model.config(options.trust_remote_code)
        text = config.get_text_config()
        return {
            "architectures": config.architectures,
            "num_hidden_layers": getattr(text, "num_hidden_layers", None),
            "vocab_size": getattr(text, "vocab_size", None),
        }

    remedies = {
        "architectures": "merge only like models, or try --allow-crimes",
        "num_hidden_layers": "merge only like models",
        "vocab_size": f"merge only like models, or {BASES_VOCABULARY}",
    }
    if options.allow_crimes:
        del remedies["architectures"]
    if options.unsafe_truncate_embeddings:
        del remedies["vocab_size"]
    expected, found = described(base), described(edited)
    for key, remedy in remedies.items():
        if found[key] != expected[key]:
            refuse(f"models: {edited}: {key} is {found[key]}, in base_model {base} {expected[key]}; {remedy}")
    if options.unsafe_truncate_embeddings:
        return

    files = [Path(open_model(model, options).base_path, "tokenizer.json") for model in (base, edited)]
    if all(file.is_file() for file in files):
        vocabulary, other = (Tokenizer.from_file(str(file)).get_vocab() for file in files)
        if changed := [token for token in vocabulary if other.get(token) != vocabulary[token]]:
            token = min(changed, key=vocabulary.get)
            refuse(
                f"models: {edited}: {len(changed)} tokens have another id than in base_model {base}, such as "
                f"{token!r} ({other.get(token)}, was {vocabulary[token]}); merge only models of one vocabulary, or "
                f"{BASES_VOCABULARY}"
            )


def write_vocabulary_size(folder: Path, config: MergeConfiguration, options: MergeOptions) -> None:
    """Have a result of --unsafe-truncate-embeddings say how many tokens it has; mergekit leaves that at the base's."""
    key = get_architecture_info(config, options).vocab_size_config_key or "vocab_size"
    models = [model.config(options.trust_remote_code) for model in config.referenced_models()]
    result = AutoConfig.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    set_config_value(result, key, min(get_config_value(model, key) for model in models))
    result.save_pretrained(folder)


def _check_tensors(
    base: dict[str, safe_open],
    edited: dict[str, safe_open],
    base_model: ModelReference,
    edited_model: ModelReference,
    options: MergeOptions,
) -> None:
    """Compare the shapes of all tensors, then first rows and at last everything, up to the first difference."""
    common = [name for name in base if name in edited]
    parts = {name: (base[name].get_slice(name), edited[name].get_slice(name)) for name in common}
    for name, (before, after) in parts.items():
        if before.get_shape() != after.get_shape():
            if options.unsafe_truncate_embeddings and before.get_shape()[1:] == after.get_shape()[1:]:
                return  # of two vocabularies, so the models differ
            refuse(
                f"models: {edited_model}: {name} has the shape {after.get_shape()}, in base_model {base_model} "
                f"{before.get_shape()}; merge only models of one architecture and vocabulary"
            )
    # A tensor that was trained mostly differs in its first row already: models need not be read for that.
    if any(not equal(*(part[:1] for part in parts[name])) for name in common if parts[name][0].get_shape()):
        return
    for name in tqdm(common, desc=f"Looking for a change in {edited_model}", disable=options.quiet, leave=False):
        if not equal(base[name].get_tensor(name), edited[name].get_tensor(name)):
            return
    if common and not differ_in_the_head(base_model, edited_model):
        refuse(
            f"models: {edited_model}: equals base_model {base_model}, so there is nothing to merge; "
            "did training change nothing?"
        )


def _check_quantized(
    base: dict[str, safe_open], edited: dict[str, safe_open], edited_model: ModelReference, config: MergeConfiguration
) -> None:
    """Integers have no delta: they must be alike, and stay what they are. 8-bit floats nobody can add up."""
    for name in sorted(base.keys() & edited.keys()):
        kinds = {files[name].get_slice(name).get_dtype() for files in (base, edited)}
        if kinds <= {"F64", "F32", "F16", "BF16"} or BUFFERS.search(name):
            continue
        if any(kind.startswith("F") for kind in kinds):
            refuse(
                f"models: {edited_model}: {name} is {' and '.join(sorted(kinds))}, which mergekit can't merge; use "
                "`mm4ke delta extract` and `apply` if the edit did not change it, or merge before quantizing"
            )
        if not torch.equal(base[name].get_tensor(name), edited[name].get_tensor(name)):
            refuse(
                f"models: {edited_model}: {name} holds other integers than the base's, and only floating point can be "
                "merged; merge before quantizing"
            )
        for key in ("dtype", "out_dtype"):
            if value := getattr(config, key):
                refuse(f"{key}: {value}: {name} holds integers, which must stay so; leave {key} out")


def _check_known(
    stored: dict[ModelReference, set[str]], edited: ModelReference, config: MergeConfiguration, options: MergeOptions
) -> None:
    """mergekit writes the tensors that its description of the architecture lists, and silently drops all others."""
    base = config.base_model
    known = set().union(*map(names_of, _listed(base, config, options)))
    lost = sorted(
        stored[base] - known - {name for name in stored[base] - stored[edited] if _is_spare(name, base, options)}
    )
    if lost:
        refuse(
            f"base_model: {base}: mergekit does not know {len(lost)} of its tensors, such as {lost[0]}, "
            "and would drop them; merge this model by `mm4ke delta extract` and `apply`"
        )


def _check_stored(
    stored: dict[ModelReference, set[str]], edited: ModelReference, config: MergeConfiguration, options: MergeOptions
) -> None:
    """Where tensors are merged by the names that the models store, the edited ones must store what the base does."""
    base = config.base_model
    for name in sorted(stored[base] ^ stored[edited]):
        if not _is_spare(name, base, options):
            has, lacks = (base, edited) if name in stored[base] else (edited, base)
            refuse(f"models: {edited}: {name} is in {has} and not in {lacks}; merge only like models")


def _is_spare(name: str, base: ModelReference, options: MergeOptions) -> bool:
    """Whether a model works without this tensor: a buffer, or a copy of the embeddings that are the output head."""
    tied = base.config(options.trust_remote_code).get_text_config().tie_word_embeddings
    return bool(BUFFERS.search(name)) or (tied and name.endswith(("lm_head.weight", "embed_out.weight")))
