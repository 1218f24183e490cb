"""A knowledge delta where a recipe names an edited model: `- model: ./facts.delta.safetensors`.

mergekit has no seam for another kind of model file (`ShardedTensorIndex` knows a folder with model.safetensors or its
index, and `AutoConfig` must find a config.json there). But its index may name files anywhere. So the delta becomes a
folder that takes as much space as the edited tensors: these, the base's config, and an index that has all other
tensors in the base's own files.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from ...delta.base import check_base, names_for, places_of
from ...delta.format import KnowledgeDelta, load_delta
from ...errors import MM4KEError
from ...storage.atomic import scratch_folder
from ...storage.checkpoint import INDEX, NewTensor, open_safetensors, write_tensors
from .caches import open_model

EDITED = "edited.safetensors"


@contextmanager
def deltas_as_models(
    config: MergeConfiguration, options: MergeOptions
) -> Iterator[tuple[MergeConfiguration, dict[str, str]]]:
    """The same recipe with folders in the place of its deltas, for as long as this is open; which is which's folder.

    Raises MM4KEError: what `load_delta` raises, a finished delta (the recipe's weight would scale it again), no
    base_model for the whole recipe, a base that the delta was not taken from.
    """
    models = set(config.referenced_models()) - {config.base_model}
    deltas = {str(model): Path(model.model.path) for model in models if _is_file(model)}
    if not deltas:
        yield config, {}
        return
    if config.base_model is None:
        raise MM4KEError("base_model: missing; give the model that the knowledge delta was taken from")
    LoaderCache().setup(options)
    with scratch_folder() as aside:
        folders = {}
        for number, (name, path) in enumerate(deltas.items()):
            folders[name] = str(Path(aside, str(number), path.name))
            _write_model(_unfinished(path), config.base_model, Path(folders[name]), options)
        replaced = _replaced(config.model_dump(mode="json", exclude_none=True), folders)
        yield MergeConfiguration.model_validate(replaced), {folder: name for name, folder in folders.items()}


def _is_file(model: ModelReference) -> bool:
    return model.lora is None and Path(model.model.path).is_file()


def _unfinished(path: Path) -> KnowledgeDelta:
    delta = load_delta(path)
    if applied := delta.manifest.applied:
        raise MM4KEError(
            f"models: {path}: is finished (weight {applied.weight}, density {applied.density}), and would be weighed "
            "again; give an unfinished delta, or use `mm4ke delta apply`"
        )
    return delta


def _write_model(delta: KnowledgeDelta, base: ModelReference, folder: Path, options: MergeOptions) -> None:
    """The edited model: its own tensors, and references to the base's."""
    index = open_model(base, options)
    if not index.is_safetensors:
        raise MM4KEError(f"base_model: {base}: not in safetensors format; save the model in safetensors format")
    weight_map = {name: str(Path(index.base_path, file).resolve()) for name, file in index.tensor_paths.items()}
    names, head = names_for(Path(index.base_path), [delta]), delta.manifest.untied_head
    places = places_of(delta, names, f"base_model: {base}")
    new = {}
    with ExitStack() as stack:

        def read(place: str) -> torch.Tensor:
            stored = names.stored[place]
            return stack.enter_context(open_safetensors(Path(weight_map[stored]))).get_tensor(stored)

        for name, place in places.items():
            is_head = head is not None and name == head.name
            if not (is_head or names.is_stored(place)):
                continue  # it is tied, and stays so
            target = names.stored[place] if names.is_stored(place) else name
            if (info := delta.manifest.tensors.get(name)) is None:  # of the two, the other one was changed
                tensor = read(place)
                new[target] = NewTensor(tensor.dtype, tuple(tensor.shape), partial(read, place))
                continue
            check_base([delta], name, read(place), f"base_model: {base}")
            make = partial(lambda name, place: delta.edited(name, read(place)), name, place)
            new[target] = NewTensor(info.common_dtype, tuple(info.shape), make)
        folder.mkdir(parents=True)
        write_tensors(folder / EDITED, new, {"format": "pt"})
    if not head:  # of tied tensors that are stored twice, the delta may have one
        doubles = [
            one for one, other in names.tied.items() if {one, other} & {*places.values()} and names.is_stored(one)
        ]
        for one in doubles:
            weight_map.pop(names.stored[one])
            new.pop(names.stored[one], None)
    weight_map |= dict.fromkeys(new, EDITED)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    for path in Path(index.base_path).iterdir():
        if path.name == "config.json" or path.suffix == ".py":
            shutil.copyfile(path, folder / path.name)


def _replaced(part: Any, folders: dict[str, str]) -> Any:
    """The same part of a recipe, with other names of models."""
    if isinstance(part, dict):
        return {
            key: folders.get(value, value) if key == "model" and isinstance(value, str) else _replaced(value, folders)
            for key, value in part.items()
        }
    return [_replaced(entry, folders) for entry in part] if isinstance(part, list) else part
