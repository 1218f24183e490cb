"""Run folders of lm-eval and of `mm4ke easyedit`, read into columns of scored questions.

A column is one model: its answers to every question (`Item`) of every `Task`. Of lm-eval's folders we read
results_*.json and the samples_*.jsonl beside it, as lm_eval/loggers/evaluation_tracker.py (0.4.13) writes them.
A KnowEdit task, or `mm4ke_known_facts`, that ran with `reference=` has the reference's answers beside the model's, and
EasyEdit's methods have those from before the edit: both go to the column of that base model, which is made where there
is none.
"""

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import MM4KEError

RAW, CHAT = "raw prompts", "chat template"

# lm-eval puts this date into the name of a results file and of the samples that belong to it.
RESULTS_NAME = re.compile(r"_(\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(?:\.\d+)?)\.json")
EASYEDIT_KIND, EASYEDIT_VERSION = "mm4ke-easyedit", 1
REFERENCE_PREFIX = "reference_"
AGREEMENTS = ("locality", "kept", "unchanged")  # with the reference, which agrees with itself
KNOWEDIT_KEYS = ("record_id", "metric", "axis", "prompt", "target")

# SQuAD 2.0 scores questions with and without an answer apart, under these prefixes, and in percent.
KINDS_OF_QUESTION = ("HasAns", "NoAns")
PERCENT_TASKS = ("mm4ke_squadv2", "squadv2")  # lm-eval's own has only totals, see _add_totals


@dataclass(frozen=True)
class Task:
    """What is measured, in one prompt format.

    data:    the file that a KnowEdit task asks about, or "known_facts"; "" for a task of general ability
    prompts: RAW or CHAT
    name:    KnowEdit's metric ("edit_success", "portability_free", "fluency", ...), "known_facts", or lm-eval's task
             or group
    """

    data: str
    prompts: str
    name: str


@dataclass
class Item:
    """One question and what one model made of it.

    key:         equal in two runs that asked the same; its first entry names lm-eval's task or the data file
    prompt_hash: SHA-256 of the text that the model read before the answer; "" where only its format is known
    record:      questions of one record are not independent; one cluster of the statistics
    axis:        KnowEdit's group of probes within the record; "" elsewhere
    scores:      by the name of the measure; a question lacks those that don't apply to it
    """

    key: tuple
    prompt_hash: str
    record: str
    axis: str
    prompt: str
    target: str
    answer: str
    scores: dict[str, float]

    def is_asked_like(self, other: "Item") -> bool:
        """Whether two models read the same text, for a question with equal keys."""
        return self.prompt_hash == other.prompt_hash or "" in (self.prompt_hash, other.prompt_hash)


@dataclass
class Column:
    """One model's answers.

    model:    its path or hub id, with what was added to it
    folder:   the run folder, as the user gave it
    items:    the questions of each task by their key, in the order of the run
    totals:   measures of tasks that lm-eval scores only as a whole
    settings: how each of lm-eval's tasks was run, by (its name, prompt format): what must be equal in two runs
    facts:    what was run, for the reader: one dict for each results file that was read
    notes:    what the reader should know about this column's files
    failure:  why an EasyEdit method has no scores
    """

    name: str
    model: str
    folder: str
    items: dict[Task, dict[tuple, Item]] = field(default_factory=lambda: defaultdict(dict))
    totals: dict[Task, dict[str, float]] = field(default_factory=dict)
    settings: dict[tuple[str, str], dict[str, str]] = field(default_factory=dict)
    facts: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failure: str | None = None


def read_columns(runs: list[str]) -> list[Column]:
    """The columns of all runs; the one that the others are compared with comes first.

    runs: "FOLDER" or "NAME=FOLDER". Of several methods in one folder of `mm4ke easyedit`, each is called
          "NAME METHOD"; without a name, METHOD.

    The base is the model that others had as their reference or were edited from; else the column called "base"; else
    the first one.

    Raises MM4KEError: a folder is missing, empty, of neither kind, or damaged; samples were not logged; two columns
    have one name; one folder has results of several models.
    """
    columns: list[Column] = []
    bases: dict[str, Column] = {}
    for run in runs:
        columns += _read_folder(*_named(run), bases)
    edited_from = [_place_base(columns, base) for base in bases.values()]
    for name, count in Counter(column.name for column in columns).items():
        if count > 1:
            folders = " and ".join(column.folder for column in columns if column.name == name)
            raise MM4KEError(f"{folders}: two columns are called {name}; give them names: NAME=FOLDER")
    base = [*edited_from, *(column for column in columns if column.name.lower() == "base"), columns[0]][0]
    columns.remove(base)
    return [base, *columns]


