"""The knowledge delta as a file: what an edit changed in a base model, and enough to undo it. Knows no host.

One ordinary safetensors file. For each changed tensor it holds

    NAME:steps     by how many representable numbers each kept entry moved: a float's bits, ordered as an integer, of
                   the edited number minus those of the base's, wrapping. Of the width of the numbers: int16 or int32
    NAME:bitmap    which entries are kept, one bit each in row-major order, lowest bit first; uint8
    NAME:gaps      or, where that is smaller: how many entries are skipped before each kept one; uint8, 255 = "255
                   more, and none kept here"
    NAME:base      the base's own numbers at the kept entries, only in a delta whose weight is still to be chosen

and where both ways are larger than the steps of all entries, no positions. Steps say exactly what a base becomes and
what it was, so one number serves both ways, and their sign is the change's. A difference of floats can't do that:
added to the base it is rounded, and needs float32 where the numbers are bfloat16.

A delta is either

    finished       weight and density were applied. The steps lead from the base's numbers to the merged ones, of the
                   base's dtype: 2 bytes a kept entry and 1 bit an entry where that is bfloat16. Undone with no more
    unfinished     weight and density are chosen when it is applied. The steps lead to all of R-SFT's numbers, in the
                   wider dtype of the two (4 bytes an entry where R-SFT trained in float32), and to undo what has lost
                   them by weight and rounding, the base's numbers lie beside them (2 bytes an entry of bfloat16)

The file's metadata has two keys: `mm4ke_knowledge_delta`, a `Manifest` in JSON, and `mm4ke_sha256`, over manifest and
tensors. Files come from strangers: reading one runs nothing, and checks all of that before any tensor is used.

Measured on a 7B model's FFN in bfloat16 (3 x 3584 x 18944, random; tests/benchmarks/knowledge_delta.py): a finished
delta of density 0.2 has 107 MB, of 0.8 351 MB, that is 0.7 % and 2.3 % of the checkpoint; an unfinished one 1222 MB
(float32 R-SFT) or 811 MB (bfloat16), a third to half of it for the way back. Gaps win below a density of 1/8, no
positions above 15/16. Deflate would take off a third of the steps, at 50 MB/s.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from .. import __version__
from ..errors import MM4KEError, first_line
from ..merging.choice import choose
from ..merging.equations import merge
from ..storage.atomic import refused_in_one_line
from ..storage.checkpoint import NewTensor, write_tensors
from ..storage.tensors import (
    BITS,
    DTYPE_NAMES,
    FLOATS,
    bits_of,
    dtype_name,
    identical,
    require_finite,
    shape_text,
    tensor_sha256,
)
from ..storage.threads import in_threads
from .encoding import count_bits, from_gaps, ordered, to_gaps, unpack_bits
from .manifest import MAGNITUDES, Applied, Manifest, TensorInfo, UntiedHead, line, setting

MANIFEST_KEY, SHA256_KEY = "mm4ke_knowledge_delta", "mm4ke_sha256"

# Entries that are decoded at once: some hundred KB, so that they stay in a CPU's cache. A multiple of 8.
PIECE = 1 << 19
GPU_PIECE = 1 << 26


# ---- writing ----


def save_delta(
    path: Path,
    base: Mapping[str, torch.Tensor],
    edited: Mapping[str, torch.Tensor],
    *,
    weight: float | None = None,
    density: float | None = None,
    architecture: str = "",
    recipe: Mapping[str, Any] | None = None,
    facts: int | None = None,
    untied_head: UntiedHead | None = None,
    titles: tuple[str, str] = ("base", "edited"),
) -> Manifest:
    """Write what differs between two sets of tensors as a knowledge delta.

    base, edited:    tensors by name, of equal shapes, on any device, each float32, bfloat16 or float16. Those that are
                     only in `base` or equal in both are left out. A tensor is asked for once, and one of each is in
                     memory at a time beside the file's content
    weight, density: make a finished delta, of `merging.equations.merge` (one that is left out: `merging.choice.choose`);
                     1 and 1 keep the edited numbers as they are, cast to the base's dtype. Neither: an unfinished delta
    architecture, recipe, facts, untied_head: see `Manifest`
    titles:          what an error calls the two models, such as their folders

    The file appears, or is replaced, when it is complete.
    Raises MM4KEError: nothing differs, another shape, a dtype other than those, NaN or infinite numbers, weight or
    density out of range, a file that can't be written.
    """
    applied = None
    if weight is not None or density is not None:
        weight, density = choose(weight, density)
        applied = Applied(weight=weight, density=density)
    arrays: dict[str, torch.Tensor] = {}
    infos: dict[str, TensorInfo] = {}
    for name in edited:
        if name not in base:
            raise MM4KEError(f"{titles[1]}: {name}: not in {titles[0]}; give a model that was made from this base")
        before, after = base[name].detach().cpu(), edited[name].detach().cpu()
        if before.shape != after.shape:
            raise MM4KEError(
                f"{titles[1]}: {name} is {shape_text(after.shape)}, in {titles[0]} {shape_text(before.shape)}; "
                "give a model that was made from this base"
            )
        if identical(before, after):
            continue
        for title, tensor in zip(titles, (before, after)):
            if tensor.dtype not in BITS:
                raise MM4KEError(f"{title}: {name} is {dtype_name(tensor.dtype)}; a delta is of {', '.join(FLOATS)}")
            require_finite(tensor, f"{title}: {name}")
        if applied:
            after = _finished(before, after, weight, density, [f"{title}: {name}" for title in titles])
        found = _encode(before, after, keep_base=not applied)
        if found:
            infos[name], parts = found
            arrays |= {f"{name}:{part}": array for part, array in parts.items()}
    if not infos:
        raise MM4KEError(f"{titles[1]}: equals {titles[0]}, so there is no delta; did training change nothing?")
    manifest = Manifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        architecture=architecture,
        applied=applied,
        recipe=None if recipe is None else {str(key): setting(value) for key, value in recipe.items()},
        facts=facts,
        untied_head=untied_head,
        tensors=infos,
    )
    # Earlier versions don't know this key, and read all files that don't need it.
    text = manifest.model_dump_json(exclude=None if untied_head else {"untied_head"})
    metadata = {MANIFEST_KEY: text, SHA256_KEY: _file_sha256(text, arrays)}
    new = {
        name: NewTensor(array.dtype, tuple(array.shape), lambda array=array: array) for name, array in arrays.items()
    }
    with refused_in_one_line(path):
        write_tensors(path, new, metadata)
    return manifest


def _finished(
    base: torch.Tensor, edited: torch.Tensor, weight: float, density: float, names: Sequence[str]
) -> torch.Tensor:
    if (weight, density) == (1, 1):
        return edited.to(base.dtype)
    return merge(base, [edited], [weight], [density], names=names)


def _encode(
    base: torch.Tensor, edited: torch.Tensor, keep_base: bool
) -> tuple[TensorInfo, dict[str, torch.Tensor]] | None:
    """A tensor's entry in the manifest and its arrays by the part of their name; None where no bit differs."""
    common = torch.promote_types(base.dtype, edited.dtype)
    steps = ordered(bits_of(edited, common)) - ordered(bits_of(base, common))
    mask = steps.ne(0).numpy()
    kept = np.flatnonzero(mask)
    if not len(kept):
        return None
    size = steps.element_size() + (base.element_size() if keep_base else 0)
    parts, positions = {"bitmap": torch.from_numpy(np.packbits(mask, bitorder="little"))}, "bitmap"
    if len(kept) < parts["bitmap"].numel():
        gaps = to_gaps(kept)
        if len(gaps) < parts["bitmap"].numel():
            parts, positions = {"gaps": torch.from_numpy(gaps)}, "gaps"
    elif parts["bitmap"].numel() + len(kept) * size >= len(mask) * size:
        parts, positions = {}, "all"
    at = slice(None) if positions == "all" else torch.from_numpy(kept)
    parts["steps"] = steps[at]
    if keep_base:
        parts["base"] = base.contiguous().reshape(-1)[at]
    difference = (edited.float() - base.float()).abs_().reshape(-1)
    # -0 became 0, or the other way round: a step, of no magnitude.
    classes = torch.bucketize(difference[torch.from_numpy(kept)], torch.tensor(MAGNITUDES), out_int32=True, right=True)
    info = TensorInfo(
        shape=list(base.shape),
        base_dtype=dtype_name(base.dtype),
        edited_dtype=dtype_name(edited.dtype),
        base_sha256=tensor_sha256(base),
        positions=positions,
        count=len(mask) if positions == "all" else len(kept),
        norm=_norm(difference),
        base_norm=_norm(base),
        magnitudes=torch.bincount(classes, minlength=len(MAGNITUDES) + 1).tolist(),
    )
    return info, parts


