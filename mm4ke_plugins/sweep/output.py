"""What a sweep shows and writes: tables, figures, and the recipe that makes the model that was picked.

sweep.json       all of `sweep`; sweep.csv: a row for each point and half
merge.yaml       for mergekit-yaml
weight, density  the paper's Figures 2 and 3: each measure over one of the two, a line for each value of the other
pareto           edit success over locality, with the points that no other one beats. Each as SVG and PNG
"""

import csv
import io
import json
import math
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import MM4KEError
from ..knowedit.metrics import METRICS
from ..report.figures import MARKERS
from ..storage.atomic import refused_in_one_line, replaced_folder
from ..storage.models import is_hub_id, local_path, model_name
from ..storage.replacing import refuse_to_replace, users_files
from .points import DEFAULT, HALVES, Point, title

KNOWN = ("known_kl", "known_kept")
MEASURES = (*METRICS, "kl", "perplexity", *KNOWN)
TITLES = {"kl": "KL from base (nats)", "known_kl": "KL from base, known facts"}
TITLES |= {name: name.replace("_", " ") for name in (*METRICS, "perplexity")}
SHORT_TITLES = {
    "edit_success": "edit\nsuccess",
    "generalization": "general-\nization",
    "portability": "porta-\nbility",
    "locality": "local-\nity",
    "kl": "KL\n(nats)",
    "perplexity": "perple-\nxity",
    "known_kl": "known\nKL",
    "known_kept": "known\nkept",
}
FORMS = {"kl": ".4f", "known_kl": ".4f", "perplexity": ".2f"}
ORANGE = "#d55e00"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sweep",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
}
PICKED = {"marker": "*", "markersize": 15, "color": ORANGE, "linestyle": "none", "markeredgecolor": "white"}


# ---- tables ----


def show(result: dict[str, Any], console: Console) -> None:
    """Print all points on the half that decides, then the one that was picked beside others on both halves."""
    records = result["records"]
    names = _measures(result)
    grid = _table(f"The {records['choice']} records that decide", "weight", "density", *names, "")
    for row in _with_untouched(result):
        point = _point(row)
        cells = ["base", ""] if row is result["untouched"] else [f"{point.weight:g}", f"{point.density:g}"]
        grid.add_row(*cells, *_cells(row, "choice", names), Text(_note(result, row)))
    console.print(grid)
    kept = KNOWN[1:] if KNOWN[0] in names else ()  # of these rows only
    for half, what in zip(HALVES, ("records that decide", "other records"), strict=True):
        table = _table(f"The {records[half]} {what}", "", "kept", *names, *kept, "")
        for name, row in _sides(result):
            success, of_rsft = (part["scores"][half]["edit_success"] or 0.0 for part in (row, result["rsft"]))
            share = success / of_rsft if of_rsft else 0.0
            table.add_row(name, f"{share:.1%}", *_cells(row, half, [*names, *kept]))
        console.print(table)
    console.print(Text(f"picked: {title(_point(result['picked']))}"), soft_wrap=True)
    for line in warnings(result):
        console.print(Text(f"warning: {line}"), soft_wrap=True)


def warnings(result: dict[str, Any]) -> list[str]:
    """What the half that confirms does not confirm."""
    success = {name: row["scores"]["confirmation"]["edit_success"] or 0.0 for name, row in _sides(result)}
    if success["picked"] >= result["keep"] * success["R-SFT"]:
        return []
    kept = success["picked"] / success["R-SFT"]
    return [
        f"on the other records the picked point keeps {kept:.1%} of R-SFT's edit success, not {result['keep']:.1%}"
    ]