def _named(run: str) -> tuple[str, Path]:
    """The column's name, "" where none was given, and the folder, which may have "=" in its own name."""
    name, equals, folder = run.partition("=")
    if not equals or Path(run).is_dir():
        return "", Path(run)
    if not name.strip() or not folder:
        raise MM4KEError(f"{run}: not a run; give FOLDER or NAME=FOLDER")
    return name.strip(), Path(folder)


def _read_folder(name: str, folder: Path, bases: dict[str, Column]) -> list[Column]:
    makers = "a run folder of lm_eval (its --output_path) or of mm4ke easyedit"
    if not folder.is_dir():
        raise MM4KEError(f"{folder}: no such folder; give {makers}")
    files = [path for path in folder.rglob("*.json") if RESULTS_NAME.search(path.name)]
    if files:
        return [_read_lm_eval(name or folder.resolve().name, folder, files, bases)]
    files = sorted(folder.glob("*.json"))
    if not files:
        found = "no results_*.json and no METHOD.json in it" if any(folder.iterdir()) else "the folder is empty"
        raise MM4KEError(f"{folder}: {found}; give {makers}")
    return [_read_easyedit(name, folder, file, len(files) > 1, bases) for file in files]


def _base_column(bases: dict[str, Column], model: str, folder: Path) -> Column:
    return bases.setdefault(_same_path(model), Column("base", model, str(folder)))


def _place_base(columns: list[Column], base: Column) -> Column:
    """Give what was said about a base model to the column of that model, or make it a column; return that one."""
    own = next((column for column in columns if _same_path(column.model) == _same_path(base.model)), None)
    if own is None:
        if any(column.name == "base" for column in columns):
            base.name = f"base ({base.model})"
        columns.insert(0, base)
        return base
    for task, items in base.items.items():
        for item in items.values():
            _add(own, task, item)
    return own


def _add(column: Column, task: Task, item: Item) -> None:
    """Add a question, or the measures that an equal one lacks."""
    mine = column.items[task].setdefault(item.key, item)
    if mine.is_asked_like(item):
        mine.scores = item.scores | mine.scores


def _same_path(model: str) -> str:
    """A model's path in the spelling that two runs have in common; a hub id stays what it is."""
    return os.path.realpath(model) if os.path.isdir(model) else os.path.normpath(model)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MM4KEError(f"{path}: {error.strerror}; make it readable") from None
    except UnicodeDecodeError:
        raise MM4KEError(f"{path}: not UTF-8; the file is damaged, run it again") from None
    except (ValueError, RecursionError) as error:
        where = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else ""
        raise MM4KEError(f"{path}: {where}not JSON; the file was cut short or damaged, run it again") from None
    return value if isinstance(value, dict) else {}


# ---- lm-eval ----


def _read_lm_eval(name: str, folder: Path, files: list[Path], bases: dict[str, Column]) -> Column:
    column = Column(name, "", str(folder))
    latest: dict[tuple[str, str], tuple[Path, dict[str, Any]]] = {}
    for file in sorted(files, key=_date):
        results = _read_json(file)
        for key in ("results", "configs", "config", "n-samples"):
            if not isinstance(results.get(key), dict):
                raise MM4KEError(f"{file}: no {key} in it; give a results file as lm_eval writes it")
        model, reference = _models(results)
        if column.model and _same_path(column.model) != _same_path(model):
            raise MM4KEError(
                f"{folder}: results of two models, {column.model} and {model}; give each its own folder: NAME=FOLDER"
            )
        column.model = model
        prompts = CHAT if results.get("chat_template_sha") or results.get("system_instruction") else RAW
        replaced = [latest[task, prompts][0] for task in results["configs"] if (task, prompts) in latest]
        if replaced:
            tasks = [task for task in results["configs"] if (task, prompts) in latest]
            column.notes.append(f"{listed(tasks)} ({prompts}) was run again: {file.name} replaces {replaced[0].name}")
        latest |= {(task, prompts): (file, results) for task in results["configs"]}
        column.facts.append(_facts(file, results, model, reference, prompts))
    for (task, prompts), (file, results) in latest.items():
        reference = _models(results)[1]
        base = _base_column(bases, reference, folder) if reference else None
        _read_task(column, base, task, prompts, file, results)
    return column


