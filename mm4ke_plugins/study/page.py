"""study.html, study.md and study.json: what a study found, in one page with the commands that found it.

Names, errors and commands are untrusted: jinja2 escapes them in HTML, `markdown_table` in Markdown.
"""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from itertools import combinations
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

from .. import __version__
from ..hosts import package_versions
from ..knowedit.records import Record
from ..report import figures
from ..report.markdown import markdown_table
from ..report.statistics import Difference
from ..report.verdict import interval, signed
from ..storage.atomic import replace_text
from .plan import BASE, Study
from .run import Row
from .steps import PACKAGES
from .table import Line, Measure, differences, fronts_of, is_ahead, lines_of, measures, raw_measures

PANEL = 2.3  # inches


def write_page(study: Study, rows: list[Row], records: dict[str, list[Record]], output: Path) -> list[Path]:
    """Write the three files to `output`, which the study has locked. Returns their paths, study.html first."""
    form = "chat" if study.template != "empty" else "raw"
    columns = measures(form)
    sections = [_section(study, rows, records[facts.name], facts, columns, form) for facts in study.facts]
    content = {
        "title": study.file.stem.replace("-", " "),
        "study": study,
        "machine": machine(),
        "date": date.today().isoformat(),
        "versions": package_versions(PACKAGES),
        "version": __version__,
        "form": form,
        "sections": sections,
        "commands": [
            (section["name"], line.method, line.commands)
            for section in sections
            for line in section["lines"]
            if line.commands
        ],
    }
    loader = jinja2.ChoiceLoader([jinja2.PackageLoader("mm4ke_plugins", place) for place in ("study", "report")])
    templates = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = templates.get_template("study.html.j2").render(content)
    replace_text(output / "study.html", page.rstrip() + "\n")
    replace_text(output / "study.md", _markdown(content))
    replace_text(output / "study.json", json.dumps([asdict(row) for row in rows], ensure_ascii=False) + "\n")
    return [output / "study.html", output / "study.md", output / "study.json"]


def machine() -> str:
    """Such as "2 CPU cores, Linux x86_64, Python 3.11.7"."""
    return f"{os.cpu_count()} CPU cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}"


def _section(study, rows: list[Row], records: list[Record], facts, columns: list[Measure], form: str) -> dict:
    """What the page shows of one set of facts."""
    rows = [row for row in rows if row.facts == facts.name]
    extra = raw_measures() if form == "chat" else []
    lines = lines_of(rows, records, [*columns, *extra])
    fronts = fronts_of(lines, [column.key for column in columns])
    against = study.against
    header = ["", "method", *(column.title for column in columns), "KL", "perplexity", "seconds", "GB", "fronts"]
    base = next(line for line in lines if line.method == BASE)
    return {
        "name": facts.name,
        "file": facts.file.name,
        "records": len(records),
        "lines": lines,
        "header": header,
        "table": [_cells(number, line, base, columns, fronts) for number, line in enumerate(lines)],
        "pairs": len(columns) * (len(columns) - 1) // 2,
        "raw_header": ["", "method", *(column.title for column in extra)],
        "raw_table": [
            [str(number), line.method, *(_share(line, column) for column in extra)]
            for number, line in enumerate(lines)
        ]
        if extra
        else [],
        "against": against,
        "behind": _behind(lines, columns, against),
        "differences_header": ["against", *(column.title for column in columns)],
        "differences": [
            [name, *(_difference(found.get(column.key)) for column in columns)]
            for name in (line.method for line in lines)
            if name != against and (found := differences(rows, records, columns, name, against))
        ]
        if against
        else [],
        "figure": front_figure(facts.name, lines, columns),
    }


def _share(line: Line, column: Measure) -> str:
    mean, spread = line.means[column.key], line.spread[column.key]
    if mean is None:
        return "–"
    return f"{mean:.3f}" + (f" ({spread[0]:.3f}–{spread[1]:.3f})" if spread else "")


def _cells(number: int, line: Line, base: Line, columns: Sequence[Measure], fronts: dict) -> list[str]:
    if line.error:
        return [str(number), line.method, f"failed: {line.error}"]
    partly = f" ({line.failed} of {line.seeds} seeds failed)" if line.failed else ""
    worse = line.perplexity / base.perplexity if base.perplexity else None
    return [
        str(number),
        line.method + partly,
        *(_share(line, column) for column in columns),
        "–" if line.kl is None else f"{line.kl:.3f}",
        "–" if worse is None else f"{worse:.3f}",
        "–" if line.seconds is None else f"{line.seconds:.0f}",
        "–" if line.peak is None else f"{line.peak / 1e9:.1f}",
        "–" if line.method == BASE else str(len(fronts[line.method])),
    ]


