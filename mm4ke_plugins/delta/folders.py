"""Knowledge deltas and model folders: extract, apply, revert (`mm4ke delta`).

A new folder is a copy of the old one in which only the changed tensors were computed: all other bytes go from file to
file by the kernel. It is written aside and renamed when it is complete.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from errno import EEXIST, ENOTDIR, ENOTEMPTY
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import Progress

from ..errors import MM4KEError, first_line
from ..merging.choice import choose
from ..storage.atomic import refused_in_one_line, replaced_folder
from ..storage.checkpoint import (
    INDEX,
    NewTensor,
    StoredTensor,
    equal_and_finite,
    open_tensors,
    rewrite,
    stored_tensors,
    tensor_files,
    write_tensors,
)
from ..storage.names import model_names, read_config, tied_as_before, ties_in, untied
from ..storage.replacing import RECORD
from ..storage.tensors import FLOATS, shape_text, tensor_sha256
from ..storage.threads import in_threads
from .base import LAYER, check_alike, check_base, merged_tensor, names_for, places_of
from .format import KnowledgeDelta, is_delta, load_delta, save_delta
from .manifest import Manifest, UntiedHead

# An output head that a base ties and an edit unties, and beside it what was model.safetensors.
HEAD_FILE, TIED_FILE = "model-untied-head.safetensors", "model-tied.safetensors"
WEIGHT_MAP = re.compile(r'"weight_map"\s*:\s*\{')

# Other forms of a model's weights. Beside new weights they would be the old model.
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"}

# What mergekit leaves in a result: its recipe, and a sentence in the model card.
MERGE_RECIPE = "mergekit_config.yml"
MERGE_CARD = "merge of pre-trained language models created using [mergekit]"


# ---- extract ----


class Tensors(Mapping):
    """The tensors of a model folder by name, each read when it is asked for.

    names: those in the files by the ones that are used here; none: the same
    """

    def __init__(self, folder: Path, stack: ExitStack, names: Mapping[str, str] | None = None):
        self.files = open_tensors(folder, stack)
        self.names = names or {name: name for name in self.files}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.files[self.names[name]].get_tensor(self.names[name])

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def extract(
    base: Path,
    edited: Path,
    output: Path,
    weight: float | None = None,
    density: float | None = None,
    recipe: Path | None = None,
) -> Manifest:
    """Write the knowledge delta of two model folders: see `format.save_delta`.

    recipe: a YAML file whose settings are noted in the delta

    Raises MM4KEError: a folder or the recipe can't be read, the two are not of one model, an output that exists and is
    no delta; what `save_delta` raises.
    """
    choose(weight, density)
    if output.exists() and not is_delta(output):
        raise MM4KEError(f"{output}: exists and is no knowledge delta, so it is kept; give another name")
    settings = _read_recipe(recipe) if recipe else None
    architecture = _architecture(base)
    tensor_files(base), tensor_files(edited)  # what is wrong with the files is to be said first
    if (other := _architecture(edited)) != architecture:
        raise MM4KEError(f"{edited}: is a {other}, {base} a {architecture}; give a model made from this base")
    pairs, head = _pairs(base, edited)
    with ExitStack() as stack:
        return save_delta(
            output,
            Tensors(base, stack, {name: before for name, (before, _) in pairs.items()}),
            Tensors(edited, stack, {name: after for name, (_, after) in pairs.items()}),
            weight=weight,
            density=density,
            architecture=architecture,
            recipe=settings,
            untied_head=head,
            titles=(str(base), str(edited)),
        )


def _pairs(base: Path, edited: Path) -> tuple[dict[str, tuple[str, str]], UntiedHead | None]:
    """The tensors that may differ, by their names in a delta, which are the base's: what the files of both call them.

    And the one that the base ties to another and the edited model does not, if it is so.
    """
    before, after = _stored(base), _stored(edited)

    @cache
    def differs(name: str, other: str) -> bool:
        return not equal_and_finite(before[name], [after[other]])

    configs = [_text(folder / "config.json") for folder in (base, edited)]
    if before.keys() == after.keys() and ties_in(configs[0]) == ties_in(configs[1]):
        with Progress(console=Console(stderr=True), transient=True) as bar:
            compared = bar.track(after, description="comparing")
            changed = {name: (name, name) for name in compared if differs(name, name)}
        # In the layers nothing is tied, and all else is the same.
        if all(LAYER.search(name) for name in changed):
            return changed, None
    names, others = model_names(base), model_names(edited)
    if unknown := sorted(others.stored.keys() - names.stored.keys()):
        raise MM4KEError(
            f"{edited}: {others.stored[unknown[0]]}: not in {base}; give a model that was made from this base"
        )
    pairs, head = {}, None
    for name, stored in names.stored.items():
        if name not in others.stored:
            if name in names.needed or not (names.needed or read_config(base).get("tie_word_embeddings")):
                raise MM4KEError(f"{edited}: {stored} is missing; copy or save the model again")
            continue
        partner, is_stored = names.tied.get(name), names.is_stored(name)
        place = stored if is_stored else name
        if unties := partner is not None and not others.same(name, partner):
            head = UntiedHead(name=place, embedding=names.stored[partner], stored=is_stored, ties=ties_in(configs[0]))
        if is_stored or unties:
            pairs[place] = stored, others.stored[name]
    return {place: pair for place, pair in pairs.items() if differs(*pair)}, head


def _stored(folder: Path) -> dict[str, StoredTensor]:
    files, stored = tensor_files(folder), {}
    for file in set(files.values()):
        stored |= {name: tensor for name, tensor in stored_tensors(file)[0].items() if files.get(name) == file}
    return stored


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MM4KEError(f"{path}: {first_line(error)}; give the YAML recipe of the training") from None
    if not isinstance(settings, dict):
        raise MM4KEError(f"{path}: no settings in it; give the YAML recipe of the training")
    return settings


def _architecture(folder: Path) -> str:
    names = read_config(folder).get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


# ---- apply and revert ----


def apply(
    base: Path,
    deltas: Sequence[Path],
    output: Path,
    weights: Sequence[float] = (),
    densities: Sequence[float] = (),
    link: bool = False,
) -> None:
    """Write a copy of a model folder with the deltas in it, bit for bit as mergekit's `merge_method: mm4ke` would.

    weights, densities: none (see `merging.choice.choose`), one for all deltas, or one for each. The float32 sum of
                        all is rounded once. A single finished delta of weight 1 and density 1 is not even rounded
    link:               files of weights in which nothing changes become hard links to the base's, not copies

    Raises MM4KEError: what `load_delta` raises, deltas of different bases, a base that the deltas were not taken from
    (architecture, missing tensors, shapes, dtypes, hashes), an output that exists, a full disk.
    """
    found = [load_delta(path) for path in deltas]
    check_alike(found)
    choices = [
        choose(
            _of(weights, place, found, "--weight"),
            _of(densities, place, found, "--density"),
            delta.manifest.applied is not None,
        )
        for place, delta in enumerate(found)
    ]
    for delta in found:
        _check_architecture(delta, base)
    names = names_for(base, found)
    places = [places_of(delta, names, str(base)) for delta in found]
    own = {place[head.name]: head for place, delta in zip(places, found) if (head := delta.manifest.untied_head)}
    changed = {name for place in places for name in place.values()} | own.keys()
    changed |= {other for name in changed - own.keys() if (other := names.tied_to(name)) and other not in own}
    with ExitStack() as stack:
        tensors = Tensors(base, stack, names.stored)

        def used(name: str) -> list[tuple[int, str]]:
            """The deltas that change a tensor of the model, and its name in each: if it is tied, maybe the other's."""
            ways: list[tuple[int, str]] = []
            for number, (delta, place) in enumerate(zip(found, places)):
                head = delta.manifest.untied_head
                tied = () if head and place[head.name] in (name, names.tied_to(name)) else (names.tied_to(name),)
                ways += [
                    (number, way) for one in (name, *tied) for way in delta.manifest.tensors if place[way] == one
                ][:1]
            return ways

        def check(name: str) -> None:
            for number, way in used(name):
                check_base([found[number]], way, tensors[name], str(base))

        def make(name: str) -> torch.Tensor:
            tensor, ways = tensors[name], used(name)
            if not ways:
                return tensor
            return merged_tensor(
                names.stored[name],
                tensor,
                [found[number].edited(way, tensor) for number, way in ways],
                [choices[number] for number, _ in ways],
                [str(found[number].path) for number, _ in ways],
                [found[number].manifest.applied is not None for number, _ in ways],
            )

        in_threads(check, sorted(changed))
        makers = {name: partial(make, name) for name in changed}
        added = {}
        for name, head in own.items():
            if not names.is_stored(name):
                tensor = tensors[name]
                added[head.name] = NewTensor(tensor.dtype, tuple(tensor.shape), makers[name])
        replaced = {names.stored[name]: makers[name] for name in changed if names.is_stored(name)}
        _write_model(base, output, replaced, {}, link, _untying(base, added) if own else KeptFiles(), added)