def _sides(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    default = f"{DEFAULT.weight:g}/{DEFAULT.density:g}"
    return [("picked", result["picked"]), ("R-SFT", result["rsft"]), (default, result["default"])]


def _measures(result: dict[str, Any]) -> tuple[str, ...]:
    """What is shown of every point: the known facts' KL only where it decides."""
    return tuple(name for name in MEASURES if name not in KNOWN or name == result["deciding_kl"])


def _table(heading: str, *columns: str) -> Table:
    """A table of numbers that fits into 80 columns; the last column has words."""
    table = Table(box=None, padding=(0, 1, 0, 0), title=f"\n{heading}", title_justify="left")
    for name in columns:
        table.add_column(SHORT_TITLES.get(name, name), justify="right")
    table.columns[-1].justify = "left"
    return table


def _cells(row: dict[str, Any], half: str, names: Sequence[str]) -> list[str]:
    return [_or_blank(_measure(row, name, half), FORMS.get(name, ".3f")) for name in names]


def _or_blank(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)


def _note(result: dict[str, Any], row: dict[str, Any]) -> str:
    notes = [] if row["state"] == "scored" else [row["state"]]
    point = _point(row)
    if row["point"] == result["picked"]["point"]:
        notes.append("picked")
    if row is not result["untouched"]:
        notes += [name for name, other in _sides(result)[1:] if row["point"] == other["point"]]
    if row["on_front"]:
        notes.append("front")
    notes += [f"layer {layer}: {weight:g}/{density:g}" for layer, weight, density in point.layers]
    return ", ".join(notes)


def _point(row: dict[str, Any]) -> Point:
    point = row["point"]
    return Point(point["weight"], point["density"], tuple(map(tuple, point["layers"])))


def _with_untouched(result: dict[str, Any]) -> list[dict[str, Any]]:
    def order(row: dict[str, Any]) -> tuple:
        point = _point(row)
        return bool(point.layers), -point.density, -point.weight

    return [result["untouched"], *sorted(result["points"], key=order)]


# ---- files ----

FIGURES = {f"{name}.{kind}" for name in ("weight", "density", "pareto") for kind in ("svg", "png")}
FILES = {"sweep.json", "sweep.csv", "merge.yaml"} | FIGURES


def check_output(output: Path) -> None:
    """Refuse to replace anything but an earlier sweep or an empty folder, and a place where nothing can be written."""
    place = next(folder for folder in output.resolve().parents if folder.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise MM4KEError(f"{output}: {place} is no folder that can be written to; give another place")
    if os.path.ismount(output):
        raise MM4KEError(f"{output}: is a mount point, which can't be replaced in one step; give a folder in it")
    if not output.exists():
        return
    is_sweep = (output / "sweep.json").is_file()
    if not output.is_dir() or (not is_sweep and any(output.iterdir())):
        raise MM4KEError(f"{output}: exists and is no earlier sweep; remove it or give another folder")
    refuse_to_replace(output, "exists and is more than an earlier sweep", users_files(output, FILES.__contains__))


def write(result: dict[str, Any], output: Path) -> None:
    """Write all files to `output`, which is replaced as a whole if it is an earlier sweep, once they are complete.

    Raises MM4KEError: see `check_output`; a full disk and the like.
    """
    check_output(output)
    with refused_in_one_line(output), replaced_folder(output.resolve()) as folder:
        folder.mkdir()
        for name, text in (
            ("sweep.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n"),
            ("sweep.csv", _csv(result)),
            ("merge.yaml", merge_recipe(result, output)),
        ):
            (folder / name).write_text(text, encoding="utf-8")
        for name, figure in figures(result):
            for suffix in ("svg", "png"):
                figure.savefig(folder / f"{name}.{suffix}", dpi=150, bbox_inches="tight")


def _csv(result: dict[str, Any]) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["half", "weight", "density", "layers", "state", "in_grid", "on_front", "picked", *MEASURES])
    for row in _with_untouched(result):
        point = row["point"]
        layers = " ".join(f"{layer}:{weight}/{density}" for layer, weight, density in point["layers"])
        state = "base" if row is result["untouched"] else row["state"]
        picked = row["point"] == result["picked"]["point"]
        for half in row["scores"] or HALVES[:1]:
            rows.writerow(
                [half, point["weight"], point["density"], layers, state, row["in_grid"], row["on_front"], picked]
                + [_measure(row, name, half) for name in MEASURES]
            )
    return text.getvalue()


def merge_recipe(result: dict[str, Any], output: Path) -> str:
    """mergekit's recipe for the picked point. output: the folder that it will be in."""
    point, edited = _point(result["picked"]), result["edited"]

    def setting(place: int) -> Any:
        common = (point.weight, point.density)[place]
        prefix = result["layers"]["name"]
        # mergekit takes the first filter that is a part of a tensor's name.
        filters = [{"filter": f"{prefix}.{entry[0]}.", "value": entry[1 + place]} for entry in point.layers]
        return [*filters, {"value": common}] if filters else common

    recipe = {
        "merge_method": "mm4ke",
        "base_model": model_name(result["base"]),
        "models": [{"model": local_path(edited), "parameters": {"weight": setting(0), "density": setting(1)}}],
    }
    scores = result["picked"]["scores"]["confirmation"]
    measured = ", ".join(f"{TITLES[name]} {scores[name]:.3f}" for name in METRICS if scores[name] is not None)
    lines = [
        f"# The weight and density that `mm4ke sweep` picked on {result['facts']}.",
        "#",
        f"#     mergekit-yaml {shlex.quote(str(output / 'merge.yaml'))} out/",
    ]
    if command := apply_command(result):
        lines += ["#", "# or, the same without mergekit:", "#", f"#     {command}"]
    lines += [
        "#",
        f"# Needs:  {result['base']} and {result['edited']}",
        "# Makes:  out, the merged model",
        f"# On {result['records']['confirmation']} records that the choice did not see: {measured}",
        "",
    ]
    return "\n".join(lines) + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


def apply_command(result: dict[str, Any]) -> str | None:
    """The command that applies the edit at the picked point; None where it can't.

    It can't without a delta, where layers differ, and where the base is a hub id.
    """
    point = _point(result["picked"])
    if point.layers or Path(result["edited"]).is_dir() or is_hub_id(result["base"]):
        return None
    places = [result["base"], result["edited"], "-o", "out"]
    return shlex.join(
        ["mm4ke", "delta", "apply", *places, "--weight", str(point.weight), "--density", str(point.density)]
    )


# ---- figures ----


def figures(result: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """The figures by the name of their file."""
    with matplotlib.rc_context(STYLE):
        yield "weight", _over(result, "weight", "density")
        yield "density", _over(result, "density", "weight")
        yield "pareto", _pareto(result)


def _over(result: dict[str, Any], key: str, other: str) -> Figure:
    """Each measure over weight or density, a line for each value of the other."""
    rows = [row for row in result["points"] if not row["point"]["layers"]]
    values = sorted({row["point"][other] for row in rows if _measure(row, "edit_success") is not None})
    colors = matplotlib.colormaps["viridis"].resampled(len(values) + 1)  # without the last, a light yellow
    names = _measures(result)
    across = math.ceil(len(names) / 2)
    figure = Figure(figsize=(3.2 * across, 5.6), layout="constrained")
    figure.suptitle(_half_title(result), fontsize=9)
    plots = figure.subplots(2, across, sharex=True)
    for plot in plots.flat[len(names) :]:
        plot.set_axis_off()
    for plot, name in zip(plots.flat, names, strict=False):
        for place, value in enumerate(values):
            points = _points((row for row in rows if row["point"][other] == value), key, name)
            marker = MARKERS[place % len(MARKERS)]
            plot.plot(*points, marker=marker, color=colors(place), label=f"{other} {value:g}", markerfacecolor="none")
        _mark_base_and_picked(plot, result, name, key)
        plot.set_title(TITLES[name], loc="left", fontsize=9, fontweight="bold")
    for plot in plots.flat[len(names) - across : len(names)]:  # those with nothing below
        plot.set_xlabel(key)
        plot.tick_params(labelbottom=True)
    first = plots.flat[0]
    first.axhline(result["required"], color=ORANGE, linestyle="--", linewidth=1, label="required")
    handles, labels = first.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure


def _half_title(result: dict[str, Any]) -> str:
    return f"{result['records']['choice']} records of {Path(result['facts']).name}, {result['prompt_format']} prompts"


def _points(rows: Iterable[dict[str, Any]], key: str, name: str) -> tuple[list[float], list[float]]:
    found = [(row["point"][key], _measure(row, name)) for row in rows]
    found = sorted((x, y) for x, y in found if y is not None)
    return [x for x, _ in found], [y for _, y in found]


def _measure(row: dict[str, Any], name: str, half: str = HALVES[0]) -> float | None:
    return row["scores"].get(half, {}).get(name) if name in METRICS else row[name]


def _mark_base_and_picked(plot, result: dict[str, Any], name: str, key: str) -> None:
    # The base's locality is 1, far above the others.
    if name != "locality" and (base := _measure(result["untouched"], name)) is not None:
        plot.axhline(base, color="#555555", linestyle=":", linewidth=1, label="base")
    picked = result["picked"]
    if not picked["point"]["layers"] and (y := _measure(picked, name)) is not None:
        plot.plot([picked["point"][key]], [y], label="picked", zorder=5, **PICKED)


def _pareto(result: dict[str, Any]) -> Figure:
    """Edit success over locality of all points that were scored, coloured by the KL that decides; without locality,
    over that."""
    has_locality = _measure(result["rsft"], "locality") is not None
    kl = result["deciding_kl"]
    across = "locality" if has_locality else kl
    rows = [row for row in result["points"] if _measure(row, across) is not None and row[kl] is not None]
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    plot = figure.subplots()
    places = [[_measure(row, name) for row in rows] for name in (across, "edit_success")]
    dots = plot.scatter(*places, c=[row[kl] for row in rows], cmap="viridis_r", s=26, zorder=3)
    figure.colorbar(dots, label=TITLES[kl])
    front = sorted(_front(list(zip(*places)), larger_is_better=has_locality))
    plot.plot(*zip(*front), color="#555555", linewidth=1, label="not beaten in both", zorder=2)
    plot.axhline(result["required"], color=ORANGE, linestyle="--", linewidth=1, label="required")
    place, *others = [(_measure(row, across), _measure(row, "edit_success")) for _, row in _sides(result)]
    picked = f"picked: {title(_point(result['picked']))}"
    plot.plot(*([value] for value in place), label=picked, zorder=5, **PICKED)
    for (name, _), other in zip(_sides(result)[1:], others, strict=True):
        plot.annotate(name, other, xytext=(8, 6), textcoords="offset points")
    plot.set_title(_half_title(result), fontsize=9)
    plot.set_xlabel(TITLES[across])
    plot.set_ylabel(TITLES["edit_success"])
    plot.margins(0.12)
    plot.legend(loc="best")
    return figure


def _front(points: list[tuple[float, float]], larger_is_better: bool) -> list[tuple[float, float]]:
    """The points that no other one beats in both, of which the second is better when larger."""
    sign = 1 if larger_is_better else -1
    return [
        point
        for point in set(points)
        if not any(other != point and sign * other[0] >= sign * point[0] and other[1] >= point[1] for other in points)
    ]
