"""What mergekit's commands do before `run_merge` sees a recipe, or without it.

`mergekit-multi` and `mergekit-pytorch` drop keys that they don't know, and the former merges what comes first before
it looks at what comes last. So all that a recipe says is checked when a command begins: there each of them calls
`MergeOptions.apply_global_options`. `mergekit-legacy` has no recipe, and sets a parameter that is not ours.
"""

import difflib
import functools
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml
from click.core import ParameterSource
from mergekit import merge_methods
from mergekit.config import MergeConfiguration
from mergekit.io import ShardedTensorIndex
from mergekit.merge_methods.base import MergeMethodSpec
from mergekit.options import MergeOptions
from pydantic import ValidationError
from safetensors import SafetensorError

from ...errors import MM4KEError, first_line, report_in_one_line
from .. import MERGEKIT
from .output import check_output
from .recipe import check_keys, check_recipe, check_references, recipe_name, refuse

# `merge_method: mm4ke`, also where the rest can't be read.
METHOD_LINE = re.compile(r"^[\s{]*[\"']?([\w -]+?)[\"']?\s*:\s*[\"']?([\w.-]+)", re.MULTILINE)


def check_command(options: MergeOptions, spec: MergeMethodSpec) -> None:
    """Refuse, in one line, a recipe of ours that can't be merged, as far as it can be known before any merge runs."""
    context = click.get_current_context(silent=True)
    if context is None:
        return
    checks = {"mergekit-yaml": _check_one, "mergekit-multimerge": _check_all, "mergekit-pytorch": _check_files}
    path = context.params.get("config_file") or context.params.get("config_path")
    check = checks.get(context.command.name)
    if check is None or path is None or not Path(path).is_file():
        return
    text = Path(path).read_bytes().decode("utf-8", "replace")
    if not any(_is_key(key) and is_meant(value, spec) for key, value in METHOD_LINE.findall(text)):
        return
    report_in_one_line()
    MERGEKIT.require_supported(f"merge_method: {spec.name}")
    try:
        documents = list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        refuse(f"{where}not YAML: {getattr(error, 'problem', None) or first_line(error)}")
    if check is not _check_all and len(documents) > 1:
        refuse(f"{len(documents)} documents, separated by ---; give one, or merge them with mergekit-multi")
    check(documents, context, options, spec)


def is_meant(name: str, spec: MergeMethodSpec) -> bool:
    """Whether a recipe means our method, also by a name that is not quite its."""
    if name in _known_methods():
        return name == spec.name
    name = name.casefold()
    return spec.name in name or bool(difflib.get_close_matches(name, [spec.name], cutoff=0.7))


def check_method(name: str, spec: MergeMethodSpec) -> None:
    """Refuse a misspelt name of our method."""
    if name != spec.name and is_meant(name, spec):
        refuse(f"merge_method: {name}: no such method; write {spec.name}")


def for_legacy(config: MergeConfiguration, spec: MergeMethodSpec) -> MergeConfiguration:
    """The recipe that `mergekit-legacy` makes of its options, without the `normalize` that it always sets."""
    context = click.get_current_context(silent=True)
    if context is None or context.command.name != "mergekit-legacy":
        return config
    names = ", ".join(f"--{parameter.name}" for parameter in spec.parameters)
    for option in ("normalize", "int8_mask", "naive_count"):
        if context.params[option] and context.get_parameter_source(option) is not ParameterSource.DEFAULT:
            raise MM4KEError(f"--{option.replace('_', '-')}: not an option of {spec.name}, which has: {names}")
    parameters = {name: value for name, value in (config.parameters or {}).items() if name != "normalize"}
    return config.model_copy(update={"parameters": parameters or None})


def _known_methods() -> set[str]:
    return {method.spec.name for method in merge_methods.registered_methods()}


def _is_key(key: str) -> bool:
    return bool(difflib.get_close_matches(key.strip().casefold(), ["merge_method"], cutoff=0.7))


def _read(document: Any, reader: type, spec: MergeMethodSpec) -> Any:
    """One document as mergekit reads it."""
    if not isinstance(document, dict):
        refuse("no recipe; give keys such as merge_method, base_model and models")
    if "merge_method" not in document:
        meant = next((f"; {key} is not it" for key in map(str, document) if _is_key(key)), "")
        refuse(f"merge_method: missing{meant}")
    name = str(document["merge_method"])
    check_method(name, spec)
    if name not in _known_methods():
        refuse(f"merge_method: {name}: no such method; mergekit has: {', '.join(sorted(_known_methods()))}")
    if name == spec.name:
        check_keys(document, reader, spec)
    try:
        return reader.model_validate(document)
    except ValidationError as error:
        problem = error.errors()[0]
        refuse(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}")
    except (RuntimeError, TypeError, AttributeError) as error:  # of mergekit's own validators
        refuse(first_line(error))


