"""A study's file: which methods are run on which facts, and how often.

    model: ./work/base                  # a folder
    template: smollm2                   # LLaMA-Factory's name of its chat format
    facts:                              # any number of them; a path may have variables such as $MM4KE_DATA
      zsre: {file: $MM4KE_DATA/knowedit/ZsRE/ZsRE-test-all.json, limit: 100}
    seeds: [42]                         # of the trainings
    methods:                            # a row each, by its name
      base: {}                                          the model itself; always there
      told the fact: {in_context: true}                 the model itself, with the fact before each question
      R-SFT: {train: recipes/paper/rsft.yaml}           a recipe of LLaMA-Factory
      merged: {train: recipes/paper/rsft.yaml, merge: recipes/paper/merge.yaml}
                                                        and one of mergekit, of its base model and one other
      K = 1: {train: ..., set: {rsft_steps_per_sample: 1}}        values of the recipe, in place of its own
      tau: {train: ..., vary: {rsft_loss_threshold: [0.05, 0.1]}} a row for each value: "tau 0.05", "tau 0.1"
      ROME: {easyedit: ROME}                            a method of EasyEdit, with its settings for NAME
      LocFT-BF: {run: bash recipes/studies/locft.sh}    a command, see below
    hparams: smollm2-135m               # NAME, whose settings EasyEdit's methods take
    against: R-SFT                      # the row that all others are compared with, in pairs
    text: FILE                          # plain text, of which MEMIT and AlphaEdit take statistics

A command of `run` is given in its environment MODEL (a folder), FACTS (a JSON file, a list of prompt, target_new and
subject), TEMPLATE, SEED, and OUTPUT (the folder that it has to make: the edited model).
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import MM4KEError, first_line

KEYS = ("model", "template", "facts", "seeds", "methods", "against", "hparams", "text")
KINDS = ("train", "easyedit", "run", "in_context")
BESIDE = {"train": ("merge", "set", "vary"), "easyedit": (), "run": (), "in_context": ()}
BASE = "base"


@dataclass(frozen=True)
class Facts:
    name: str
    file: Path
    limit: int | None = None


@dataclass(frozen=True)
class Method:
    """One row; at most one of train, easyedit, run and in_context is there, and none for the base."""

    name: str
    train: Path | None = None
    merge: Path | None = None
    set: dict[str, Any] = field(default_factory=dict)
    easyedit: str | None = None
    run: str | None = None
    in_context: bool = False


@dataclass(frozen=True)
class Study:
    """See the module's docstring. methods: the base is the first one."""

    file: Path
    model: Path
    template: str
    facts: list[Facts]
    methods: list[Method]
    seeds: list[int]
    against: str | None
    hparams: str | None
    text: Path | None


