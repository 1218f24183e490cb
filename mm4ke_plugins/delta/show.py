"""What `mm4ke delta show` and `diff` print: one delta's contents, and where two of one base overlap or contradict."""

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import MM4KEError
from ..storage.tensors import shape_text
from .base import check_alike, check_base
from .folders import Tensors
from .format import KnowledgeDelta, load_delta
from .manifest import MAGNITUDES


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