def _check_one(documents: list, context: click.Context, options: MergeOptions, spec: MergeMethodSpec) -> None:
    config = _read(documents[0] if documents else None, MergeConfiguration, spec)
    if config.merge_method == spec.name:
        check_recipe(config, yaml.safe_dump(documents[0]), spec)


def _check_all(documents: list, context: click.Context, options: MergeOptions, spec: MergeMethodSpec) -> None:
    """All documents, before the first is merged: `mergekit-multi`."""
    script, parameters = _script(context), context.params
    folder, lazy = parameters["intermediate_dir"], parameters["lazy"]
    names = {str(document["name"]) for document in documents if isinstance(document, dict) and "name" in document}
    for number, document in enumerate(documents, start=1):
        name = document.get("name") if isinstance(document, dict) else None
        try:
            if not isinstance(document, dict):
                _read(document, MergeConfiguration, spec)
            recipe = {key: value for key, value in document.items() if key != "name"}
            config = _read(recipe, MergeConfiguration, spec)
            if config.merge_method != spec.name:
                continue
            check_recipe(config, yaml.safe_dump(recipe), spec)
            check_references(config, names, options)
            out = parameters["out_path"] if name is None else os.path.join(folder, str(name))
            is_there = any(Path(out, file).exists() for file in script["MODEL_CHECK_FILENAMES"]) if out else True
            if not (lazy and is_there):
                check_output(out, config)
        except MM4KEError as error:
            place = f"{recipe_name()}: "
            label = f"document {number}" if name is None else f"document {number} ({name})"
            raise MM4KEError(f"{place}{label}: {str(error).removeprefix(place)}") from None
    try:
        merges, needed = script["load_config"](yaml.safe_dump_all(documents), folder)
        script["make_tasks"](merges, needed, options, folder, parameters["out_path"], lazy)
    except (ValueError, RuntimeError) as error:
        refuse(first_line(error))


def _check_files(documents: list, context: click.Context, options: MergeOptions, spec: MergeMethodSpec) -> None:
    """A recipe that names files instead of models: `mergekit-pytorch`, which has a planner of its own."""
    script = _script(context)
    config = _read(documents[0] if documents else None, script["RawPyTorchMergeConfig"], spec)
    if config.merge_method != spec.name:
        return
    check_recipe(config, yaml.safe_dump(documents[0]), spec)
    out = Path(context.params["out_path"]).resolve()
    for key, path in _files(config):
        if not Path(path).is_file():
            refuse(
                f"{key}: {path}: no such file; give a file of tensors, such as {path.rstrip('/')}/model.safetensors"
            )
        if Path(path).resolve().parent == out:
            refuse(f"{key}: {path}: is in the folder for the result; give another folder")
    plan = script["plan_flat_merge"]

    def plan_with_one_rounding(config, *args):
        """`dtype` is that of the result. mergekit would cast the models to it before their deltas are taken."""
        script["SimpleLoaderCache"]().loaders.clear()
        out_dtype = config.out_dtype or config.dtype
        try:
            # The planner takes names from the edited models only, and would drop what the base alone has.
            base = ShardedTensorIndex.from_file(config.base_model).tensor_paths.keys()
            edited = (ShardedTensorIndex.from_file(model.model).tensor_paths.keys() for model in config.models)
            if (lost := sorted(base - set().union(*edited))) and not context.params["tensor_intersection"]:
                raise RuntimeError(f"base_model: {config.base_model}: {lost[0]} is in no other file")
            return plan(config.model_copy(update={"dtype": None, "out_dtype": out_dtype}), *args)
        except (OSError, RuntimeError, SafetensorError) as error:
            refuse(f"{first_line(error)}; give files that hold the same tensors, or see mergekit-pytorch --help")

    script["plan_flat_merge"] = plan_with_one_rounding
    context.call_on_close(functools.partial(script.__setitem__, "plan_flat_merge", plan))


def _files(config: Any) -> Iterator[tuple[str, str]]:
    yield "base_model", config.base_model
    yield from ((f"models[{index}]", model.model) for index, model in enumerate(config.models))


def _script(context: click.Context) -> dict[str, Any]:
    """The module that a command is in, which need not be the one of that name: `python -m` calls it __main__."""
    return inspect.unwrap(context.command.callback).__globals__