def listed(names: list[str], shown: int = 3) -> str:
    """Names in a sentence, the first few of them."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _date(path: Path) -> str:
    """The date in a results file's name, which sorts by time wherever the file lies."""
    return RESULTS_NAME.search(path.name).group(1)


def _models(results: dict[str, Any]) -> tuple[str, str | None]:
    """The model that was run, and the reference beside it."""
    arguments = results["config"].get("model_args") or {}
    if isinstance(arguments, str):  # as older versions write them
        arguments = dict(part.split("=", 1) for part in arguments.split(",") if "=" in part)
    model = arguments.get("pretrained") or results.get("model_name") or results["config"].get("model")
    added = [str(arguments[key]) for key in ("peft", "delta", "knowledge_delta") if arguments.get(key)]
    return " + ".join([str(model), *added]), arguments.get("reference")


def _facts(file: Path, results: dict[str, Any], model: str, reference: str | None, prompts: str) -> dict[str, str]:
    """What one results file says about its run, as the reader sees it."""
    config = results["config"]
    date = results.get("date")
    facts = {
        "model": f"{model} ({config.get('model')})",
        "reference": reference,
        "tasks": ", ".join(_task_versions(results)),
        "prompts": prompts,
        "limit": "none" if config.get("limit") is None else f"{config['limit']:g}",
        "precision": str(config.get("model_dtype", "")).removeprefix("torch."),
        "lm_eval": results.get("lm_eval_version"),
        "transformers": results.get("transformers_version"),
        "date": datetime.fromtimestamp(date, UTC).strftime("%Y-%m-%d %H:%M UTC") if date else None,
        "file": str(file),
    }
    return {key: str(value) for key, value in facts.items() if value}


def _task_versions(results: dict[str, Any]) -> list[str]:
    """Each task, or the group that it is pooled in, with its version."""
    pools = _pools(results)
    versions = results.get("versions", {})
    names = dict.fromkeys(pools.get(task, task) for task in results["configs"])
    return [f"{name} {versions[name]}" if versions.get(name) is not None else name for name in names]


def _pools(results: dict[str, Any]) -> dict[str, str]:
    """For each task of a group that is one benchmark, such as ceval-valid_law of ceval-valid, that group."""
    groups = results.get("group_subtasks") or {}
    pools = {}
    for group in sorted(groups, key=len, reverse=True):
        members, todo = set(), [group]
        while todo:
            children = set(groups.get(todo.pop(), [])) - members
            members |= children
            todo += children
        pools |= {task: group for task in members if task.startswith(f"{group}_")}
    return pools


def _settings(task: str, results: dict[str, Any], count: int) -> dict[str, str]:
    """What must be equal in two runs whose scores are compared."""
    config = results["config"]
    return {
        "task version": results.get("versions", {}).get(task),
        "number of questions": count,
        "limit": config.get("limit"),
        "num_fewshot": results.get("n-shot", {}).get(task),
        "chat template": (results.get("chat_template_sha") or "none")[:12],
        "system instruction": results.get("system_instruction"),
        "generation settings": config.get("gen_kwargs") or None,
        "precision": str(config.get("model_dtype")).removeprefix("torch."),
        "lm_eval version": results.get("lm_eval_version"),
    }