def _of(values: Sequence[float], place: int, deltas: Sequence[KnowledgeDelta], option: str) -> float | None:
    if len(values) not in (0, 1, len(deltas)):
        raise MM4KEError(f"{option}: given {len(values)} times for {len(deltas)} deltas; give it once, or for each")
    return values[place if len(values) > 1 else 0] if values else None


def _check_architecture(delta: KnowledgeDelta, folder: Path) -> None:
    found, expected = _architecture(folder), delta.manifest.architecture
    if found and expected and found != expected:
        raise MM4KEError(
            f"{delta.path}: is for {expected}, {folder} is a {found}; give the base that the delta was taken from"
        )


def revert(model: Path, delta: Path, output: Path, link: bool = False) -> None:
    """Write a copy of a model folder with the base's tensors back in it, bit for bit, as their hashes show.

    model: what `apply` or mergekit made of the base and this delta alone; of an unfinished delta by any weight and
           density, and also the edited model that it was taken from

    Raises MM4KEError: what `load_delta` raises, another architecture, missing tensors, other shapes, a tensor that
    this delta does not lead back to the base, an output that exists, a full disk.
    """
    found = load_delta(delta)
    _check_architecture(found, model)
    infos, head = found.manifest.tensors, found.manifest.untied_head
    names = names_for(model, [found])
    places = {}
    for name in (*infos, *([head.name] if head else [])):
        if (place := names.find(name)) is None:
            raise MM4KEError(f"{model}: {name} is missing; give the model to which the delta was applied")
        places[name] = place
    with ExitStack() as stack:
        tensors = Tensors(model, stack, names.stored)

        def make(name: str) -> torch.Tensor:
            restored = found.base(name, tensors[places[name]])
            if tensor_sha256(restored) != infos[name].base_sha256:
                raise MM4KEError(
                    f"{model}: {name}: without {delta} it is not the base's; give the model to which this delta, "
                    "and no other one in this tensor, was applied as it is"
                )
            return restored

        makers, dtypes = {}, {}
        for name, info in infos.items():
            part = tensors.files[names.stored[places[name]]].get_slice(names.stored[places[name]])
            if part.get_shape() != info.shape:
                raise MM4KEError(
                    f"{model}: {name} is {shape_text(part.get_shape())}, in {delta} {shape_text(info.shape)}; "
                    "give the model to which the delta was applied"
                )
            # A tied tensor that is stored twice is restored twice.
            tied = None if head and head.name in (name, head.embedding) else names.tied_to(places[name])
            for place in filter(None, (places[name], tied)):
                if names.is_stored(place):
                    makers.setdefault(names.stored[place], partial(make, name))
                    dtypes[names.stored[place]] = FLOATS[info.base_dtype]
        files = _tying_again(model, head, names.stored[places[head.name]]) if head else KeptFiles()
        if head and not head.stored and head.name in infos:
            make(head.name)  # it goes; whether it was the right one shows here
        _write_model(model, output, makers, dtypes, link, files)


