"""report.html, which needs nothing beside itself, and report.md.

What models, files and users wrote is untrusted: jinja2 escapes it in HTML, `markdown` in Markdown.
"""

import html
import re
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import jinja2

from .. import __version__
from ..storage.atomic import locked_folder, refused_in_one_line, replace_text
from . import figures
from .runs import Column, read_columns
from .statistics import Difference
from .summary import (
    Flips,
    Row,
    cell,
    check_same_data,
    difference,
    flips,
    pairs_of,
    rows_of,
    subject_of,
    task_title,
    warnings_of,
)
from .verdict import interval, percent, signed, verdict

EXAMPLES = 4  # shown of each task and direction
PROMPT_LENGTH, ANSWER_LENGTH = 600, 300
RADAR_COLUMNS = 8  # more polygons than this hide each other


def report(runs: list[str], output: Path) -> tuple[list[Path], list[str]]:
    """Write report.html and report.md of the runs to the folder `output`, which is made if missing.

    runs: "FOLDER" or "NAME=FOLDER" (see `runs.read_columns`)

    Returns the written files and the warnings that are in them. Raises MM4KEError, before anything is written, for
    what can't be read or compared.
    """
    columns = read_columns(runs)
    check_same_data(columns)
    content = contents(columns)
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, ""),
        autoescape=lambda name: name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"signed": signed, "cell": markdown, "plain": plain}
    texts = {
        output / name: templates.get_template(f"{name}.j2").render(content) for name in ("report.html", "report.md")
    }
    with refused_in_one_line(output), locked_folder(output):
        for file, text in texts.items():
            replace_text(file, text.rstrip() + "\n")
    return list(texts), content["warnings"]


def contents(columns: list[Column]) -> dict[str, Any]:
    """What both templates show."""
    rows = rows_of(columns)
    subject = subject_of(columns)
    pairs = pairs_of(columns)
    base = columns[0] if subject else None
    others = [before for before, after in pairs if after is subject and before is not base]
    return {
        "title": f"{subject.name} against {base.name}" if subject else columns[0].name,
        "version": __version__,
        "columns": columns,
        "base": base,
        "answers": verdict(rows, base, subject, others) if subject else [],
        "warnings": warnings_of(columns),
        "sections": _sections(rows, columns, base),
        "pairs": [entry for pair in pairs if (entry := _pair(rows, *pair))],
        "radar": _radar(rows, columns, subject or columns[0]),
        "differences": _differences(rows, columns, base) if base else None,
        "examples": [entry for pair in pairs if pair[0] is base and (entry := _examples(rows, *pair))],
        "shown": EXAMPLES,
    }


def _sections(rows: list[Row], columns: list[Column], base: Column | None) -> list[dict[str, Any]]:
    """The score table: for each section its rows, each with one cell for each column."""
    sections: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cells = [cell(row, column, base) for column in columns]
        counts = [entry for entry in cells if entry and entry.records]
        records = _count(sorted({entry.records for entry in counts}))
        questions = _count(sorted({entry.questions for entry in counts}))
        count = records if records == questions or row.is_general else f"{records} ({questions})"
        sections.setdefault(row.section, []).append({"row": row, "count": count, "cells": cells})
    return [{"title": title, "rows": entries} for title, entries in sections.items()]


def _count(numbers: list[int]) -> str:
    return f"{numbers[0]}–{numbers[-1]}" if len(numbers) > 1 else str(numbers[0]) if numbers else "–"


def _pair(rows: list[Row], before: Column, after: Column) -> dict[str, Any] | None:
    """The table of differences of two columns; None where they have no question in common."""
    found = [(row, change) for row in rows if row.axis is None and (change := difference(row, before, after))]
    if not found:
        return None
    lines = [
        {
            "section": row.section,
            "task": task_title(row.task),
            "title": row.title,
            "measure": row.measure_title,
            "is_main": row.is_main,
            "change": change,
            "interval": interval(change),
            "p": _p(change),
            "detectable": "" if change.detectable is None else f"{change.detectable:.3f}",
            "finding": _finding(change),
        }
        for row, change in found
    ]
    sections = [(title, list(entries)) for title, entries in groupby(lines, key=itemgetter("section"))]
    return {"before": before.name, "after": after.name, "sections": sections}


