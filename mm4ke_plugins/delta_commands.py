"""Knowledge deltas and model folders: extract, apply, revert, show, diff (`mm4ke delta`).

A new folder is a copy of the old one in which only the changed tensors were computed: all other bytes go from file to
file by the kernel. It is written aside and renamed when it is complete.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from .checkpoint import equal_and_finite, open_tensors, rewrite, stored_tensors, tensor_files
from .delta_encoding import DTYPES, in_threads, shape_text, tensor_sha256
from .delta_manifest import MAGNITUDES, Manifest, choose
from .delta_merging import check_alike, check_base, merged_tensor
from .errors import MM4KEError, first_line
from .files import written_aside
from .knowledge_delta import KnowledgeDelta, is_delta, load_delta, save_delta
from .replacing import RECORD

# Other forms of a model's weights. Beside new weights they would be the old model.
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"}

# What mergekit leaves in a result: its recipe, and a sentence in the model card.
MERGE_RECIPE = "mergekit_config.yml"
MERGE_CARD = "merge of pre-trained language models created using [mergekit]"


# ---- extract ----


class Tensors(Mapping):
    """The tensors of a model folder by name, each read when it is asked for."""

    def __init__(self, folder: Path, stack: ExitStack):
        self.files = open_tensors(folder, stack)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.files[name].get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def extract(
    base: Path,
    edited: Path,
    output: Path,
    weight: float | None = None,
    density: float | None = None,
    recipe: Path | None = None,
) -> Manifest:
    """Write the knowledge delta of two model folders: see `knowledge_delta.save_delta`.

    recipe: a YAML file whose settings are noted in the delta

    Raises MM4KEError: a folder or the recipe can't be read, the two are not of one model, an output that exists and is
    no delta; what `save_delta` raises.
    """
    choose(weight, density)
    if output.exists() and not is_delta(output):
        raise MM4KEError(f"{output}: exists and is no knowledge delta, so it is kept; give another name")
    settings = _read_recipe(recipe) if recipe else None
    architecture = _architecture(base)
    with ExitStack() as stack:
        before, after = Tensors(base, stack), Tensors(edited, stack)
        if (other := _architecture(edited)) != architecture:
            raise MM4KEError(f"{edited}: is a {other}, {base} a {architecture}; give a model made from this base")
        missing = sorted(before.keys() - after.keys())
        # Where the output head is the embedding, one of the two models may have stored it twice.
        if missing and not _config(base).get("tie_word_embeddings"):
            raise MM4KEError(f"{edited}: {missing[0]} is missing; copy or save the model again")
        return save_delta(
            output,
            before,
            {name: after[name] for name in _differing(base, edited)},
            weight=weight,
            density=density,
            architecture=architecture,
            recipe=settings,
            titles=(str(base), str(edited)),
        )


def _differing(base: Path, edited: Path) -> list[str]:
    """The tensors of `edited` that may be others in `base`: those that are not the same bytes."""
    folders = [{}, {}]
    for folder, stored in zip((base, edited), folders, strict=True):
        files = tensor_files(folder)
        for file in set(files.values()):
            stored |= {name: tensor for name, tensor in stored_tensors(file)[0].items() if files.get(name) == file}
    before, after = folders
    return [
        name
        for name, tensor in tqdm(after.items(), desc="comparing", unit=" tensors", leave=False)
        if name not in before or not equal_and_finite(before[name], [tensor])
    ]


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MM4KEError(f"{path}: {first_line(error)}; give the YAML recipe of the training") from None
    if not isinstance(settings, dict):
        raise MM4KEError(f"{path}: no settings in it; give the YAML recipe of the training")
    return settings


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MM4KEError(f"{path}: {first_line(error)}; give a model folder as transformers saves it") from None
    if not isinstance(config, dict):
        raise MM4KEError(f"{path}: no settings in it; give a model folder as transformers saves it")
    return config


def _architecture(folder: Path) -> str:
    names = _config(folder).get("architectures")
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

    weights, densities: none (see `knowledge_delta.choose`), one for all deltas, or one for each. The float32 sum of
                        all is rounded once. A single finished delta of weight 1 and density 1 is not even rounded
    link:               files of weights in which nothing changes become hard links to the base's, not copies

    Raises MM4KEError: what `load_delta` raises, deltas of different bases, a base that the deltas were not taken from
    (architecture, missing tensors, shapes, dtypes, hashes), an output that exists, a full disk.
    """
    found = [load_delta(path) for path in deltas]
    check_alike(found)
    choices = [
        choose(_of(weights, place, found, "--weight"), _of(densities, place, found, "--density"), delta.manifest)
        for place, delta in enumerate(found)
    ]
    names = {name for delta in found for name in delta.manifest.tensors}
    for delta in found:
        _check_architecture(delta, base)
    with ExitStack() as stack:
        tensors = Tensors(base, stack)
        if missing := sorted(names - tensors.keys()):
            raise MM4KEError(f"{base}: {missing[0]} is missing; give the base that the delta was taken from")
        in_threads(lambda name: check_base(found, name, tensors[name], str(base)), sorted(names))

        def make(name: str) -> torch.Tensor:
            tensor = tensors[name]
            used = [place for place, delta in enumerate(found) if name in delta.manifest.tensors]
            return merged_tensor(
                name,
                tensor,
                [found[place].edited(name, tensor) for place in used],
                [choices[place] for place in used],
                [str(found[place].path) for place in used],
                [found[place].manifest.applied is not None for place in used],
            )

        _write_model(base, output, {name: lambda name=name: make(name) for name in names}, {}, link)


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
    infos = found.manifest.tensors
    with ExitStack() as stack:
        tensors = Tensors(model, stack)

        def make(name: str) -> torch.Tensor:
            restored = found.base(name, tensors[name])
            if tensor_sha256(restored) != infos[name].base_sha256:
                raise MM4KEError(
                    f"{model}: {name}: without {delta} it is not the base's; give the model to which this delta, "
                    "and no other one in this tensor, was applied as it is"
                )
            return restored

        for name, info in infos.items():
            if name not in tensors:
                raise MM4KEError(f"{model}: {name} is missing; give the model to which the delta was applied")
            part = tensors.files[name].get_slice(name)
            if part.get_shape() != info.shape:
                raise MM4KEError(
                    f"{model}: {name} is {shape_text(part.get_shape())}, in {delta} {shape_text(info.shape)}; "
                    "give the model to which the delta was applied"
                )
        dtypes = {name: DTYPES[info.base_dtype] for name, info in infos.items()}
        _write_model(model, output, {name: lambda name=name: make(name) for name in infos}, dtypes, link)


