"""What a report shows of its columns: rows of scores, paired differences, changed answers and warnings."""

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from ..errors import MM4KEError
from .runs import CHAT, Column, Item, Task, listed
from .statistics import Difference, Value, compare, is_binary, record_values

# In this order. "edit_success_free" asks the same, and lets the model speak (see knowedit/tasks/_free.yaml).
KNOWEDIT = ("edit_success", "generalization", "portability", "locality", "fluency")
FREE = tuple(f"{name}_free" for name in KNOWEDIT[:3])
GENERAL = {
    "ceval-valid": "C-Eval",
    "coqa": "CoQA",
    "drop": "DROP",
    "mm4ke_squadv2": "SQuAD 2.0",
    "mm4ke_squadv2 HasAns": "SQuAD 2.0, answerable",
    "mm4ke_squadv2 NoAns": "SQuAD 2.0, unanswerable",
    "mm4ke_logiqa": "LogiQA",
    "mmlu_pro": "MMLU-Pro",
    "boolq": "BoolQ",
    "cb": "CB",
    "copa": "COPA",
    "multirc": "MultiRC",
    "record": "ReCoRD",
    "rte": "RTE",
    "sglue_rte": "RTE",
    "wic": "WiC",
    "wsc": "WSC",
}
MEASURES = {
    "token_acc": "token accuracy",
    "exact": "exact",
    "exact_match": "exact match",
    "ngram_entropy": "n-gram entropy × 100",
    "locality": "unchanged predictions",
    "kept": "of the base's right answers",
    "unchanged": "unchanged answers",
    "right": "right answers",
    "words": "words in an answer",
    "acc": "accuracy",
    "acc_norm": "accuracy, by length",
    "f1": "F1",
    "em": "exact match",
}
# The first of these that a task has is its main measure; the others are details.
MAIN_MEASURES = ("token_acc", "locality", "kept", "exact_match", "ngram_entropy", "acc", "f1", "em", "exact")
# A question with one of these at 1 was answered right.
RIGHT_OR_WRONG = ("exact", "exact_match", "acc", "em", "right")
SUBJECTS = ("merged", "mm4ke")


@dataclass(frozen=True)
class Row:
    """One measure of one task, of all its questions or of one axis.

    axis:    None for all
    is_main: whether it stands for its task in the figures and the verdict
    """

    task: Task
    measure: str
    axis: str | None = None
    is_main: bool = False

    @property
    def section(self) -> str:
        return section_title(self.task)

    @property
    def is_free(self) -> bool:
        return self.task.name in FREE

    @property
    def is_general(self) -> bool:
        return not self.task.data

    @property
    def is_share(self) -> bool:
        """Whether its values lie between 0 and 1."""
        return self.measure not in ("ngram_entropy", "words")

    @property
    def title(self) -> str:
        """The task's name; of a detail the axis or the measure."""
        if self.is_main:
            return task_title(self.task)
        return self.axis.replace("_", " ").lower() if self.axis else self.measure_title

    @property
    def measure_title(self) -> str:
        """The measure's name; a filter's name stays behind it."""
        name, space, rest = self.measure.partition(" ")
        return MEASURES.get(name, name) + space + rest


@dataclass
class Cell:
    """A column's mean, over how many records and questions, and its difference from the base column."""

    value: float
    records: int
    questions: int
    difference: Difference | None = None


@dataclass
class Flip:
    """An answer that changed from one column to another."""

    item: Item
    before: str
    after: str


@dataclass
class Flips:
    """The answers of one task that changed; where right or wrong is not the question, all are in `changed`."""

    task: Task
    questions: int
    lost: list[Flip]
    gained: list[Flip]
    changed: list[Flip]


def section_title(task: Task) -> str:
    return f"{task.data or 'General ability'} · {task.prompts}"


def task_title(task: Task) -> str:
    if not task.data:
        return GENERAL.get(task.name, task.name)
    if task.name in FREE:
        return f"{task.name.removesuffix('_free').replace('_', ' ')}, free"
    return task.name.replace("_", " ")


# ---- rows ----


