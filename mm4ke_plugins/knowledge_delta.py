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
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from . import __version__
from .checkpoint import DTYPE_NAMES, NewTensor, write_tensors
from .delta import is_finite, merge
from .errors import MM4KEError, first_line

MANIFEST_KEY, SHA256_KEY = "mm4ke_knowledge_delta", "mm4ke_sha256"

# What an unfinished delta is applied with where nothing else is said, as in `merge_method: mm4ke`.
DEFAULT_WEIGHT = DEFAULT_DENSITY = 0.8

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}

# The upper ends of the histogram's classes of |difference|; the last class is open.
MAGNITUDES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)

# Entries that are decoded at once: some hundred KB, so that they stay in a CPU's cache. A multiple of 8.
PIECE = 1 << 19
GPU_PIECE = 1 << 26

MAX_GAP = 255


def _printable(text: str) -> str:
    # A terminal would obey control characters.
    if not text.isprintable():
        raise ValueError("control characters are not allowed")
    return text


Name = Annotated[str, Field(min_length=1, max_length=500), AfterValidator(_printable)]
Line = Annotated[str, Field(max_length=500), AfterValidator(_printable)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=1, le=1 << 48)]
Measure = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Scalar = bool | int | Annotated[float, Field(allow_inf_nan=False)] | Line | None


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class TensorInfo(Strict):
    """One changed tensor.

    base_sha256:    of the base's tensor, as `tensor_sha256` takes it
    count:          how many entries are kept
    norm:           the Frobenius norm of edited - base, float32; base_norm: that of the base
    magnitudes:     how many kept entries have |edited - base| below each of MAGNITUDES (and not in an earlier class)
    """

    shape: Annotated[list[Size], Field(max_length=8)]
    base_dtype: Literal["float32", "bfloat16", "float16"]
    edited_dtype: Literal["float32", "bfloat16", "float16"]
    base_sha256: Sha256
    positions: Literal["all", "bitmap", "gaps"]
    count: Size
    norm: Measure
    base_norm: Measure
    magnitudes: Annotated[
        list[Annotated[int, Field(ge=0)]], Field(min_length=len(MAGNITUDES) + 1, max_length=len(MAGNITUDES) + 1)
    ]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def common_dtype(self) -> torch.dtype:
        """The dtype of which the steps are: both the base's and the edited numbers fit into it."""
        return torch.promote_types(DTYPES[self.base_dtype], DTYPES[self.edited_dtype])


class Applied(Strict):
    """What a finished delta was made with; 1 and 1 is an edited model as it was."""

    weight: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)]
    density: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


class Manifest(Strict):
    """What is known of a delta besides its numbers.

    architecture: the class in the base's config.json; empty where not known
    applied:      None in an unfinished delta
    recipe:       the settings that it was trained with; facts: how many it was trained on. Both None if not known
    created:      ISO 8601, in UTC
    """

    format: Literal[1] = 1
    mm4ke_version: Line = __version__
    created: Line
    architecture: Line
    applied: Applied | None
    recipe: dict[Name, Scalar | list[Scalar]] | None = None
    facts: Annotated[int, Field(ge=0)] | None = None
    tensors: Annotated[dict[Name, TensorInfo], Field(min_length=1)]


# ---- hashes ----