def _p(change: Difference) -> str:
    if change.p is None:
        return ""
    return "< 0.001" if change.p < 0.001 else f"{change.p:.3f}"


def _finding(change: Difference) -> str:
    if change.is_clear:
        return "higher" if change.mean > 0 else "lower"
    if change.records > 1 and change.low is None:
        return f"all the same; {percent(change.hidden)} may change unseen"
    return "not shown"


def _label(row: Row, rows: list[Row]) -> str:
    """A row's name in a figure, with its data and its prompt format where only these tell it from another row."""
    same = [other.task for other in rows if other.title == row.title]
    parts = [row.task.data] if len({task.data for task in same}) > 1 else []
    parts += [row.task.prompts.split()[0]] if len({task.prompts for task in same}) > 1 else []
    return f"{row.title} ({', '.join(parts)})" if parts else row.title


def _radar(rows: list[Row], columns: list[Column], subject: Column) -> str | None:
    """The radar of what the subject was measured in, with the columns that have at least half of it."""
    main = [row for row in rows if row.is_main and cell(row, subject, None)]
    cells = {column.name: [cell(row, column, None) for row in main] for column in columns}
    values = {name: [found.value if found else None for found in of] for name, of in cells.items()}
    shown = [name for name in values if values[name].count(None) * 2 <= len(main)][:RADAR_COLUMNS]
    looks = {column.name: number for number, column in enumerate(columns)}
    return figures.radar([_label(row, main) for row in main], {name: (looks[name], values[name]) for name in shown})


def _differences(rows: list[Row], columns: list[Column], base: Column) -> str | None:
    """The plot of the main measures; fluency has another scale and stays in the table."""
    main = [row for row in rows if row.is_main and row.is_share]
    panels: dict[str, dict[str, dict[str, figures.Point]]] = {"KnowEdit": {}, "General ability": {}}
    for row in main:
        changes = {column.name: difference(row, base, column) for column in columns if column is not base}
        points = {name: figures.Point(it.mean, it.low, it.high) for name, it in changes.items() if it}
        if points:
            panels["General ability" if row.is_general else "KnowEdit"][_label(row, main)] = points
    return figures.differences(panels, [column.name for column in columns])


def _examples(rows: list[Row], before: Column, after: Column) -> dict[str, Any] | None:
    """The answers that changed from the base to another column, by task; None where they have nothing in common."""
    tasks = [_task_examples(entry) for entry in flips(rows, before, after)]
    return {"before": before.name, "after": after.name, "tasks": tasks} if tasks else None


def _task_examples(entry: Flips) -> dict[str, Any]:
    kinds = {"wrong → right": entry.gained, "right → wrong": entry.lost, "changed": entry.changed}
    return {
        "title": task_title(entry.task),
        "place": Row(entry.task, "").section,
        "questions": entry.questions,
        "counts": ", ".join(f"{len(found)} {kind}" for kind, found in kinds.items() if found) or "none changed",
        "kinds": [
            {
                "kind": kind,
                "total": len(found),
                "flips": [
                    {
                        "prompt": shortened(flip.item.prompt, PROMPT_LENGTH, keep_end=True),
                        "target": shortened(flip.item.target, ANSWER_LENGTH),
                        "before": shortened(flip.before, ANSWER_LENGTH),
                        "after": shortened(flip.after, ANSWER_LENGTH),
                    }
                    for flip in found[:EXAMPLES]
                ],
            }
            for kind, found in kinds.items()
            if found
        ],
    }


# ---- text from elsewhere ----


def plain(text: str) -> str:
    """Text that can be written as UTF-8 and shown: without control characters and halves of surrogate pairs."""
    text = str(text).encode("utf-8", "replace").decode()
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text.replace("\r\n", "\n"))


def shortened(text: str, length: int, keep_end: bool = False) -> str:
    """The beginning or the end of a text: a prompt's question comes after its examples."""
    text = plain(text).strip()
    if len(text) <= length:
        return text
    return f"… {text[-length:].lstrip()}" if keep_end else f"{text[:length].rstrip()} …"


def markdown(text: str) -> str:
    """A text as one cell of a Markdown table, without any markup of its own."""
    text = html.escape(" ".join(plain(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", text)