def _read_task(
    column: Column, base: Column | None, name: str, prompts: str, file: Path, results: dict[str, Any]
) -> None:
    path = file.with_name(f"samples_{name}_{_date(file)}.jsonl")
    if not path.is_file():
        raise MM4KEError(f"{file}: {name}: its samples were not logged; run lm_eval again with --log_samples")
    task = Task("", prompts, _pools(results).get(name, name))
    metrics = [key.split(",") for key in results["results"].get(name, {}) if "," in key and "_stderr," not in key]
    filters = {key[1] for key in metrics}
    documents, repeated, scored = set(), Counter(), False
    for place, sample in _samples(path):
        try:
            documents.add(sample["doc_id"])
            doc = sample["doc"]
            if not sample["metrics"]:
                continue  # the place-holder of a KnowEdit task that has no question in this data
            if isinstance(doc, dict) and all(key in doc for key in KNOWEDIT_KEYS):
                scored |= _add_knowedit(column, base, prompts, sample, repeated)
            else:
                scored |= _add_general(column, task, name, sample, len(filters) > 1)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise MM4KEError(f"{place}: not a sample as lm_eval logs it ({error!r:.80}); run it again") from None
    expected = results["n-samples"].get(name, {}).get("effective", 0)
    if len(documents) < expected:
        raise MM4KEError(f"{path}: {len(documents)} of {expected} questions; the file was cut short, run it again")
    if expected and not scored:
        _add_totals(column, task, {key[0]: results["results"][name][",".join(key)] for key in metrics})
    settings = {key: str(value) for key, value in _settings(name, results, len(documents)).items()}
    column.settings[name, prompts] = settings
    if base:
        base.settings[name, prompts] = settings


