"""What mergekit keeps from one merge to the next, and takes for the models that now are in the same places.

Open files and lists of tensors stay for as long as a process lives, models with a LoRA in `--lora-merge-cache` for
ever. Who merges, trains again and merges again would get the first edit twice.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit.architecture.auto import infer_architecture_info
from mergekit.common import ModelReference
from mergekit.io import ShardedTensorIndex
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions

from ...errors import MM4KEError
from ...storage.replacing import users_files
from .output import is_mergekits

LORA_RECORD = ".mm4ke-lora.json"


@contextmanager
def models_as_they_are() -> Iterator[None]:
    """No model that was opened before is used in here, and none that was opened in here is used later."""
    forget()
    try:
        yield
    finally:
        forget()


def forget() -> None:
    LoaderCache.loaders.clear()
    infer_architecture_info.cache_clear()


def open_model(model: ModelReference, options: MergeOptions) -> ShardedTensorIndex:
    """The files of a model as mergekit opens them, with its LoRA merged if it has one.

    Raises MM4KEError: see `_merge_lora`; what mergekit raises for a model that it can't open.
    """
    if model.lora and model not in LoaderCache.loaders:
        _merge_lora(model, options)
    return LoaderCache().get(model).index


def _merge_lora(model: ModelReference, options: MergeOptions) -> None:
    """Have mergekit put a model with its LoRA into its cache, again where either has changed since.

    Raises MM4KEError where there is no cache, and where the model's folder in it has other files than a model's.
    """
    if not options.lora_merge_cache:
        raise MM4KEError(
            f"{model}: the LoRA has to be merged into its model first; give --lora-merge-cache FOLDER, where the "
            "result is kept"
        )
    folder = Path(options.lora_merge_cache, f"{model.model._unique_id()}_{model.lora._unique_id()}")
    record, sources = folder / LORA_RECORD, _sources(model, options)
    if folder.exists():
        if record.is_file() and record.read_text(encoding="utf-8") == sources:
            return
        if kept := users_files(folder, lambda name: name == LORA_RECORD or is_mergekits(name)):
            raise MM4KEError(f"{folder}: holds {model} as it was, and {kept[0]}; move that away")
        shutil.rmtree(folder)
    try:
        LoaderCache().get(model)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # mergekit would take what is in it for the model
        raise
    record.write_text(sources, encoding="utf-8")


def _sources(model: ModelReference, options: MergeOptions) -> str:
    """What a merged LoRA depends on: where its files lie, their sizes and times, the dtype."""
    files: dict[str, Any] = {}
    for part in (model.model, model.lora):
        place = Path(part.path).resolve()
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            found = path.stat()
            files[str(path)] = [found.st_size, found.st_mtime_ns]
    return json.dumps({"model": str(model), "dtype": options.lora_merge_dtype, "files": files}, indent=1)