def _write_model(
    source: Path,
    output: Path,
    replacements: Mapping[str, Callable[[], torch.Tensor]],
    dtypes: Mapping[str, torch.dtype],
    link: bool,
) -> None:
    """A copy of a model folder's own files, with these tensors replaced."""
    names_in: dict[Path, list[str]] = {}
    for name, file in tensor_files(source).items():
        names_in.setdefault(file, [])
        if name in replacements:
            names_in[file].append(name)
    left_out = _of_merge(source)
    others = [
        path
        for path in sorted(source.iterdir())
        if path.is_file() and path.suffix not in WEIGHTS and path.name not in left_out
    ]
    size = sum(path.stat().st_size for path in names_in)
    try:
        with new_folder(output) as folder, tqdm(total=size, unit="B", unit_scale=True, leave=False) as bar:
            # Files with new tensors first: what is wrong with these shows before the long copies.
            for file, names in sorted(names_in.items(), key=lambda item: not item[1]):
                target = folder / file.name
                if names:
                    rewrite(
                        file,
                        target,
                        {name: replacements[name] for name in names},
                        {name: dtypes[name] for name in names if name in dtypes},
                    )
                elif link:
                    os.link(file.resolve(), target)
                else:
                    shutil.copyfile(file, target)
                bar.update(file.stat().st_size)
            for path in others:
                shutil.copyfile(path, folder / path.name)
    except OSError as error:
        raise MM4KEError(f"{output}: can't be written: {error.strerror or error}; nothing was left behind") from None


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
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise MM4KEError(f"{output}: exists; remove it or give another folder")
    with written_aside(output.resolve()) as folder:
        folder.mkdir()
        yield folder


# ---- show and diff ----


def show(path: Path, console: Console) -> None:
    """Print what is known of a delta, its tensors, and a histogram of how much its entries changed."""
    delta = load_delta(path)
    manifest = delta.manifest
    facts = Table(box=None, show_header=False)
    applied = manifest.applied
    facts.add_row("delta", f"{path}, {path.stat().st_size / 1e6:.2f} MB")
    facts.add_row(
        "state",
        f"finished: weight {applied.weight}, density {applied.density}"
        if applied
        else "unfinished: weight and density are chosen when it is applied",
    )
    facts.add_row("architecture", manifest.architecture or "not known")
    facts.add_row("facts", "not known" if manifest.facts is None else str(manifest.facts))
    facts.add_row("made", f"{manifest.created} by mm4ke-plugins {manifest.mm4ke_version}")
    for key, value in (manifest.recipe or {}).items():
        facts.add_row("recipe", Text(f"{key}: {value}"))
    titles = "shape", "numbers", "kept", "share", "as", "MB", "norm", "of base"
    table, short_names = _table(manifest.tensors, *titles)
    totals = np.zeros(len(MAGNITUDES) + 1, np.int64)
    for name, info in manifest.tensors.items():
        dtypes = dict.fromkeys((info.edited_dtype, info.base_dtype))
        size = sum(array.nbytes for part, array in delta.arrays.items() if part.rpartition(":")[0] == name)
        kept = sum(info.magnitudes)
        relative = f"{info.norm / info.base_norm:.2%}" if info.base_norm else "-"
        row = [shape_text(info.shape), " on ".join(dtypes), f"{kept:,}", f"{kept / info.numel:.1%}", info.positions]
        table.add_row(short_names[name], *row, f"{size / 1e6:.2f}", f"{info.norm:.4g}", relative)
        totals += info.magnitudes
    console.print(facts, "", table, "\n|edited - base| of the kept entries")
    for label, count in zip(_class_labels(), totals.tolist()):
        share = count / max(1, totals.sum())
        console.print(Text(f"{label:>18} {share:>7.2%} {'█' * round(40 * share)}"))