def rows_of(columns: list[Column]) -> list[Row]:
    """All rows, in the order of the table: KnowEdit's data sets as they come, then general ability."""
    measures: dict[Task, list[str]] = defaultdict(list)
    axes: dict[Task, list[str]] = defaultdict(list)
    for column in columns:
        for task, items in column.items.items():
            for item in items.values():
                measures[task] += [name for name in item.scores if name not in measures[task]]
                if item.axis and item.axis not in axes[task]:
                    axes[task].append(item.axis)
        for task, totals in column.totals.items():
            measures[task] += [name for name in totals if name not in measures[task]]
    rows = []
    for task in sorted(measures, key=lambda task: _place(task, list(measures))):
        ranked = sorted(measures[task], key=_rank)
        rows += [Row(task, measure, is_main=measure == ranked[0]) for measure in ranked[:1]]
        rows += [Row(task, ranked[0], axis) for axis in axes[task]]
        rows += [Row(task, measure) for measure in ranked[1:]]
    return rows


def _place(task: Task, tasks: list[Task]) -> tuple:
    data = [other.data for other in tasks]
    names = [*KNOWEDIT, *FREE, *GENERAL]
    rank = names.index(task.name) if task.name in names else len(names)
    return (not task.data, data.index(task.data), task.prompts != CHAT, rank, tasks.index(task))


def _rank(measure: str) -> int:
    name = measure.partition(" ")[0]
    return MAIN_MEASURES.index(name) if name in MAIN_MEASURES else len(MAIN_MEASURES)


def values_of(row: Row, items: list[Item]) -> list[Value]:
    return [Value(item.record, item.axis, item.scores[row.measure]) for item in items]


def _items(row: Row, column: Column) -> dict[tuple, Item]:
    return {
        key: item
        for key, item in column.items.get(row.task, {}).items()
        if row.measure in item.scores and row.axis in (None, item.axis)
    }


def cell(row: Row, column: Column, base: Column | None) -> Cell | None:
    """What the table shows of a column in a row; None where it has nothing."""
    items = list(_items(row, column).values())
    if items:
        values = record_values(values_of(row, items))
        change = difference(row, base, column) if base and base is not column else None
        return Cell(fmean(values.values()), len(values), len(items), change)
    total = column.totals.get(row.task, {}).get(row.measure) if row.axis is None else None
    return None if total is None else Cell(total, 0, 0)


# ---- pairs ----


def pairs_of(columns: list[Column]) -> list[tuple[Column, Column]]:
    """Which columns are compared: each with the base, the first; and the other edited ones with the merged model."""
    base, *others = [column for column in columns if not column.failure]
    pairs = [(base, column) for column in others]
    subjects = [column for column in others if column.name.lower() in SUBJECTS]
    for subject in subjects:
        pairs += [(column, subject) for column in others if column not in subjects]
    return pairs + list(combinations(subjects, 2))


def subject_of(columns: list[Column]) -> Column | None:
    """The column that the verdict is about: the merged model, else the last."""
    others = [column for column in columns[1:] if not column.failure]
    named = [column for name in SUBJECTS for column in others if column.name.lower() == name]
    return [*named, *reversed(others), None][0]


def joined(row: Row, before: Column, after: Column) -> list[tuple[Item, Item]]:
    """The questions that both answered after reading the same text."""
    old, new = _items(row, before), _items(row, after)
    return [(old[key], new[key]) for key in old if key in new and old[key].is_asked_like(new[key])]


def difference(row: Row, before: Column, after: Column) -> Difference | None:
    """The paired difference, where the two have questions in common."""
    pairs = joined(row, before, after)
    if not pairs:
        return None
    old, new = zip(*pairs)
    return compare(values_of(row, list(old)), values_of(row, list(new)))


def flips(rows: list[Row], before: Column, after: Column) -> list[Flips]:
    """The changed answers of each task, in the order of the rows."""
    found = []
    for task in dict.fromkeys(row.task for row in rows):
        if task.name == "locality" and task.data:
            pairs = joined(Row(task, "locality"), before, after)
            changed = [(old, new) for old, new in pairs if old.scores["locality"] != new.scores["locality"]]
            entry = Flips(task, len(pairs), [], [], [_flip(*pair) for pair in changed])
        else:
            pairs = _judged(task, rows, before, after)
            lost = [_flip(old, new) for old, new, was, now in pairs if was and not now]
            gained = [_flip(old, new) for old, new, was, now in pairs if now and not was]
            entry = Flips(task, len(pairs), lost, gained, [])
        if entry.questions:
            found.append(entry)
    return found


def _flip(old: Item, new: Item) -> Flip:
    return Flip(new, old.answer, new.answer)


