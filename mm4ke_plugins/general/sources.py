"""Raw benchmark files: which benchmark a file is, and its records in the form of the hub's data sets.

lm-eval's tasks read the columns of the data sets on the hub, so each converter gives those columns, as far as the
task uses them. A file is recognised by what it holds. Its split is in its name (`train`, `dev`, `val`, `test`, ...);
where the name has none it is the split that lm-eval scores.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import MM4KEError, first_line
from .logiqa import parse_blocks

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet", ".txt")


class UnknownFile(MM4KEError):
    """Not a file that lm-eval's tasks could use. In a folder it is left out, given by name it is an error."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark as lm-eval knows it.

    task    what `lm_eval run --tasks` calls it
    splits  the splits that it uses, each with the key of lm-eval's YAML that names it; the first one is scored
    """

    task: str
    splits: dict[str, str]


TRAINED = {"validation": "validation_split", "train": "training_split"}
BENCHMARKS = {
    "ceval": Benchmark("ceval-valid", {"val": "validation_split", "dev": "fewshot_split"}),
    "coqa": Benchmark("coqa", TRAINED),
    "drop": Benchmark("drop", TRAINED),
    "squadv2": Benchmark("mm4ke_squadv2", TRAINED),
    "logiqa": Benchmark("mm4ke_logiqa", {"test": "test_split"} | TRAINED),
    "mmlu_pro": Benchmark("mmlu_pro", {"test": "test_split", "validation": "fewshot_split"}),
    "super_glue": Benchmark("super-glue-lm-eval-v1", TRAINED),
}
SPLIT_NAMES = {
    "train": "train",
    "dev": "validation",
    "eval": "validation",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class Table:
    """The records of one file. `config` is the part of the benchmark: a subject of C-Eval, a task of SuperGLUE."""

    benchmark: str
    config: str
    split: str
    records: list[dict]
    source: Path


def read_source(path: Path) -> Table:
    """Read one raw file.

    Raises UnknownFile where it is no benchmark's, and MM4KEError, naming file, line or record and key, where
    it is damaged.
    """
    if path.suffix not in SUFFIXES:
        raise UnknownFile(f"{path}: not a raw benchmark file; those end in {', '.join(SUFFIXES)}")
    try:
        if not path.stat().st_size:
            raise MM4KEError(f"{path}: empty; give the whole file")
        return READERS[path.suffix](path)
    except OSError as error:
        raise MM4KEError(f"{path}: {error.strerror or first_line(error)}; give a file that can be read") from error
    except csv.Error as error:
        raise MM4KEError(f"{path}: not CSV ({first_line(error)}); is the file complete?") from error
    except UnicodeDecodeError as error:
        raise MM4KEError(f"{path}: byte {error.start}: not UTF-8; save the file as UTF-8") from error


def _table(path: Path, benchmark: str, config: str, records: list[dict], split: str | None = None) -> Table:
    known = BENCHMARKS[benchmark].splits
    if split is None:
        words = re.findall("[a-z]+", path.stem.lower())
        split = next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), next(iter(known)))
    if split not in known:
        raise UnknownFile(f"{path}: {benchmark} {split}: lm-eval does not use this split; it uses {', '.join(known)}")
    if not records:
        raise MM4KEError(f"{path}: no records; give the whole file")
    return Table(benchmark, config, split, records, path)


def _unknown(path: Path) -> UnknownFile:
    names = "C-Eval, CoQA, DROP, SQuAD 2.0, LogiQA, MMLU-Pro, SuperGLUE"
    return UnknownFile(f"{path}: no benchmark's raw file that is known here; known are {names}")


# ---- values


def _found(row: dict, key: str) -> str:
    return repr(row[key])[:60] if key in row else "missing"


def _text(row: dict, key: str, where: str) -> str:
    if not isinstance(row.get(key), str):
        raise MM4KEError(f"{where}: {key}: {_found(row, key)}; give it as a string")
    return row[key]


def _number(row: dict, key: str, where: str) -> int:
    if type(row.get(key)) is not int:
        raise MM4KEError(f"{where}: {key}: {_found(row, key)}; give it as a whole number")
    return row[key]


def _texts(row: dict, key: str, where: str) -> list[str]:
    value = row.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise MM4KEError(f"{where}: {key}: {_found(row, key)}; give it as a list of strings")
    return value


def _objects(row: dict, key: str, where: str) -> list[dict]:
    value = row.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise MM4KEError(f"{where}: {key}: {_found(row, key)}; give it as a list of objects, at least one")
    return value


def _object(row: dict, key: str, where: str) -> dict:
    if not isinstance(row.get(key), dict):
        raise MM4KEError(f"{where}: {key}: {_found(row, key)}; give it as an object")
    return row[key]


def _label(row: dict, names: tuple[str, ...], where: str) -> int:
    """The label's number in the hub's data set, from its name, a JSON boolean or that number itself."""
    value = row.get("label")
    if type(value) is int and 0 <= value < len(names):
        return value
    if str(value).lower() not in names:
        raise MM4KEError(f"{where}: label: {_found(row, 'label')}; give one of {', '.join(names)}")
    return names.index(str(value).lower())


def _letter(row: dict, letters: str, where: str) -> str:
    answer = row.get("answer")
    if not isinstance(answer, str) or len(answer) != 1 or answer not in letters:
        raise MM4KEError(f"{where}: answer: {_found(row, 'answer')}; give a letter from {letters[0]} to {letters[-1]}")
    return answer


# ---- records of line-wise files: each converter gives the hub's rows of one raw record


def coqa_grouped(row: dict, where: str) -> list[dict]:
    """A story with its turns; of a turn's answers the first is the main one, the others are alternatives."""
    turns = _objects(row, "turns", where)
    questions = [_text(turn, "question", f"{where}: turn {n}") for n, turn in enumerate(turns, 1)]
    answers = [_texts(turn, "answers", f"{where}: turn {n}") for n, turn in enumerate(turns, 1)]
    for n, given in enumerate(answers, 1):
        if not given:
            raise MM4KEError(f"{where}: turn {n}: answers: empty; give at least one answer")
    return [_coqa_row(row, questions, answers, where)]


