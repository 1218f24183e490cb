"""Facts to edit into a model, read from the files that knowledge editing and its users have.

Which format a file has is seen from its content, not from its name. The fields of `Record` come from these keys:

    Record            KnowEdit, JSONL, CSV   WikiBio    CounterFact (ROME's original)
    subject           subject                concept    requested_rewrite.subject
    prompt            prompt                 text       requested_rewrite.prompt, with the subject for {}
    target_new        target_new             labels     requested_rewrite.target_new.str
    ground_truth      ground_truth           -          requested_rewrite.target_true.str
    rephrase_prompt   rephrase_prompt        -          paraphrase_prompts[0]
    portability       portability            -          -
    locality          locality               locality   neighborhood_prompts, answered by ground_truth

The first column serves KnowEdit's ZsRE, wiki_recent and wiki_counterfact, and CounterFact in EasyEdit's flat form.
The latter's `locality_prompt` and `locality_ground_truth` become one locality probe with the axis "neighborhood".
CSV and JSONL files may use any of its keys; `prompt` and `target_new` are the ones they need. A CSV file has a
header and is separated by commas, semicolons or tabs; an empty cell is an absent key.

All text is stripped of surrounding white space. Other keys (`cond`, `case_id`, ...) are ignored.
"""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import MM4KEError

# Where WikiBio's keys differ from those of the other KnowEdit files.
WIKIBIO_KEYS = {"prompt": "text", "target_new": "labels", "subject": "concept"}

# What EasyEdit and ROME call the locality probes of CounterFact.
NEIGHBORHOOD = "neighborhood"


@dataclass(frozen=True)
class Probe:
    """A question that is asked before and after an edit.

    answers: the acceptable ones, at least one; the first is the main one, which EasyEdit scores
    """

    prompt: str
    answers: list[str]


@dataclass(frozen=True)
class Record:
    """One fact, and the probes that measure what editing it did. The probes are keyed by KnowEdit's axes.

    subject:         what the fact is about; None where the file does not say
    prompt:          the question, exactly as it is trained
    target_new:      the answer that the model shall learn
    ground_truth:    the answers from before the edit; may be empty
    rephrase_prompt: the same question in other words; only ZsRE and CounterFact have it
    portability:     axis ("Reasoning", "Subject_Aliasing", "Logical_Generalization") -> questions whose answer
                     follows from the fact
    locality:        axis ("Relation_Specificity", "Forgetfulness", "neighborhood") -> questions whose answer must
                     stay what it was
    source, index:   the file, and the record's place in it counted from 0
    line:            the line it starts on in a JSONL or CSV file, counted from 1; None in a JSON list
    """

    subject: str | None
    prompt: str
    target_new: str
    ground_truth: list[str]
    rephrase_prompt: str | None
    portability: dict[str, list[Probe]]
    locality: dict[str, list[Probe]]
    source: Path
    index: int
    line: int | None = None

    @property
    def place(self) -> str:
        """The record's place as messages name it, such as "facts.json: record 3 (0-based)"."""
        return _place(self.source, self.index, self.line)


def read_records(path: Path, limit: int | None = None) -> list[Record]:
    """All records of a file, or the first `limit` of them, in the file's order.

    A `target_new` that is a list gives its first entry. Lists of lists of aliases are flattened. Probes without
    an answer, which KnowEdit's wiki files contain, are left out, as EasyEdit does.

    Raises MM4KEError, naming file, record and key: the file cannot be read, is not UTF-8, neither JSON, JSONL nor
    CSV, or has no records; a record has no prompt or answer, or a value of a wrong type.
    """
    path = Path(path)
    text = _read_text(path)
    rows = _json_rows(path, text) if _is_json(path, text) else _csv_rows(path, text)
    records = [_record(raw, path, index, line) for index, (line, raw) in enumerate(islice(rows, limit))]
    if not records:
        raise MM4KEError(f"{path}: no records; give at least one with prompt and target_new")
    return records


def _place(source: Path, index: int, line: int | None) -> str:
    return f"{source}: record {index} (0-based{'' if line is None else f', line {line}'})"