def read_study(path: Path) -> Study:
    """The study that a file describes.

    Raises MM4KEError, which names the file and the key: unreadable, an unknown or a missing key, a value of another
    kind, a file that is missing, two rows of one name.
    """
    where = str(path)
    content = _mapping(_read_yaml(path), where, KEYS)
    for key in ("model", "template", "facts", "methods"):
        if key not in content:
            raise MM4KEError(f"{where}: {key} is missing; see recipes/study.md")
    model = _path(content["model"], f"{where}: model")
    if not model.is_dir():
        raise MM4KEError(f"{where}: model: {model}: no such folder; `mm4ke model` makes work/base")
    facts = [_facts(name, entry, where) for name, entry in _mapping(content["facts"], f"{where}: facts").items()]
    methods = [Method(BASE)]
    for name, entry in _mapping(content["methods"], f"{where}: methods").items():
        methods += _methods(str(name), entry, f"{where}: methods: {name}")
    for name in (names := [method.name for method in methods]):
        if names.count(name) > 1:
            raise MM4KEError(f"{where}: methods: {name}: two rows of this name; give each its own")
    seeds = content.get("seeds", [42])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise MM4KEError(f"{where}: seeds: {seeds}: give a list of whole numbers such as [42, 43]")
    against = content.get("against")
    if against is not None and against not in names:
        raise MM4KEError(f"{where}: against: {against}: no such row; there are {', '.join(names)}")
    if any(method.easyedit for method in methods) and not isinstance(content.get("hparams"), str):
        raise MM4KEError(f"{where}: hparams is missing: whose settings EasyEdit's methods take, such as smollm2-135m")
    text = _file(content["text"], f"{where}: text") if content.get("text") else None
    template, hparams = str(content["template"]), content.get("hparams")
    return Study(path, model, template, facts, methods, seeds, against, hparams, text)


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe of a host. Raises MM4KEError: it is none."""
    content = _read_yaml(path)
    if not isinstance(content, dict):
        raise MM4KEError(f"{path}: has no keys with values; give a recipe")
    return content


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise MM4KEError(f"{path}: can't be read as YAML ({first_line(error)})") from None


def _facts(name: str, entry: Any, where: str) -> Facts:
    where = f"{where}: facts: {name}"
    entry = _mapping(entry, where, ("file", "limit"))
    if "file" not in entry:
        raise MM4KEError(f"{where}: file is missing: facts as `mm4ke facts` reads them")
    limit = entry.get("limit")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise MM4KEError(f"{where}: limit: {limit}: give how many records are read, at least 1")
    return Facts(str(name), _file(entry["file"], f"{where}: file"), limit)


def _methods(name: str, entry: Any, where: str) -> Iterator[Method]:
    """The rows of one entry; several where it varies a value. None for the base, which is there already."""
    entry = _mapping(entry, where, (*KINDS, *BESIDE["train"]))
    kinds = [kind for kind in KINDS if kind in entry]
    if not entry and name == BASE:
        return
    if len(kinds) != 1:
        raise MM4KEError(f"{where}: give one of {', '.join(KINDS)}, it has {' and '.join(kinds) or 'none'}")
    kind = kinds[0]
    if others := [key for key in entry if key != kind and key not in BESIDE[kind]]:
        raise MM4KEError(f"{where}: {others[0]} means nothing beside {kind}; leave it out")
    if kind == "in_context":
        if entry[kind] is not True:
            raise MM4KEError(f"{where}: in_context: {entry[kind]}: give true")
        yield Method(name, in_context=True)
    elif kind != "train":
        if not isinstance(entry[kind], str) or not entry[kind].strip():
            raise MM4KEError(f"{where}: {kind}: {entry[kind]}: give a text")
        yield Method(name, **{kind: entry[kind]})
    else:
        train = _file(entry["train"], f"{where}: train")
        merge = _file(entry["merge"], f"{where}: merge") if "merge" in entry else None
        values = _mapping(entry.get("set", {}), f"{where}: set")
        varied = _mapping(entry.get("vary", {}), f"{where}: vary")
        if len(varied) > 1 or not all(isinstance(of, list) and of for of in varied.values()):
            raise MM4KEError(f"{where}: vary: give one key with the list of its values")
        if not varied:
            yield Method(name, train, merge, values)
        for key, of in varied.items():
            for value in of:
                yield Method(f"{name} {_said(value)}", train, merge, values | {key: value})


def _said(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _mapping(value: Any, where: str, keys: tuple[str, ...] | None = None) -> dict:
    if not isinstance(value, dict):
        raise MM4KEError(f"{where}: has no keys with values; see recipes/study.md")
    if keys and (unknown := [key for key in value if key not in keys]):
        raise MM4KEError(f"{where}: {unknown[0]}: no such key; there are {', '.join(keys)}")
    return value


def _path(value: Any, where: str) -> Path:
    if not isinstance(value, str):
        raise MM4KEError(f"{where}: {value}: give a path")
    path = os.path.expandvars(value)
    if unset := re.search(r"\$\w+|\${\w+}", path):
        raise MM4KEError(f"{where}: {value}: the variable {unset[0]} is not set")
    return Path(path)


def _file(value: Any, where: str) -> Path:
    path = _path(value, where)
    if not path.is_file():
        raise MM4KEError(f"{where}: {path}: no such file")
    return path