def _coqa_row(row: dict, questions: list[str], answers: list[list[str]], where: str) -> dict:
    # CoQA has three alternatives. Where one is missing the main answer stands in: lm-eval drops what occurs twice.
    columns = [[given[n] if n < len(given) else given[0] for given in answers] for n in range(4)]
    return {
        "id": _text(row, "id", where),
        "source": _text(row, "source", where),
        "story": _text(row, "story", where),
        "questions": {"input_text": questions},
        "answers": {"input_text": columns[0]},
        "additional_answers": {str(n): {"input_text": column} for n, column in enumerate(columns[1:])},
    }


def drop_doc(row: dict, where: str) -> list[dict]:
    """A question with `answers`, a list of equally good answers, each of them a list of spans.

    lm-eval compares spans, numbers and dates as such lists of strings, so they may all be given as spans.
    """
    answers = row.get("answers")
    if not isinstance(answers, list) or not answers:
        raise MM4KEError(f"{where}: answers: {_found(row, 'answers')}; give a list of answers, each a list of strings")
    spans = [_texts({"answers": answer}, "answers", where) for answer in answers]
    candidates = [{"number": "", "date": NO_DATE, "spans": given} for given in spans]
    return [_drop_row(row, _text(row, "passage", where), candidates, where)]


NO_DATE = {"day": "", "month": "", "year": ""}


def _drop_row(row: dict, passage: str, candidates: list[dict], where: str) -> dict:
    first, *validated = candidates
    return {
        "query_id": _text(row, "query_id", where),
        "passage": passage,
        "question": _text(row, "question", where),
        "answer": first,
        "validated_answers": {key: [answer[key] for answer in validated] for key in ("number", "date", "spans")},
    }


def mmlu_pro(row: dict, where: str) -> list[dict]:
    options = _texts(row, "options", where)
    if not 2 <= len(options) <= 10:
        raise MM4KEError(f"{where}: options: {len(options)} of them; give 2 to 10")
    answer = _letter(row, "ABCDEFGHIJ"[: len(options)], where)
    index = row.get("answer_index", ord(answer) - ord("A"))
    if index != ord(answer) - ord("A"):
        raise MM4KEError(f"{where}: answer_index: {index!r} does not mean {answer}; give {ord(answer) - ord('A')}")
    return [
        {
            "question_id": _number(row, "question_id", where),
            "question": _text(row, "question", where),
            "options": options,
            "answer": answer,
            "answer_index": index,
            "cot_content": _text(row, "cot_content", where) if "cot_content" in row else "",
            "category": _text(row, "category", where),
        }
    ]


