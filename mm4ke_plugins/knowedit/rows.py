"""From a file to its rows: JSON, JSONL or CSV, told apart by the content. What the rows mean is in `formats.py`."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import MM4KEError
from .formats import FORMATS, described, is_known, known_name, missing, unread


def rows(path: Path) -> Iterator[tuple[int | None, Any]]:
    """(line, row) of a file: the line that the row starts on, counted from 1, or None in a JSON list.

    Raises MM4KEError, naming the file and the line: it can't be read, is not UTF-8, or neither JSON, JSONL nor CSV.
    """
    text = _read_text(path)
    return _json_rows(path, text) if _is_json(path, text) else _csv_rows(path, text)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MM4KEError(f"{path}: {error.strerror}; give a KnowEdit, CounterFact, JSONL or CSV file") from None
    try:
        text = data.decode("utf-8-sig")  # spreadsheet programs put a byte order mark before a CSV file
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MM4KEError(
            f"{path}: line {line}: byte {data[error.start]:#04x} is not UTF-8; save it as UTF-8"
        ) from None
    if not text.strip():
        raise MM4KEError(f"{path}: the file is empty; give at least one record with prompt and target_new")
    return text


def _is_json(path: Path, text: str) -> bool:
    """Records in JSON start with a bracket or a brace, which no header of a CSV file does."""
    return text.lstrip()[0] in "[{" or path.suffix in (".json", ".jsonl")


def _json_rows(path: Path, text: str) -> Iterator[tuple[int | None, Any]]:
    """(line, record) of a JSON list, or of JSON objects one after the other, which is what JSONL is."""
    values = list(_json_values(path, text))
    line, value = values[0]
    if len(values) > 1 or (isinstance(value, dict) and is_known(value)):
        yield from values
    elif isinstance(value, list):
        yield from ((None, raw) for raw in value)
    else:
        found = described(value)
        if isinstance(value, dict):
            found = f"one object with the keys {', '.join(value)[:80]}{unread(value)}"
        raise MM4KEError(
            f"{path}: line {line}: {found}; expected records in one list or as one object a line, of {FORMATS}"
        )


def _json_values(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    decoder = json.JSONDecoder()
    at, line, counted = 0, 1, 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        line += text.count("\n", counted, at)
        counted = at
        try:
            value, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise MM4KEError(f"{path}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise MM4KEError(f"{path}: line {line}: not readable as JSON: {error}") from None
        yield line, value


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    header = text.lstrip().partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = next([known_name(name.strip()) for name in row] for row in rows if row)
        twice = sorted({name for name in columns if columns.count(name) > 1})
        lacks = missing(columns)
        if twice or lacks:
            problem = f"a column appears twice, {twice[0]}" if twice else f"no column {' and '.join(lacks)}"
            raise MM4KEError(
                f"{path}: line {rows.line_num}: {problem}; found: {', '.join(columns)[:80]}; give a header of {FORMATS}"
            )
        last_line = rows.line_num
        for cells in rows:
            line, last_line = last_line + 1, rows.line_num
            if len(cells) > len(columns):
                raise MM4KEError(
                    f"{path}: line {line}: {len(cells)} cells under {len(columns)} columns; "
                    f"put text that contains {delimiter!r} in double quotes"
                )
            if any(cell.strip() for cell in cells):
                yield line, {name: cell for name, cell in zip(columns, cells) if cell.strip()}
    except csv.Error as error:
        raise MM4KEError(f"{path}: line {rows.line_num}: not CSV: {error}") from None