# ---- from the file to raw records ----


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
    if len(values) > 1 or (isinstance(value, dict) and value.keys() & {"prompt", "text", "requested_rewrite"}):
        yield from values
    elif isinstance(value, list):
        yield from ((None, raw) for raw in value)
    else:
        found = f"one object with the keys {', '.join(value)}" if isinstance(value, dict) else _described(value)
        raise MM4KEError(
            f"{path}: line {line}: {found:.200}; expected records with prompt and target_new, "
            "in one list or as one object a line"
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
        columns = next([name.strip() for name in row] for row in rows if row)
        missing = [name for name in ("prompt", "target_new") if name not in columns]
        if missing or len(set(columns)) < len(columns):
            problem = f"no column {' and '.join(missing)}" if missing else "a column appears twice"
            raise MM4KEError(
                f"{path}: line {rows.line_num}: {problem}; a CSV file needs a header with prompt and target_new, "
                f"found: {', '.join(columns)[:200]}"
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


# ---- from a raw record to a Record ----


def _record(raw: Any, path: Path, index: int, line: int | None) -> Record:
    place = _place(path, index, line)
    if not isinstance(raw, dict):
        raise MM4KEError(f"{place}: {_described(raw)}; give an object with prompt and target_new")
    if "requested_rewrite" in raw:
        fields = _rome_fields(raw, place)
    else:
        is_wikibio = "prompt" not in raw and ("text" in raw or "labels" in raw)
        fields = _flat_fields(raw, WIKIBIO_KEYS if is_wikibio else {}, place)
    return Record(**fields, source=path, index=index, line=line)


def _flat_fields(raw: dict, keys: dict[str, str], place: str) -> dict[str, Any]:
    prompt, target_new, subject = (keys.get(name, name) for name in ("prompt", "target_new", "subject"))
    targets = raw.get(target_new)
    if isinstance(targets, list):
        targets = (_answers(targets, target_new, place) or [None])[0]
    locality = _probes(raw.get("locality"), "locality", place)
    if raw.get("locality_prompt") is not None:
        answers = _answers(raw.get("locality_ground_truth"), "locality_ground_truth", place)
        if not answers:
            raise MM4KEError(f"{place}: locality_ground_truth: missing; give the answer to locality_prompt")
        locality[NEIGHBORHOOD] = [Probe(_text(raw["locality_prompt"], "locality_prompt", place), answers)]
    return {
        "subject": _optional_text(raw.get(subject), subject, place),
        "prompt": _text(raw.get(prompt), prompt, place),
        "target_new": _text(targets, target_new, place),
        "ground_truth": _answers(raw.get("ground_truth"), "ground_truth", place),
        "rephrase_prompt": _optional_text(raw.get("rephrase_prompt"), "rephrase_prompt", place),
        "portability": _probes(raw.get("portability"), "portability", place),
        "locality": locality,
    }


def _rome_fields(raw: dict, place: str) -> dict[str, Any]:
    rewrite = _object(raw["requested_rewrite"], "requested_rewrite", place)
    subject = _text(rewrite.get("subject"), "requested_rewrite.subject", place)
    template = _text(rewrite.get("prompt"), "requested_rewrite.prompt", place)
    new, true = (_rome_target(rewrite, key, place) for key in ("target_new", "target_true"))
    paraphrases = _answers(raw.get("paraphrase_prompts"), "paraphrase_prompts", place)
    neighbours = _answers(raw.get("neighborhood_prompts"), "neighborhood_prompts", place)
    return {
        "subject": subject,
        "prompt": template.replace("{}", subject),
        "target_new": new,
        "ground_truth": [true],
        "rephrase_prompt": paraphrases[0] if paraphrases else None,
        "portability": {},
        "locality": {NEIGHBORHOOD: [Probe(prompt, [true]) for prompt in neighbours]} if neighbours else {},
    }


def _rome_target(rewrite: dict, key: str, place: str) -> str:
    key_path = f"requested_rewrite.{key}"
    return _text(_object(rewrite.get(key), key_path, place).get("str"), f"{key_path}.str", place)


def _probes(value: Any, key: str, place: str) -> dict[str, list[Probe]]:
    """KnowEdit's probes: axis -> list of {prompt, ground_truth}, where axis, list and all of it may be null."""
    probes = {}
    for axis, entries in ({} if value is None else _object(value, key, place)).items():
        if isinstance(entries, dict):
            entries = [entries]
        if not isinstance(entries, list | None):
            raise MM4KEError(f"{place}: {key}.{axis}: {_described(entries)}; give a list of prompt and ground_truth")
        found = []
        for number, entry in enumerate(entries or []):
            found += _probes_of_entry(entry, f"{key}.{axis}[{number}]", place)
        if found:
            probes[axis] = found
    return probes


def _probes_of_entry(entry: Any, key: str, place: str) -> Iterator[Probe]:
    """One probe, or several where `prompt` and `ground_truth` are lists side by side, as EasyEdit's editors take."""
    entry = _object(entry, key, place)
    prompts, truths = entry.get("prompt"), entry.get("ground_truth")
    if not isinstance(prompts, list):
        prompts, truths = [prompts], [truths]
    elif not isinstance(truths, list) or len(truths) != len(prompts):
        raise MM4KEError(f"{place}: {key}.ground_truth: give a list with one answer for each of the prompts")
    for prompt, truth in zip(prompts, truths):
        if answers := _answers(truth, f"{key}.ground_truth", place):
            yield Probe(_text(prompt, f"{key}.prompt", place), answers)


def _answers(value: Any, key: str, place: str) -> list[str]:
    """The texts in a text, or in lists nested to any depth, without the empty ones."""
    if isinstance(value, list):
        return [answer for entry in value for answer in _answers(entry, key, place)]
    if value is None or value == "" or (isinstance(value, str) and value.isspace()):
        return []
    return [_text(value, key, place)]


def _optional_text(value: Any, key: str, place: str) -> str | None:
    return None if value is None or value == "" else _text(value, key, place)


def _text(value: Any, key: str, place: str) -> str:
    if value is None:
        raise MM4KEError(f"{place}: {key}: missing; give it as a string")
    if not isinstance(value, str):
        raise MM4KEError(f"{place}: {key}: {_described(value)}; give it as a string")
    if not (text := value.strip()):
        raise MM4KEError(f"{place}: {key}: empty; give it as a string")
    if any("\ud800" <= char <= "\udfff" for char in text):  # JSON can spell half a character, no tokenizer reads it
        raise MM4KEError(f"{place}: {key}: {text!a:.80} has half of a surrogate pair; give valid Unicode")
    return text


def _object(value: Any, key: str, place: str) -> dict:
    if not isinstance(value, dict):
        found = "missing" if value is None else _described(value)
        raise MM4KEError(f"{place}: {key}: {found}; give an object")
    return value


def _described(value: Any) -> str:
    """A value as a message shows it: short, in JSON's words."""
    kind = {list: "a list", dict: "an object", str: "a string", bool: "a truth value"}.get(type(value), "a number")
    return "null" if value is None else f"{json.dumps(value)[:60]} is {kind}"