FALSE_TRUE = ("false", "true")


def boolq(row: dict, where: str) -> list[dict]:
    return [_columns(row, where, "question", "passage", label=_label(row, FALSE_TRUE, where))]


def cb(row: dict, where: str) -> list[dict]:
    label = _label(row, ("entailment", "contradiction", "neutral"), where)
    return [_columns(row, where, "premise", "hypothesis", label=label)]


def rte(row: dict, where: str) -> list[dict]:
    label = _label(row, ("entailment", "not_entailment"), where)
    return [_columns(row, where, "premise", "hypothesis", label=label)]


def copa(row: dict, where: str) -> list[dict]:
    if row.get("question") not in ("cause", "effect"):
        raise MM4KEError(f"{where}: question: {_found(row, 'question')}; give cause or effect")
    label = _label(row, ("0", "1"), where)
    return [_columns(row, where, "premise", "choice1", "choice2", "question", label=label)]


def multirc(row: dict, where: str) -> list[dict]:
    """A row for every answer of every question of the passage."""
    passage, rows = _object(row, "passage", where), []
    paragraph = _text(passage, "text", f"{where}: passage")
    for n, question in enumerate(_objects(passage, "questions", f"{where}: passage"), 1):
        place = f"{where}: question {n}"
        for answer in _objects(question, "answers", place):
            rows.append(
                {
                    "paragraph": paragraph,
                    "question": _text(question, "question", place),
                    "answer": _text(answer, "text", f"{place}: answers"),
                    "label": _label(answer, FALSE_TRUE, f"{place}: answers"),
                }
            )
    return rows


def wsc(row: dict, where: str) -> list[dict]:
    """`wsc.fixed` of the hub: a span that is not in the text as it stands is written as the text has it."""
    text, target = _text(row, "text", where), _object(row, "target", where)
    result = {"text": text}
    for name in ("span1", "span2"):
        span = _text(target, f"{name}_text", f"{where}: target")
        index = _number(target, f"{name}_index", f"{where}: target")
        words = text.split()
        if not 0 <= index < len(words):
            raise MM4KEError(
                f"{where}: target: {name}_index: {index}; give the number of a word, 0 to {len(words) - 1}"
            )
        if span not in text:
            first = span[0].lower() if words[index][0].islower() else span[0].upper()
            span = (first + span[1:]).rstrip(".").replace("\n", " ")
        result |= {f"{name}_text": span, f"{name}_index": index}
    return [result | {"label": _label(row, FALSE_TRUE, where)}]


def wic(row: dict, where: str) -> list[dict]:
    ends = {key: _number(row, key, where) for key in ("start1", "start2", "end1", "end2")}
    return [_columns(row, where, "word", "sentence1", "sentence2", label=_label(row, FALSE_TRUE, where)) | ends]


def _columns(row: dict, where: str, *keys: str, label: int) -> dict:
    return {key: _text(row, key, where) for key in keys} | {"label": label}


@dataclass(frozen=True)
class RecordFormat:
    """A line-wise format: its first record has these keys. `config` is the data set's name on the hub."""

    keys: frozenset[str]
    benchmark: str
    config: str
    convert: Callable[[dict, str], list[dict]]


NLI_KEYS = frozenset({"premise", "hypothesis"})
FORMATS = (
    RecordFormat(frozenset({"story", "turns"}), "coqa", "default", coqa_grouped),
    RecordFormat(frozenset({"query_id", "passage"}), "drop", "default", drop_doc),
    RecordFormat(frozenset({"question_id", "options"}), "mmlu_pro", "default", mmlu_pro),
    RecordFormat(frozenset({"choice1", "choice2"}), "super_glue", "copa", copa),
    RecordFormat(frozenset({"word", "sentence1", "sentence2"}), "super_glue", "wic", wic),
    RecordFormat(frozenset({"text", "target"}), "super_glue", "wsc.fixed", wsc),
    RecordFormat(frozenset({"passage", "question"}), "super_glue", "boolq", boolq),
)
CB = RecordFormat(NLI_KEYS, "super_glue", "cb", cb)
RTE = RecordFormat(NLI_KEYS, "super_glue", "rte", rte)
MULTIRC = RecordFormat(frozenset({"passage"}), "super_glue", "multirc", multirc)