def _norm(tensor: torch.Tensor) -> float:
    """The Frobenius norm; where it is beyond float32, the largest float."""
    return min(float(torch.linalg.vector_norm(tensor, dtype=torch.float32)), sys.float_info.max)


def _file_sha256(manifest: str, arrays: Mapping[str, torch.Tensor]) -> str:
    names = sorted(arrays)
    digests = in_threads(lambda name: tensor_sha256(arrays[name]), names)
    lines = [manifest, *(f"{digest} {name}" for name, digest in zip(names, digests))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# ---- reading ----


@dataclass(frozen=True, eq=False)
class KnowledgeDelta:
    """A knowledge delta that `load_delta` has checked. Its arrays are read from the file when they are used."""

    path: Path
    manifest: Manifest
    arrays: Mapping[str, torch.Tensor]

    def edited(self, name: str, base: torch.Tensor) -> torch.Tensor:
        """The edited tensor's numbers, exactly: merged ones if the delta is finished, else R-SFT's.

        base:    the tensor whose hash is the manifest's; the caller has checked that
        returns: base's shape and device, in the wider of both dtypes. A cast to a narrower one would be exact too, but
                 in a file that lies about its dtype it would change entries that are not kept

        Raises MM4KEError for a result that is not finite.
        """
        info = self.manifest.tensors[name]
        bits = bits_of(base, info.common_dtype, copy=True)
        for piece, put in self._pieces(name, "steps", bits):
            piece.copy_(ordered(ordered(piece) + put(torch.zeros_like(piece))))
        edited = bits.view(info.common_dtype).view(base.shape)
        require_finite(edited, f"{self.path}: {name}")
        return edited

    def base(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The base's tensor, from that of a model to which this delta was applied (and no other in this tensor).

        Whether it is the base's is for the caller to see from its hash. A finished delta takes its steps back; an
        unfinished one puts the base's numbers in, whatever weight and density it was applied with.
        """
        info = self.manifest.tensors[name]
        dtype = FLOATS[info.base_dtype]
        if self.manifest.applied is None:
            bits = bits_of(tensor, dtype, copy=True)
            for piece, put in self._pieces(name, "base", bits):
                piece.copy_(put(piece))
            return bits.view(dtype).view(tensor.shape)
        bits = bits_of(tensor, info.common_dtype, copy=True)
        for piece, put in self._pieces(name, "steps", bits):
            piece.copy_(ordered(ordered(piece) - put(torch.zeros_like(piece))))
        return bits.view(info.common_dtype).view(tensor.shape).to(dtype)

    def positions(self, name: str) -> np.ndarray:
        """The row-major indices of the kept entries: int64, ascending."""
        info = self.manifest.tensors[name]
        if info.positions == "all":
            return np.arange(info.count)
        if info.positions == "gaps":
            return from_gaps(self.arrays[f"{name}:gaps"].numpy())
        return np.flatnonzero(unpack_bits(self.arrays[f"{name}:bitmap"])[: info.numel].numpy())

    def changes(self, name: str, base: torch.Tensor | None = None) -> np.ndarray | None:
        """edited - base at the kept entries, float32; None in a finished delta if the base's tensor is not given."""
        info = self.manifest.tensors[name]
        if base is not None:
            difference = self.edited(name, base).float() - base.float()
            return difference.reshape(-1).numpy()[self.positions(name)]
        if self.manifest.applied is not None:
            return None
        before = self.arrays[f"{name}:base"]
        bits = ordered(ordered(bits_of(before, info.common_dtype)) + self.arrays[f"{name}:steps"])
        return (bits.view(info.common_dtype).float() - before.float()).numpy()

    def _pieces(self, name: str, part: str, bits: torch.Tensor) -> Iterator[tuple[torch.Tensor, Callable]]:
        """Parts of the flat `bits`, each with what puts the values of its kept entries into a tensor of its size."""
        info, device = self.manifest.tensors[name], bits.device
        values = self.arrays[f"{name}:{part}"].view(bits.dtype)
        if info.positions == "gaps":
            mask = torch.zeros(info.numel, dtype=torch.bool, device=device)
            mask[torch.from_numpy(self.positions(name)).to(device)] = True
        size, done = PIECE if device.type == "cpu" else GPU_PIECE, 0
        for start in range(0, info.numel, size):
            stop = min(start + size, info.numel)
            if info.positions == "all":  # the values are the piece
                yield bits[start:stop], values[start:stop].to(device).expand_as
                continue
            if info.positions == "gaps":
                kept = mask[start:stop]
            else:
                packed = self.arrays[f"{name}:bitmap"][start // 8 : (stop + 7) // 8]
                kept = unpack_bits(packed.to(device))[: stop - start]
            before, done = done, done + int(kept.count_nonzero())
            yield bits[start:stop], partial(torch.masked_scatter, mask=kept, source=values[before:done].to(device))


def load_delta(path: Path) -> KnowledgeDelta:
    """Read a knowledge delta and check all that can be checked without its base.

    The file is mapped, not read into memory; only gaps are unpacked, for a moment, to 17 bytes a byte of the file.

    Raises MM4KEError, naming the file and what is wrong with it.
    """
    if not path.is_file():
        raise MM4KEError(f"{path}: no such file; give a knowledge delta, which `mm4ke delta extract` makes")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            manifest = _read_manifest(path, metadata)
            names = list(file.keys())
            _check_arrays(path, manifest, {name: file.get_slice(name) for name in names})
            arrays = {name: file.get_tensor(name) for name in names}
    except MM4KEError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:  # the last two: torch, of odd offsets
        raise MM4KEError(
            f"{path}: not a readable safetensors file: {line(first_line(error))}; copy or make it again"
        ) from None
    if metadata.get(SHA256_KEY) != _file_sha256(metadata[MANIFEST_KEY], arrays):
        raise MM4KEError(f"{path}: damaged: its content is not what its checksum says; copy or make it again")
    delta = KnowledgeDelta(path, manifest, arrays)
    for name in manifest.tensors:
        _check_positions(delta, name)
        if manifest.applied is None:
            require_finite(arrays[f"{name}:base"], f"{path}: {name}: base")
    return delta


def is_delta(path: Path) -> bool:
    """Whether a path is that of a knowledge delta, by its header."""
    try:
        with safe_open(path, framework="pt") as file:
            return MANIFEST_KEY in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _read_manifest(path: Path, metadata: Mapping[str, str]) -> Manifest:
    if MANIFEST_KEY not in metadata:
        raise MM4KEError(f"{path}: not a knowledge delta; `mm4ke delta extract BASE EDITED -o FILE` makes one")
    try:
        return Manifest.model_validate_json(metadata[MANIFEST_KEY])
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"])) or "manifest"
        if problem["loc"] == ("format",):
            raise MM4KEError(f"{path}: format: not that of version {__version__}; update mm4ke-plugins") from None
        raise MM4KEError(f"{path}: {line(key)}: {line(problem['msg'])}; copy or make it again") from None


def _check_arrays(path: Path, manifest: Manifest, found: Mapping[str, Any]) -> None:
    """Compare dtypes and shapes of the file's tensors with what the manifest means."""
    expected: dict[str, tuple[str, list[int] | None]] = {}
    for name, info in manifest.tensors.items():
        count, numel = info.count, info.numel
        if count > numel or info.positions == "all" and count != numel or sum(info.magnitudes) > count:
            raise MM4KEError(f"{path}: {name}: count: {count} of {numel} entries; copy or make it again")
        if manifest.applied and info.edited_dtype != info.base_dtype:
            raise MM4KEError(f"{path}: {name}: edited_dtype: a finished delta has the base's; copy or make it again")
        expected[f"{name}:steps"] = DTYPE_NAMES[BITS[info.common_dtype]], [count]
        if manifest.applied is None:
            expected[f"{name}:base"] = DTYPE_NAMES[FLOATS[info.base_dtype]], [count]
        if info.positions == "bitmap":
            expected[f"{name}:bitmap"] = "U8", [(numel + 7) // 8]
        elif info.positions == "gaps":
            expected[f"{name}:gaps"] = "U8", None
    if differing := sorted(expected.keys() ^ found.keys()):
        state = "missing" if differing[0] in expected else "unknown"
        raise MM4KEError(f"{path}: {line(differing[0])}: {state}; copy or make it again")
    for name, (dtype, shape) in expected.items():
        part = found[name]
        if part.get_dtype() != dtype or (len(part.get_shape()) != 1 if shape is None else part.get_shape() != shape):
            raise MM4KEError(
                f"{path}: {name}: is {part.get_dtype()} {part.get_shape()}, "
                f"by the manifest it is {dtype} {shape or '[...]'}; copy or make it again"
            )


def _check_positions(delta: KnowledgeDelta, name: str) -> None:
    info, right = delta.manifest.tensors[name], True
    if info.positions == "bitmap":
        bitmap = delta.arrays[f"{name}:bitmap"].numpy()
        last = np.unpackbits(bitmap[-1:], bitorder="little")[(info.numel - 1) % 8 + 1 :]
        right = count_bits(bitmap) == info.count and not last.any()
    elif info.positions == "gaps":
        positions = delta.positions(name)
        right = len(positions) == info.count and positions[-1] < info.numel
    if not right:
        raise MM4KEError(
            f"{delta.path}: {name}: its positions are not {info.count} of {info.numel} entries; copy or make it again"
        )
