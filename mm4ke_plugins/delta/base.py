"""Between knowledge deltas and the model that they are put on, be it in files or in memory.

Is it their base (`check_base`, by hash), are they of one base (`check_alike`), what does the model call their tensors
(`places_of`), and what becomes of one (`merged_tensor`).
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import MM4KEError
from ..merging.equations import merge
from ..storage.checkpoint import tensor_files
from ..storage.names import ModelNames, model_names
from ..storage.tensors import dtype_name, shape_text, tensor_sha256
from .format import KnowledgeDelta

# Part of the name of a tensor that belongs to a layer, where nothing is tied.
LAYER = re.compile(r"(^|\.)\d+\.")


def names_for(folder: Path, deltas: Sequence[KnowledgeDelta]) -> ModelNames:
    """The names of a folder's tensors; as they are in the files where the deltas have the same, of layers only."""
    files = tensor_files(folder)
    known = all(name in files and LAYER.search(name) for delta in deltas for name in delta.manifest.tensors)
    if known and not any(delta.manifest.untied_head for delta in deltas):
        return ModelNames(folder, {name: name for name in files}, {}, (), "")
    return model_names(folder)


def places_of(delta: KnowledgeDelta, names: ModelNames, owner: str) -> dict[str, str]:
    """The model's name of each tensor of a delta, its untied head included.

    owner: what an error calls the model's folder, the base
    """
    head = delta.manifest.untied_head
    places = {}
    for name in (*delta.manifest.tensors, *([head.name] if head else [])):
        if (place := names.find(name)) is None:
            raise MM4KEError(f"{owner}: {name} is missing; give the base that the delta was taken from")
        places[name] = place
    if head and names.tied_to(places[head.name]) is None:
        raise MM4KEError(
            f"{owner}: {head.name} is not tied to {head.embedding}, as in the base that {delta.path} was taken from; "
            "give that base"
        )
    return places


def check_base(deltas: Sequence[KnowledgeDelta], name: str, base: torch.Tensor, owner: str) -> None:
    """Refuse a tensor that is not the one that the deltas were taken from, by shape, dtype and hash.

    owner: what an error calls the model that has the tensor
    """
    digest = None
    for delta in deltas:
        if name not in delta.manifest.tensors:
            continue
        info = delta.manifest.tensors[name]
        if list(base.shape) != info.shape:
            raise MM4KEError(
                f"{owner}: {name} is {shape_text(base.shape)}, in {delta.path} {shape_text(info.shape)}; "
                "give the base that the delta was taken from"
            )
        if dtype_name(base.dtype) != info.base_dtype:
            raise MM4KEError(
                f"{owner}: {name} is {dtype_name(base.dtype)}, {delta.path} was taken from {info.base_dtype}; "
                f"load the model with dtype={info.base_dtype}"
            )
        digest = digest or tensor_sha256(base)
        if digest != info.base_sha256:
            raise MM4KEError(
                f"{owner}: {name} holds other numbers than the base that {delta.path} was taken from; give that base"
            )


def check_alike(deltas: Sequence[KnowledgeDelta]) -> None:
    """Refuse deltas that can't be of one base: other architectures, or a tensor with another hash."""
    for position, delta in enumerate(deltas):
        for other in deltas[:position]:
            first, second = other.manifest, delta.manifest
            if first.architecture and second.architecture and first.architecture != second.architecture:
                raise MM4KEError(
                    f"{delta.path}: is for {second.architecture}, {other.path} for {first.architecture}; "
                    "give deltas of one base"
                )
            for name in sorted(first.tensors.keys() & second.tensors.keys()):
                if first.tensors[name].base_sha256 != second.tensors[name].base_sha256:
                    raise MM4KEError(
                        f"{delta.path}: {name}: was taken from another base than that of {other.path}; "
                        "give deltas of one base"
                    )


def merged_tensor(
    name: str,
    base: torch.Tensor,
    edited: Sequence[torch.Tensor],
    choices: Sequence[tuple[float, float]],
    titles: Sequence[str],
    finished: Sequence[bool],
) -> torch.Tensor:
    """What a tensor of the base becomes: `merging.equations.merge`, in the base's dtype.

    edited:   `KnowledgeDelta.edited` of each delta that has the tensor
    choices:  weight and density of each
    titles:   what an error calls each
    finished: whether each delta is; a single one of weight and density 1 is taken as it is, without a rounding
    """
    if len(edited) == 1 and finished[0] and choices[0] == (1, 1):
        return edited[0]
    weights, densities = zip(*choices)
    return merge(base, edited, weights, densities, names=[f"base: {name}", *(f"{title}: {name}" for title in titles)])