@dataclass(frozen=True)
class KeptFiles:
    """What a copy of a model folder has otherwise than its source.

    texts:   of files, by their names; None where it has none
    names:   of files of weights, by those in the source
    without: tensors that it does not have
    """

    texts: Mapping[str, str | None] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    without: Collection[str] = ()


def _untying(base: Path, added: Collection[str]) -> KeptFiles:
    """The files of a base that unties: the new tensors are in a file of their own, so that all can be undone."""
    texts = {"config.json": untied(_text(base / "config.json"))}
    if not added:
        return KeptFiles(texts)
    entries = "".join(_index_entry(name) for name in added)
    if (base / INDEX).is_file():
        index = _text(base / INDEX)
        return KeptFiles(texts | {INDEX: WEIGHT_MAP.sub(lambda found: found[0] + entries, index, count=1)})
    weight_map = dict.fromkeys(tensor_files(base), TIED_FILE) | dict.fromkeys(added, HEAD_FILE)
    index = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2) + "\n"
    return KeptFiles(texts | {INDEX: index}, {"model.safetensors": TIED_FILE})


def _tying_again(model: Path, head: UntiedHead, stored: str) -> KeptFiles:
    """The files of the base, from those of a model that unties."""
    config = _text(model / "config.json")
    texts: dict[str, str | None] = {"config.json": tied_as_before(config, head.ties)}
    files = tensor_files(model)
    if head.stored or stored not in files:
        return KeptFiles(texts)
    if (model / INDEX).is_file():
        index = _text(model / INDEX)
        if TIED_FILE in {file.name for file in files.values()}:
            return KeptFiles(texts | {INDEX: None}, {TIED_FILE: "model.safetensors"}, [stored])
        if (entry := _index_entry(stored)) in index:
            texts[INDEX] = index.replace(entry, "", 1)
        else:
            content = json.loads(index)
            del content["weight_map"][stored]
            texts[INDEX] = json.dumps(content, indent=2) + "\n"
    return KeptFiles(texts, without=[stored])