def tensor_sha256(tensor: torch.Tensor) -> str:
    """The hash of a tensor's dtype, shape and bytes in row-major order, on whatever device it is."""
    digest = hashlib.sha256(f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """The function of each item. Hashing and numpy let other threads run meanwhile."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


def _file_sha256(manifest: str, arrays: Mapping[str, torch.Tensor]) -> str:
    names = sorted(arrays)
    digests = in_threads(lambda name: tensor_sha256(arrays[name]), names)
    lines = [manifest, *(f"{digest} {name}" for name, digest in zip(names, digests))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


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
    titles: tuple[str, str] = ("base", "edited"),
) -> Manifest:
    """Write what differs between two sets of tensors as a knowledge delta.

    base, edited:    tensors by name, of equal shapes, on any device, each float32, bfloat16 or float16. Those that are
                     only in `base` or equal in both are left out. A tensor is asked for once, and one of each is in
                     memory at a time beside the file's content
    weight, density: make a finished delta, of `delta.merge` (the other of the two is then 0.8 by default); 1 and 1
                     keep the edited numbers as they are, cast to the base's dtype. Neither: an unfinished delta
    architecture, recipe, facts: see `Manifest`
    titles:          what an error calls the two models, such as their folders

    The file appears, or is replaced, when it is complete.
    Raises MM4KEError: nothing differs, another shape, a dtype other than those, NaN or infinite numbers, weight or
    density out of range, a file that can't be written.
    """
    applied = None
    if weight is not None or density is not None:
        weight, density = choose(weight, density, None)
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
                raise MM4KEError(f"{title}: {name} is {dtype_name(tensor.dtype)}; a delta is of {', '.join(DTYPES)}")
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
        recipe=None if recipe is None else {str(key): _setting(value) for key, value in recipe.items()},
        facts=facts,
        tensors=infos,
    )
    text = manifest.model_dump_json()
    metadata = {MANIFEST_KEY: text, SHA256_KEY: _file_sha256(text, arrays)}
    new = {
        name: NewTensor(array.dtype, tuple(array.shape), lambda array=array: array) for name, array in arrays.items()
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, new, metadata)
    except OSError as error:
        raise MM4KEError(f"{path}: can't be written: {error.strerror or error}; give another place") from None
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
    steps = _ordered(_bits(edited, common)) - _ordered(_bits(base, common))
    mask = steps.ne(0).numpy()
    kept = np.flatnonzero(mask)
    if not len(kept):
        return None
    size = steps.element_size() + (base.element_size() if keep_base else 0)
    parts, positions = {"bitmap": torch.from_numpy(np.packbits(mask, bitorder="little"))}, "bitmap"
    if len(kept) < parts["bitmap"].numel():
        gaps = _gaps(kept)
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


def _gaps(positions: np.ndarray) -> np.ndarray:
    skipped = np.diff(positions, prepend=-1) - 1
    full = skipped // MAX_GAP
    gaps = np.full(int(full.sum()) + len(positions), MAX_GAP, np.uint8)
    gaps[np.cumsum(full + 1) - 1] = skipped % MAX_GAP
    return gaps


def _setting(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_setting(entry) if isinstance(entry, (bool, int, float, str)) else _line(entry) for entry in value]
    if value is None or isinstance(value, (bool, int)) or isinstance(value, float) and math.isfinite(value):
        return value
    return _line(value)


def _line(value: Any) -> str:
    """A text that is safe to print, of whatever a stranger wrote."""
    return "".join(letter if letter.isprintable() else " " for letter in str(value))[:500]


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
        bits = _bits(base, info.common_dtype, copy=True)
        self._walk(name, "steps", bits, lambda old, steps: _ordered(_ordered(old) + steps))
        edited = bits.view(info.common_dtype).view(base.shape)
        require_finite(edited, f"{self.path}: {name}")
        return edited

    def base(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The base's tensor, from that of a model to which this delta was applied (and no other in this tensor).

        Whether it is the base's is for the caller to see from its hash. A finished delta takes its steps back; an
        unfinished one puts the base's numbers in, whatever weight and density it was applied with.
        """
        info = self.manifest.tensors[name]
        dtype = DTYPES[info.base_dtype]
        if self.manifest.applied is None:
            bits = _bits(tensor, dtype, copy=True)
            self._walk(name, "base", bits, lambda old, base: base)
            return bits.view(dtype).view(tensor.shape)
        bits = _bits(tensor, info.common_dtype, copy=True)
        self._walk(name, "steps", bits, lambda old, steps: _ordered(_ordered(old) - steps))
        return bits.view(info.common_dtype).view(tensor.shape).to(dtype)

    def positions(self, name: str) -> np.ndarray:
        """The row-major indices of the kept entries: int64, ascending."""
        info = self.manifest.tensors[name]
        if info.positions == "all":
            return np.arange(info.count)
        if info.positions == "gaps":
            return _from_gaps(self.arrays[f"{name}:gaps"].numpy())
        return np.flatnonzero(np.unpackbits(self.arrays[f"{name}:bitmap"].numpy(), bitorder="little"))

    def changes(self, name: str, base: torch.Tensor | None = None) -> np.ndarray | None:
        """edited - base at the kept entries, float32; None in a finished delta if the base's tensor is not given."""
        info = self.manifest.tensors[name]
        if base is not None:
            difference = self.edited(name, base).float() - base.float()
            return difference.reshape(-1).numpy()[self.positions(name)]
        if self.manifest.applied is not None:
            return None
        before = self.arrays[f"{name}:base"]
        bits = _ordered(_ordered(_bits(before, info.common_dtype)) + self.arrays[f"{name}:steps"])
        return (bits.view(info.common_dtype).float() - before.float()).numpy()

    def _walk(self, name: str, part: str, bits: torch.Tensor, change: Callable[[Any, Any], Any]) -> None:
        """Replace the kept entries of the flat `bits` by `change(entries, the part's entries)`, piece by piece."""
        values = self.arrays[f"{name}:{part}"].view(bits.dtype)
        for piece, index, chosen in self._pieces(name, bits.device):
            # numpy's indexing takes half of torch's time on a CPU.
            if bits.device.type == "cpu":
                target, news = bits.numpy()[piece], values[chosen].numpy()
            else:
                target, news = bits[piece], values[chosen].to(bits.device)
            target[index] = change(target[index], news)

    def _pieces(self, name: str, device: torch.device) -> Iterator[tuple[slice, Any, slice]]:
        """Parts of a tensor: where it is, which entries in it are kept, and where their values are among all."""
        info = self.manifest.tensors[name]
        size = PIECE if device.type == "cpu" else GPU_PIECE
        if info.positions == "gaps":
            positions = self.positions(name)
            index = positions if device.type == "cpu" else torch.from_numpy(positions).to(device)
            yield slice(0, info.numel), index, slice(0, info.count)
            return
        done = 0
        for start in range(0, info.numel, size):
            stop = min(start + size, info.numel)
            if info.positions == "all":
                yield slice(start, stop), slice(None), slice(start, stop)
                continue
            packed = self.arrays[f"{name}:bitmap"][start // 8 : (stop + 7) // 8]
            index = unpack_indices(packed, device)
            yield slice(start, stop), index, slice(done, done := done + len(index))


def unpack_indices(bitmap: torch.Tensor, device: torch.device) -> Any:
    """The places of the bits that are set: an array for a CPU, a tensor on any other device."""
    if device.type == "cpu":
        return np.flatnonzero(np.unpackbits(bitmap.numpy(), bitorder="little"))
    shifts = torch.arange(8, dtype=torch.uint8, device=device)
    return (bitmap.to(device)[:, None] >> shifts & 1).reshape(-1).nonzero()[:, 0]


def _from_gaps(gaps: np.ndarray) -> np.ndarray:
    is_entry = gaps != MAX_GAP
    return np.cumsum(gaps + is_entry.astype(np.int64))[is_entry] - 1


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
            _check_arrays(path, manifest, {name: file.get_slice(name) for name in file.keys()})
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except MM4KEError:
        raise
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:  # the last two: torch, of odd offsets
        raise MM4KEError(
            f"{path}: not a readable safetensors file: {_line(first_line(error))}; copy or make it again"
        ) from None
    if metadata.get(SHA256_KEY) != _file_sha256(metadata[MANIFEST_KEY], arrays):
        raise MM4KEError(f"{path}: damaged: its content is not what its checksum says; copy or make it again")
    delta = KnowledgeDelta(path, manifest, arrays)
    for name in manifest.tensors:
        _check_positions(delta, name)
        if manifest.applied is None:
            require_finite(arrays[f"{name}:base"], f"{path}: {name}: base")
    return delta


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
        raise MM4KEError(f"{path}: {_line(key)}: {_line(problem['msg'])}; copy or make it again") from None


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
            expected[f"{name}:base"] = DTYPE_NAMES[DTYPES[info.base_dtype]], [count]
        if info.positions == "bitmap":
            expected[f"{name}:bitmap"] = "U8", [(numel + 7) // 8]
        elif info.positions == "gaps":
            expected[f"{name}:gaps"] = "U8", None
    if differing := sorted(expected.keys() ^ found.keys()):
        state = "missing" if differing[0] in expected else "unknown"
        raise MM4KEError(f"{path}: {_line(differing[0])}: {state}; copy or make it again")
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
        right = _count_bits(bitmap) == info.count and not last.any()
    elif info.positions == "gaps":
        positions = delta.positions(name)
        right = len(positions) == info.count and positions[-1] < info.numel
    if not right:
        raise MM4KEError(
            f"{delta.path}: {name}: its positions are not {info.count} of {info.numel} entries; copy or make it again"
        )


def _count_bits(bitmap: np.ndarray) -> int:
    counts = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)
    return int(np.bincount(bitmap, minlength=256) @ counts)


# ---- using ----


def choose(weight: float | None, density: float | None, delta: KnowledgeDelta | None) -> tuple[float, float]:
    """The weight and density that count where one may be left out: 1 and 1 for a finished delta, else 0.8 and 0.8.

    Raises MM4KEError for a weight outside -10 to 10 and a density that is not above 0 and up to 1.
    """
    finished = delta is not None and delta.manifest.applied is not None
    weight = (1.0 if finished else DEFAULT_WEIGHT) if weight is None else weight
    density = (1.0 if finished else DEFAULT_DENSITY) if density is None else density
    if not isinstance(weight, (int, float)) or not -10 <= weight <= 10:
        raise MM4KEError(f"weight: {weight}: give a number from -10 to 10 (default {DEFAULT_WEIGHT})")
    if not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise MM4KEError(f"density: {density}: give a share above 0, up to 1 (default {DEFAULT_DENSITY})")
    return float(weight), float(density)


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
    """What a tensor of the base becomes: `delta.merge`, in the base's dtype.

    edited:   `KnowledgeDelta.edited` of each delta that has the tensor
    choices:  weight and density of each
    titles:   what an error calls each
    finished: whether each delta is; a single one of weight and density 1 is taken as it is, without a rounding
    """
    if len(edited) == 1 and finished[0] and choices[0] == (1, 1):
        return edited[0]
    weights, densities = zip(*choices)
    return merge(base, edited, weights, densities, names=[f"base: {name}", *(f"{title}: {name}" for title in titles)])


# ---- numbers ----


def _bits(tensor: torch.Tensor, dtype: torch.dtype, copy: bool = False) -> torch.Tensor:
    """The bits of a tensor's numbers as flat integers, after a cast to `dtype`; a view where `copy` allows it."""
    return tensor.detach().to(dtype, copy=copy).contiguous().reshape(-1).view(BITS[dtype])


def _ordered(bits: Any) -> Any:
    """Integers that are ordered as the floats with these bits are, and back again. int16 or int32, torch or numpy."""
    width = 8 * bits.dtype.itemsize
    return bits ^ (bits >> (width - 1) & ((1 << (width - 1)) - 1))


def identical(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers; where they have one dtype, the same bits."""
    if first.dtype == second.dtype in BITS:
        return torch.equal(_bits(first, first.dtype), _bits(second, second.dtype))
    dtype = torch.promote_types(first.dtype, second.dtype)
    return torch.equal(first.to(dtype), second.to(dtype))


def require_finite(tensor: torch.Tensor, title: str) -> None:
    if not is_finite(tensor):
        raise MM4KEError(f"{title}: holds NaN or an infinite number; copy or make it again")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a single number"