def _format_of(path: Path, rows: list[tuple[str, dict]]) -> RecordFormat:
    first = rows[0][1]
    if isinstance(passage := first.get("passage"), dict):
        if "questions" in passage:
            return MULTIRC
        raise UnknownFile(f"{path}: ReCoRD, as it seems: not prepared here; lm-eval reads it from the hub")
    if first.keys() >= NLI_KEYS:
        return _cb_or_rte(path, rows)
    if found := next((known for known in FORMATS if first.keys() >= known.keys), None):
        return found
    raise _unknown(path)


def _cb_or_rte(path: Path, rows: list[tuple[str, dict]]) -> RecordFormat:
    """The two have the same keys: the file's or folder's name tells them apart, or else their labels do."""
    words = re.findall("[a-z]+", f"{path.parent.name} {path.stem}".lower())
    labels = {str(row.get("label")) for _, row in rows}
    if "cb" in words or ("rte" not in words and labels & {"contradiction", "neutral"}):
        return CB
    if "rte" in words or "not_entailment" in labels:
        return RTE
    raise UnknownFile(f"{path}: CB or RTE: neither name nor labels tell; name it CB-val.jsonl or RTE-val.jsonl")


def _records(path: Path, rows: list[tuple[str, dict]]) -> Table:
    """The table of line-wise records, each with the words that say where it is."""
    if not rows:
        raise MM4KEError(f"{path}: no records; give the whole file")
    found = _format_of(path, rows)
    _table(path, found.benchmark, found.config, [{}])  # test files have no labels: leave them out before reading on
    records = [record for where, row in rows for record in found.convert(row, where)]
    return _table(path, found.benchmark, found.config, records)


# ---- files


def _json(text: str, path: Path, line: int = 1):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}: line {line + error.lineno - 1}, column {error.colno}"
        raise MM4KEError(f"{where}: not JSON ({error.msg}); is the file complete?") from error


def _read_jsonl(path: Path) -> Table:
    rows = []
    # Not splitlines(): some texts hold other line separators of Unicode.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            where, row = f"{path}: line {number}", _json(line, path, number)
            if not isinstance(row, dict):
                raise MM4KEError(f"{where}: {line.strip()[:40]!r} is not a record; give a JSON object on each line")
            rows.append((where, row))
            if number == 1:
                _format_of_first(path, row)
    return _records(path, rows)


def _format_of_first(path: Path, row: dict) -> None:
    """Raise UnknownFile by the first record already: what is not ours may be large."""
    if not row.keys() >= NLI_KEYS:
        _format_of(path, [("", row)])


def _read_parquet(path: Path) -> Table:
    """MMLU-Pro, which its authors give in this form."""
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise MM4KEError(f"{path}: not parquet ({first_line(error)}); is the file complete?") from error
    if rows and not rows[0].keys() >= {"question_id", "options"}:
        raise _unknown(path)
    return _records(path, [(f"{path}: record {number}", row) for number, row in enumerate(rows, 1)])


def _read_json(path: Path) -> Table:
    content = _json(path.read_text(encoding="utf-8-sig"), path)
    if isinstance(content, list) and content and all(isinstance(row, dict) for row in content):
        return _records(path, [(f"{path}: record {number}", row) for number, row in enumerate(content, 1)])
    if not isinstance(content, dict):
        raise _unknown(path)
    articles = content.get("data")
    if isinstance(articles, list) and articles and all(isinstance(article, dict) for article in articles):
        if "paragraphs" in articles[0]:
            return _table(path, "squadv2", "default", list(_squad(articles, path)))
        if "story" in articles[0]:
            return _table(
                path, "coqa", "default", [_coqa(row, f"{path}: story {n}") for n, row in enumerate(articles, 1)]
            )
    if content and all(isinstance(value, dict) and "qa_pairs" in value for value in content.values()):
        return _table(path, "drop", "default", list(_drop(content, path)))
    raise _unknown(path)