def _text(path: Path) -> str:
    """A file's text with its line ends as they are."""
    return path.read_bytes().decode("utf-8")


def _index_entry(name: str) -> str:
    return f"\n    {json.dumps(name)}: {json.dumps(HEAD_FILE)},"


def _write_model(
    source: Path,
    output: Path,
    replacements: Mapping[str, Callable[[], torch.Tensor]],
    dtypes: Mapping[str, torch.dtype],
    link: bool,
    files: KeptFiles,
    added: Mapping[str, NewTensor] | None = None,
) -> None:
    """A copy of a model folder's own files, with these tensors replaced, and those that are added in another file."""
    names_in: dict[Path, list[str]] = {}
    for name, file in tensor_files(source).items():
        names_in.setdefault(file, []).append(name)
    left_out = _of_merge(source)
    others = [
        path
        for path in sorted(source.iterdir())
        if path.is_file() and path.suffix not in WEIGHTS and path.name not in left_out
    ]
    size = sum(path.stat().st_size for path in names_in)
    with (
        refused_in_one_line(output),
        new_folder(output) as folder,
        Progress(console=Console(stderr=True), transient=True) as bar,
    ):
        task = bar.add_task("writing", total=size)
        # Files with new tensors first: what is wrong with these shows before the long copies.
        for file, names in sorted(names_in.items(), key=lambda item: replacements.keys().isdisjoint(item[1])):
            target = folder / files.names.get(file.name, file.name)
            new = {name: replacements[name] for name in names if name in replacements and name not in files.without}
            without = [name for name in names if name in files.without]
            if len(without) == len(names):
                pass
            elif new or without:
                rewrite(file, target, new, {name: dtypes[name] for name in new if name in dtypes}, without)
            elif link:
                os.link(file.resolve(), target)
            else:
                shutil.copyfile(file, target)
            bar.advance(task, file.stat().st_size)
        if added:
            write_tensors(folder / HEAD_FILE, added, {"format": "pt"})
        for path in others:
            if path.name not in files.texts:
                shutil.copyfile(path, folder / path.name)
        for name, text in files.texts.items():
            if text is not None:
                (folder / name).write_bytes(text.encode())


def _of_merge(folder: Path) -> set[str]:
    """The files that say how mergekit made a model. Of another model they would be wrong, and would make its folder
    one that the next merge may replace."""
    names = {RECORD, MERGE_RECIPE}
    card = folder / "README.md"
    if (folder / MERGE_RECIPE).is_file() or card.is_file() and MERGE_CARD in card.read_text("utf-8", "replace"):
        names.add(card.name)
    return names


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `output` if all goes well and is removed if not.

    Raises MM4KEError where `output` exists and is not an empty folder.
    """
    exists = MM4KEError(f"{output}: exists; remove it or give another folder")
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise exists
    if os.path.ismount(output):
        raise MM4KEError(f"{output}: is a mount point, which can't be replaced in one step; give a folder in it")
    try:
        with replaced_folder(output.resolve(), overwrite=False) as folder:
            folder.mkdir()
            yield folder
    except OSError as error:
        if error.errno in (EEXIST, ENOTEMPTY, ENOTDIR) and error.filename2:  # another run was faster
            raise exists from None
        raise


# ---- show and diff ----