def _difference(change: Difference | None) -> str:
    if change is None:
        return "–"
    mark = (" ▲" if change.mean > 0 else " ▼") if change.is_clear else ""
    return f"{signed(change.mean)} {interval(change)}{mark}"


def _behind(lines: list[Line], columns: list[Measure], against: str | None) -> list[str]:
    """For each pair of measures on whose front the row that is compared is not: a sentence that says who is ahead."""
    titles = {column.key: column.title for column in columns}
    own = next((line for line in lines if line.method == against and not line.error), None)
    if own is None:
        return []
    sentences = []
    for pair in combinations(titles, 2):
        point = tuple(own.means[key] for key in pair)
        if None in point:
            continue
        ahead = [
            line.method
            for line in lines
            if line.method != BASE
            and not line.error
            and all(line.means[key] is not None for key in pair)
            and is_ahead(tuple(line.means[key] for key in pair), point)
        ]
        if ahead:
            sentences.append(f"{titles[pair[0]]} and {titles[pair[1]]}: behind {', '.join(ahead)}")
    return sentences


def front_figure(name: str, lines: Sequence[Line], columns: Sequence[Measure]) -> str:
    """A panel for each pair of measures, with the rows' numbers as points and the front as a line; an <svg>."""
    pairs = list(combinations(columns, 2))
    width = 3
    height = -(-len(pairs) // width)
    shown = [(number, line) for number, line in enumerate(lines) if not line.error and line.method != BASE]
    with matplotlib.rc_context(figures.STYLE | {"svg.hashsalt": name, "ytick.color": figures.FAINT}):
        figure = Figure(figsize=(PANEL * width, PANEL * height), layout="constrained")
        for axes, pair in zip(figure.subplots(height, width, squeeze=False).flat, pairs):
            points = {
                number: tuple(line.means[column.key] for column in pair)
                for number, line in shown
                if all(line.means[column.key] is not None for column in pair)
            }
            front = sorted(
                point for point in points.values() if not any(is_ahead(other, point) for other in points.values())
            )
            axes.plot(*zip(*front), color=figures.PALETTE[0], linewidth=1, zorder=1) if front else None
            for number, point in points.items():
                color = figures.PALETTE[0] if point in front else figures.TEXT
                axes.annotate(str(number), point, color=color, ha="center", va="center", fontsize=8, zorder=2)
            axes.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
            axes.set_xlabel(pair[0].title, fontsize=8)
            axes.set_ylabel(pair[1].title, fontsize=8)
            axes.set_xticks([0, 0.5, 1])
            axes.set_yticks([0, 0.5, 1])
            axes.grid(linewidth=0.5)
            for spine in axes.spines.values():
                spine.set_visible(False)
        for axes in list(figure.axes)[len(pairs) :]:
            axes.set_visible(False)
        return figures.svg(figure, f"fronts-{name}", f"Pareto fronts of {len(pairs)} pairs of measures")


def _markdown(content: dict[str, Any]) -> str:
    lines = [f"# {content['title']}", ""]
    lines.append(
        f"`mm4ke study {content['study'].file}`, {content['date']}, {content['machine']}; "
        + ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    )
    for section in content["sections"]:
        lines += ["", f"## {section['name']}: {section['records']} facts of {section['file']}", ""]
        width = len(section["header"])
        rows = [row + [""] * (width - len(row)) for row in section["table"]]
        lines += markdown_table(section["header"], rows)
        lines += ["", f"Fronts: on how many of the {section['pairs']} pairs of measures no other row is better."]
        if section["behind"]:
            lines += ["", f"{section['against']} is not on the front of", ""]
            lines += [f"- {sentence}" for sentence in section["behind"]]
        if section["differences"]:
            lines += ["", f"{section['against']} minus each other row, paired, with 95 % intervals (▲ ▼: clear):", ""]
            lines += markdown_table(section["differences_header"], section["differences"])
        if section["raw_table"]:
            lines += ["", "Asked in raw prompts:", "", *markdown_table(section["raw_header"], section["raw_table"])]
    lines += ["", "## Commands", ""]
    for name, method, commands in content["commands"]:
        lines += [f"{name}, {method}:", "", *(f"    {command}" for command in commands), ""]
    return "\n".join(lines).rstrip() + "\n"