def _judged(task: Task, rows: list[Row], before: Column, after: Column) -> list[tuple[Item, Item, bool, bool]]:
    """Each question that both answered, with whether each was right."""
    candidates = [row for row in rows if row.task == task and row.axis is None]
    names = [*RIGHT_OR_WRONG, "token_acc"]  # all tokens right is right: EasyEdit's results have nothing else
    candidates = [row for row in candidates if row.measure.partition(" ")[0] in names]
    for row in sorted(candidates, key=lambda row: names.index(row.measure.partition(" ")[0])):
        pairs = joined(row, before, after)
        both = [values_of(row, list(items)) for items in zip(*pairs)]
        if pairs and (row.measure == "token_acc" or all(map(is_binary, both))):
            return [(old, new, old.scores[row.measure] == 1, new.scores[row.measure] == 1) for old, new in pairs]
    return []


# ---- can they be compared? ----


def check_same_data(columns: list[Column]) -> None:
    """Raise MM4KEError where two columns ran one of lm-eval's tasks, or one KnowEdit file, on different questions."""
    for one, other in combinations(columns, 2):
        for task in one.items.keys() & other.items.keys():
            ours, theirs = (_by_source(column.items[task]) for column in (one, other))
            for source in sorted(ours.keys() & theirs.keys()):
                if not ours[source] & theirs[source]:
                    raise MM4KEError(
                        f"{one.folder} and {other.folder}: runs of different data: {source}: {task_title(task)}: "
                        f"{one.name} and {other.name} have no question in common; run both on the same data"
                    )


def _by_source(items: dict[tuple, Item]) -> dict[str, set[tuple]]:
    sources = defaultdict(set)
    for key in items:
        sources[key[0]].add(key)
    return sources


def warnings_of(columns: list[Column]) -> list[str]:
    """Why scores of two columns may differ although the models do not, one line each."""
    pairs_with: dict[str, list[str]] = defaultdict(list)
    for before, after in pairs_of(columns):
        for line in [*_setting_warnings(before, after), *_question_warnings(before, after)]:
            pairs_with[line].append(f"{before.name} and {after.name}")
    return [f"{'; '.join(pairs)}: {line}" for line, pairs in pairs_with.items()]


def _setting_warnings(before: Column, after: Column) -> list[str]:
    differing: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for place in before.settings.keys() & after.settings.keys():
        old, new = before.settings[place], after.settings[place]
        for key in old:
            if old[key] != new[key]:
                differing[key, old[key], new[key]].append(place[0])
    lines = [
        f"{key} {old} and {new}: {listed(sorted(set(tasks)))}" for (key, old, new), tasks in sorted(differing.items())
    ]
    formats: dict[tuple[str, str], list[str]] = defaultdict(list)
    old_formats, new_formats = _formats(before), _formats(after)
    for name in old_formats.keys() & new_formats.keys():
        if not old_formats[name] & new_formats[name]:
            key = " and ".join(sorted(old_formats[name])), " and ".join(sorted(new_formats[name]))
            formats[key].append(f"{name[0]} {name[1]}".strip())
    lines += [
        f"{old} and {new}: not comparable, so in rows of their own: {listed(sorted(tasks))}"
        for (old, new), tasks in formats.items()
    ]
    return lines


def _formats(column: Column) -> dict[tuple[str, str], set[str]]:
    """The prompt formats in which a column has each task, by (data, task)."""
    formats = defaultdict(set)
    for task in [*column.items, *column.totals]:
        formats[task.data, task_title(task)].add(task.prompts)
    return formats


def _question_warnings(before: Column, after: Column) -> list[str]:
    prompts, counts = [], []
    for task in sorted(before.items.keys() & after.items.keys(), key=str):
        old, new = before.items[task], after.items[task]
        common = old.keys() & new.keys()
        other_prompt = sum(not old[key].is_asked_like(new[key]) for key in common)
        if other_prompt:
            prompts.append(f"{task_title(task)} ({other_prompt} of {len(common)})")
        if len(common) < max(len(old), len(new)):
            counts.append(f"{task_title(task)} ({len(old)} and {len(new)}, {len(common)} in common)")
    lines = [f"other prompts for the same questions, which are left out: {listed(prompts)}"] if prompts else []
    return lines + ([f"not the same questions: {listed(counts)}"] if counts else [])