def _squad(articles: list[dict], path: Path) -> Iterator[dict]:
    """The official SQuAD file: articles > paragraphs > questions."""
    for number, article in enumerate(articles, 1):
        place = f"{path}: article {number}"
        title = _text(article, "title", place)
        for n, paragraph in enumerate(_objects(article, "paragraphs", place), 1):
            context = _text(paragraph, "context", f"{place}: paragraph {n}")
            for question in _objects(paragraph, "qas", f"{place}: paragraph {n}"):
                where = f"{path}: question {_text(question, 'id', f'{place}: paragraph {n}')}"
                if question.get("is_impossible") and question.get("answers") == []:
                    answers = []
                else:
                    answers = _objects(question, "answers", where)
                yield {
                    "id": question["id"],
                    "title": title,
                    "context": context,
                    "question": _text(question, "question", where),
                    "answers": {
                        "text": [_text(answer, "text", f"{where}: answers") for answer in answers],
                        "answer_start": [_number(answer, "answer_start", f"{where}: answers") for answer in answers],
                    },
                }


def _coqa(row: dict, where: str) -> dict:
    """A story of the official CoQA file, with questions, answers and additional_answers apart."""
    questions = [_text(turn, "input_text", f"{where}: questions") for turn in _objects(row, "questions", where)]
    answers = [[_text(turn, "input_text", f"{where}: answers")] for turn in _objects(row, "answers", where)]
    if len(answers) != len(questions):
        raise MM4KEError(f"{where}: answers: {len(answers)} for {len(questions)} questions; give one for each")
    alternatives = _object(row, "additional_answers", where) if "additional_answers" in row else {}
    for key in sorted(alternatives):
        given = _objects(alternatives, key, f"{where}: additional_answers")
        if len(given) != len(questions):
            raise MM4KEError(f"{where}: additional_answers: {key}: {len(given)} answers; give {len(questions)}")
        for turn, answer in zip(answers, given):
            turn.append(_text(answer, "input_text", f"{where}: additional_answers: {key}"))
    return _coqa_row(row, questions, answers, where)


def _drop(passages: dict[str, dict], path: Path) -> Iterator[dict]:
    """The official DROP file: passages by their id, each with its qa_pairs."""
    for name, passage in passages.items():
        text = _text(passage, "passage", f"{path}: {name}")
        for pair in _objects(passage, "qa_pairs", f"{path}: {name}"):
            where = f"{path}: question {_text(pair, 'query_id', f'{path}: {name}')}"
            validated = _objects(pair, "validated_answers", where) if pair.get("validated_answers") else []
            given = [_object(pair, "answer", where), *validated]
            yield _drop_row(pair, text, [_drop_answer(answer, f"{where}: answer") for answer in given], where)


def _drop_answer(answer: dict, where: str) -> dict:
    date = {key: _text(_object(answer, "date", where), key, f"{where}: date") for key in NO_DATE}
    return {"number": _text(answer, "number", where), "date": date, "spans": _texts(answer, "spans", where)}


def _read_ceval(path: Path) -> Table:
    """C-Eval keeps each subject and split in a file of its own, SUBJECT_dev.csv or SUBJECT_val.csv."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        columns = ("question", "A", "B", "C", "D")
        if not set(columns) <= set(reader.fieldnames or ()):
            raise _unknown(path)
        subject, _, split = path.stem.rpartition("_")
        if not subject or split not in ("dev", "val", "test"):
            raise UnknownFile(f"{path}: C-Eval: subject and split unknown; name it SUBJECT_dev.csv or SUBJECT_val.csv")
        _table(path, "ceval", subject, [{}], split)
        records = []
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            record = {key: _text(row, key, where) for key in columns}
            explanation = row.get("explanation") or ""
            records.append(record | {"answer": _letter(row, "ABCD", where), "explanation": explanation})
    return _table(path, "ceval", subject, records, split)


def _read_logiqa(path: Path) -> Table:
    with path.open(encoding="utf-8-sig") as file:
        # Prose begins otherwise, and may be large.
        head = next((line.strip() for line in file if line.strip()), "")
    if len(head) != 1:
        raise _unknown(path)
    return _table(path, "logiqa", "logiqa", parse_blocks(path.read_text(encoding="utf-8-sig"), path))


READERS: dict[str, Callable[[Path], Table]] = {
    ".csv": _read_ceval,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_logiqa,
}