def _class_labels() -> list[str]:
    ends = [f"{end:g}" for end in MAGNITUDES]
    return [f"below {ends[0]}", *(f"{low} to {high}" for low, high in pairwise(ends)), f"{ends[-1]} and above"]


def _table(names: Iterable[str], *titles: str) -> tuple[Table, dict[str, Text]]:
    """A table with a row for each of these tensors, and what it calls them: without what they begin and end with."""
    names = list(names)
    before = os.path.commonprefix([name.rpartition(".")[0] for name in names]).rpartition(".")[0]
    endings = {name.rpartition(".")[2] for name in names}
    after = f".{endings.pop()}" if len(endings) == 1 else ""
    table = Table(
        "tensor",
        title=Text(f"{before}.*{after}" if before else ""),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.show_edge = table.pad_edge = False
    table.columns[0].overflow = "fold"  # a name that is cut off is of no use
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    return table, {name: Text(name.removeprefix(f"{before}.").removesuffix(after)) for name in names}


def compare_deltas(first: Path, second: Path, base: Path | None = None) -> dict[str, dict[str, float | int | None]]:
    """How much two deltas of one base have to do with each other, for each tensor that either has.

    Returns by name: kept_first, kept_second, kept_both (entries), sign_conflicts (of those in both, how many move in
    opposite directions) and cosine (of the two differences; None where a delta is finished and `base`, the folder, is
    not given, since its own file has no magnitudes). Without `base`, a number that changed its sign between values
    beyond 2 and -2 may count as moved in the other direction.

    Raises MM4KEError: what `load_delta` raises, deltas of different bases, another base.
    """
    deltas = [load_delta(path) for path in (first, second)]
    check_alike(deltas)
    rows = {}
    with ExitStack() as stack:
        tensors = Tensors(base, stack) if base else None
        for name in sorted({name for delta in deltas for name in delta.manifest.tensors}):
            having = [delta for delta in deltas if name in delta.manifest.tensors]
            before = None
            if tensors is not None:
                if name not in tensors:
                    raise MM4KEError(f"{base}: {name} is missing; give the base that the deltas were taken from")
                check_base(having, name, before := tensors[name], str(base))
            kept = [delta.positions(name) if delta in having else np.empty(0, np.int64) for delta in deltas]
            row = {"kept_first": len(kept[0]), "kept_second": len(kept[1]), "kept_both": 0, "sign_conflicts": 0}
            row["cosine"] = None
            if len(having) == 2:
                row |= _compare_tensor(deltas, name, kept, before)
            rows[name] = row
    return rows


def _compare_tensor(
    deltas: Sequence[KnowledgeDelta], name: str, kept: Sequence[np.ndarray], base: torch.Tensor | None
) -> dict[str, float | int | None]:
    common, *places = np.intersect1d(*kept, assume_unique=True, return_indices=True)
    changes = [delta.changes(name, base) for delta in deltas]
    cosine = None
    if all(change is not None for change in changes):
        norms = [float(np.linalg.norm(change)) for change in changes]
        dot = float(np.dot(changes[0][places[0]], changes[1][places[1]]))
        cosine = dot / (norms[0] * norms[1]) if all(norms) else None
        signs = [np.sign(change[place]) for change, place in zip(changes, places)]
    else:
        signs = [np.sign(delta.arrays[f"{name}:steps"].numpy()[place]) for delta, place in zip(deltas, places)]
    return {
        "kept_both": len(common),
        "sign_conflicts": int((signs[0] * signs[1] < 0).sum()),
        "cosine": cosine,
    }


def diff(first: Path, second: Path, base: Path | None, console: Console) -> None:
    """Print `compare_deltas`."""
    rows = compare_deltas(first, second, base)
    table, short_names = _table(rows, "A", "B", "both", "overlap", "conflicts", "cosine")
    for name, row in rows.items():
        both, either = row["kept_both"], row["kept_first"] + row["kept_second"] - row["kept_both"]
        conflicts = f"{row['sign_conflicts']:,} ({row['sign_conflicts'] / both:.1%})" if both else "-"
        cosine = "-" if row["cosine"] is None else f"{row['cosine']:+.3f}"
        table.add_row(
            short_names[name], f"{row['kept_first']:,}", f"{row['kept_second']:,}", f"{both:,}", f"{both / either:.1%}",
            conflicts, cosine,
        )  # fmt: skip
    console.print(Text(f"A: {first}\nB: {second}\n"), table, "")
    console.print(Text("overlap: kept in both of those kept in either. conflict: moved in opposite directions."))
    if any(row["cosine"] is None and row["kept_both"] for row in rows.values()):
        console.print(Text("cosine: a finished delta has no magnitudes of its own; give --base for it."))