def _samples(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of a samples file, with its place for messages."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                place = f"{path}: line {number}"
                try:
                    yield place, json.loads(line)
                except (ValueError, RecursionError):
                    raise MM4KEError(f"{place}: not JSON; the file was cut short or damaged, run it again") from None
    except UnicodeDecodeError:
        raise MM4KEError(f"{path}: not UTF-8; the file is damaged, run it again") from None
    except OSError as error:
        raise MM4KEError(f"{path}: {error.strerror}; make it readable") from None


def _numbers(sample: dict[str, Any]) -> dict[str, float]:
    """The measures of a sample that are its own: lm-eval also logs what only counts over all samples, as lists."""
    values = {name: sample[name] for name in sample["metrics"]}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def _add_knowedit(
    column: Column, base: Column | None, prompts: str, sample: dict[str, Any], repeated: Counter
) -> bool:
    """Add a sample of a KnowEdit task or of known_facts; whether it has a score."""
    doc = sample["doc"]
    scores = _numbers(sample)
    record = str(doc["record_id"])
    data = record.rpartition(":")[0]
    metric = str(doc["metric"])
    task = Task(data, prompts, f"{metric}_free" if "exact_match" in scores else metric)
    answers = [*_flat(sample["filtered_resps"]), "", ""]
    question = (record, str(doc["axis"]), str(doc["prompt"]), str(doc["target"]))
    repeated[task, question] += 1
    own = {name: value for name, value in scores.items() if not name.startswith(REFERENCE_PREFIX)}

    def item(answer: str, scores: dict[str, float]) -> Item:
        key = (data, *question, repeated[task, question])
        return Item(key, sample["prompt_hash"], record, question[1], question[2], question[3], answer, scores)

    _add(column, task, item(answers[0], own))
    if base:
        of_base = {name: 1.0 for name in AGREEMENTS if name in own}
        of_base |= {name.removeprefix(REFERENCE_PREFIX): value for name, value in scores.items() if name not in own}
        _add(base, task, item(answers[1], of_base))
    return bool(own)


def _add_general(column: Column, task: Task, name: str, sample: dict[str, Any], several_filters: bool) -> bool:
    """Add a sample of any other task, or another filter's scores of the same one; whether it has a score."""
    key = (name, sample["doc_id"], sample["doc_hash"])
    requests = [request for _, request in sorted(sample["arguments"].items(), key=lambda entry: int(entry[0][9:]))]
    prompt = str(requests[0]["arg_0"])
    target, answer = _target_and_answer(sample, requests)
    scores = _numbers(sample)
    if several_filters:
        scores = {f"{measure} ({sample['filter']})": value for measure, value in scores.items()}
    for place, part in _by_kind_of_question(task, scores).items():
        _add(column, place, Item(key, sample["prompt_hash"], str(key), "", prompt, target, answer, part))
    return bool(scores)


def _add_totals(column: Column, task: Task, values: dict[str, Any]) -> None:
    """Add what a results file says of a task whose samples don't have scores of their own."""
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
    column.totals |= _by_kind_of_question(task, numbers)
    column.notes.append(f"{task.name} ({task.prompts}): lm-eval logs no score for each question, so only the totals")


def _by_kind_of_question(task: Task, scores: dict[str, float]) -> dict[Task, dict[str, float]]:
    """The scores of SQuAD 2.0's two kinds of questions apart; all others as they are. All from 0 to 1."""
    if task.name in PERCENT_TASKS:
        scores = {measure: score / 100 for measure, score in scores.items()}
    apart = {
        Task("", task.prompts, f"{task.name} {kind}"): {
            measure.removeprefix(f"{kind}_"): score for measure, score in scores.items() if measure.startswith(kind)
        }
        for kind in KINDS_OF_QUESTION
    }
    return {place: part for place, part in apart.items() if part} or ({task: scores} if scores else {})


def _target_and_answer(sample: dict[str, Any], requests: list[dict[str, Any]]) -> tuple[str, str]:
    """The right answer and the model's as text; of a multiple choice both are options."""
    target, responses = str(sample["target"]), sample["filtered_resps"]
    is_choice = len(requests) > 1 and all(isinstance(response, list) for response in responses)
    if not is_choice:
        return target, (_flat(responses) or [""])[0]
    options = [str(request["arg_1"]).strip() for request in requests]
    best = max(range(len(options)), key=lambda index: float(responses[index][0]))
    if target.isdecimal() and int(target) < len(options):
        target = options[int(target)]
    return target, options[best]


def _flat(value: Any) -> list[str]:
    return [text for entry in value for text in _flat(entry)] if isinstance(value, list) else [str(value)]


# ---- EasyEdit ----


def _read_easyedit(name: str, folder: Path, file: Path, is_one_of_many: bool, bases: dict[str, Column]) -> Column:
    result = _read_json(file)
    if result.get("kind") != EASYEDIT_KIND or result.get("version") != EASYEDIT_VERSION:
        raise MM4KEError(
            f"{file}: not a result of lm_eval or of mm4ke easyedit (version {EASYEDIT_VERSION}); give a run folder"
        )
    try:
        method, model = result["method"], result["model"]
        title = f"{name} {method}" if name and is_one_of_many else name or method
        column = Column(title, f"{model} + {method}", str(folder))
        column.facts.append(_easyedit_facts(file, result))
        if result["status"] != "ok":
            column.failure = result["error"] or "it failed and did not say why"
            return column
        base = _base_column(bases, model, folder)
        repeated = Counter()
        for question in result["questions"]:
            _add_easyedit(column, base, question, _easyedit_prompts(result), repeated)
    except (KeyError, TypeError, AttributeError) as error:
        raise MM4KEError(f"{file}: not as mm4ke easyedit writes it ({error!r:.80}); run it again") from None
    return column


def _easyedit_prompts(result: dict[str, Any]) -> str:
    return CHAT if result.get("prompt_format") == "chat" else RAW


def _easyedit_facts(file: Path, result: dict[str, Any]) -> dict[str, str]:
    versions = ", ".join(f"{name} {version}" for name, version in (result.get("versions") or {}).items())
    facts = {
        "model": result["model"],
        "method": result["method"],
        "data": f"{result['data']}, {result['records']} records",
        "prompts": _easyedit_prompts(result),
        "editing": result.get("editing"),
        "seconds": f"{result['seconds']:.0f}" if result.get("seconds") is not None else None,
        "versions": versions,
        "file": str(file),
    }
    return {key: str(value) for key, value in facts.items() if value}


def _add_easyedit(column: Column, base: Column, question: dict[str, Any], prompts: str, repeated: Counter) -> None:
    record, axis, prompt = question["record_id"], question["axis"] or "", question["prompt"]
    data = record.rpartition(":")[0]
    task = Task(data, prompts, question["metric"])
    measure = "locality" if question["metric"] == "locality" else "token_acc"
    place = (record, axis, prompt, question["answer"])
    repeated[task, place] += 1
    before = 1.0 if measure == "locality" else question["score_before"]
    for holder, answer, score in (
        (column, question["after"], question["score_after"]),
        (base, question["before"], before),
    ):
        if score is not None:
            key, read = (data, *place, repeated[task, place]), hash_of(prompt) if prompts == RAW else ""
            item = Item(key, read, record, axis, prompt, question["answer"], answer or "", {measure: float(score)})
            _add(holder, task, item)


def hash_of(text: str) -> str:
    """lm-eval's prompt_hash of a text: SHA-256 in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
