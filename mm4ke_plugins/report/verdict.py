"""What the numbers say, in plain sentences: did the model learn the facts, and what did it forget?"""

from collections.abc import Iterable
from dataclasses import dataclass

from .runs import Column, listed
from .statistics import Difference
from .summary import Row, difference, section_title


@dataclass(frozen=True)
class Answer:
    """A question that a reader has, the sentence that answers it, and what else there is to say."""

    question: str
    sentence: str
    more: list[str]


def verdict(rows: list[Row], base: Column, subject: Column, others: list[Column]) -> list[Answer]:
    """The answers that the columns' common questions allow.

    others: the edited columns beside `subject`, which it is compared with in the last answer
    """
    changes = {row: change for row in rows if row.is_main and (change := difference(row, base, subject))}
    answers = [
        _learned(changes),
        _said(changes),
        _kept(changes, base),
        _known(changes, base),
        _ability(changes),
        _against(rows, others, subject),
    ]
    return [answer for answer in answers if answer]


def signed(value: float) -> str:
    """A difference as tables show it: three decimals and its sign."""
    return f"{value:+.3f}".replace("-", "−").replace("+0.000", "0.000").replace("−0.000", "0.000")


def percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"


def interval(change: Difference) -> str:
    return "" if change.low is None else f"{signed(change.low)} to {signed(change.high)}"


def described(change: Difference) -> str:
    """A difference as a clause, with how sure it is."""
    units = f"{change.records} {'record' if change.records == 1 else 'records'}"
    if change.records == 1:
        return f"{signed(change.mean)} in one record, which shows nothing"
    if change.low is None and change.mean == 0:
        return f"the same in all {units}, so hardly more than {percent(change.hidden)} of such can have changed"
    if change.is_clear:
        between = f", 95\u00a0% interval {interval(change)}" if interval(change) else ""
        return f"{signed(change.mean)}{between}"
    size = f"{change.detectable:.3f}" if change.detectable else "none at all"
    shown = f"{signed(change.mean)}, 95\u00a0% interval {interval(change)}"
    return f"no difference that {units} could show: {shown}; {size} could have been found"


def _moved(change: Difference) -> str:
    if not change.is_clear:
        return f"went from {change.before:.3f} to {change.after:.3f}"
    return f"{'rose' if change.mean > 0 else 'fell'} from {change.before:.3f} to {change.after:.3f}"


def _of(changes: dict[Row, Difference], *names: str) -> Iterable[tuple[Row, Difference]]:
    return ((row, change) for row, change in changes.items() if row.task.data and row.task.name in names)


def _learned(changes: dict[Row, Difference]) -> Answer | None:
    lines, more = [], []
    for row, change in _of(changes, "edit_success"):
        place = f"{change.records} records, {section_title(row.task)}"
        lines.append(f"Edit success {_moved(change)} ({described(change)}; {place}).")
    for row, change in _of(changes, "generalization", "portability"):
        what = "Asked in other words" if row.task.name == "generalization" else "On what follows from the facts"
        more.append(f"{what}: {change.before:.3f} → {change.after:.3f} ({described(change)}).")
    return Answer("Did it learn the facts?", " ".join(lines), more) if lines else None


def _said(changes: dict[Row, Difference]) -> Answer | None:
    lines, more = [], []
    for row, change in _of(changes, "edit_success_free"):
        lines.append(
            f"Asked freely, it gives exactly the new answer to {percent(change.after)} of {change.records} facts; "
            f"before, to {percent(change.before)}."
        )
    for row, change in _of(changes, "generalization_free", "portability_free"):
        more.append(f"{row.title.capitalize()}: {change.before:.3f} → {change.after:.3f}.")
    return Answer("Does it say them?", " ".join(lines), more) if lines else None


def _kept(changes: dict[Row, Difference], base: Column) -> Answer | None:
    lines, more = [], []
    for row, change in _of(changes, "locality"):
        lines.append(
            f"Of its predictions about things that were not edited, {percent(change.after)} are still those of "
            f"{base.name} (locality {change.after:.3f}; {change.records} records, {section_title(row.task)})."
        )
    for row, change in _of(changes, "fluency"):
        more.append(f"Fluency: {change.before:.1f} → {change.after:.1f} ({described(change)}).")
    return Answer("What about its surroundings?", " ".join(lines), more) if lines else None


def _known(changes: dict[Row, Difference], base: Column) -> Answer | None:
    lines = []
    for row, change in _of(changes, "known_facts"):
        after = percent(change.after)
        if row.measure == "kept":
            asked = f"Of {change.records} everyday questions that {base.name} answers right, {after} are right still"
        else:
            asked = f"Of {change.records} everyday questions it answers {after} right, {base.name} {percent(change.before)}"
        lines.append(f"{asked} ({described(change)}).")
    return Answer("Does it know what it knew?", " ".join(lines), []) if lines else None


def _ability(changes: dict[Row, Difference]) -> Answer | None:
    general = {row: change for row, change in changes.items() if row.is_general}
    if not general:
        return None
    fell = [(row, change) for row, change in general.items() if change.is_clear and change.mean < 0]
    rose = [(row, change) for row, change in general.items() if change.is_clear and change.mean > 0]
    same = [change for change in general.values() if not change.is_clear]
    count = f"{len(general)} {'benchmark' if len(general) == 1 else 'benchmarks'}"
    if fell:
        names = ", ".join(row.title for row, _ in fell)
        sentence = f"Of {count}, {len(fell)} fell by more than chance explains: {names}."
    else:
        sentence = f"On none of {count} is there a loss that these questions could show."
    more = [f"{row.title} {_moved(change)} ({described(change)})." for row, change in [*fell, *rose]]
    if same:
        sizes = _range([change.records for change in same], "d")
        found = [change.detectable for change in same if change.detectable]
        limit = f"; losses under {_range(found, '.3f')} would mostly have gone unseen" if found else ""
        more.append(f"{len(same)} show no difference that {sizes} questions could show{limit}.")
    return Answer("Is it as able as before?", sentence, more)


def _against(rows: list[Row], others: list[Column], subject: Column) -> Answer | None:
    lines = [line for other in others if (line := _against_one(rows, other, subject))]
    names = listed([other.name for other in others])
    return Answer(f"And against {names}?", lines[0], lines[1:]) if lines else None


def _against_one(rows: list[Row], other: Column, subject: Column) -> str:
    """What is clearly different from another edited model; "" where they have no question in common."""
    found = [(row, change) for row in rows if row.is_main and (change := difference(row, other, subject))]
    clear = [(row, change) for row, change in found if change.is_clear]
    higher = [f"{row.title} ({signed(change.mean)})" for row, change in clear if change.mean > 0]
    lower = [f"{row.title} ({signed(change.mean)})" for row, change in clear if change.mean < 0]
    parts = [f"{word} in {', '.join(names)}" for word, names in (("higher", higher), ("lower", lower)) if names]
    if not parts:
        return f"Against {other.name}: no difference that these questions could show." if found else ""
    rest = len(found) - len(clear)
    more = f" No difference is shown in the other {rest} of {len(found)} measures." if rest else ""
    return f"Against {other.name}, {subject.name} is {' and '.join(parts)}.{more}"


def _range(values: list[float], form: str) -> str:
    low, high = min(values), max(values)
    return f"{low:{form}}" if f"{low:{form}}" == f"{high:{form}}" else f"{low:{form}} to {high:{form}}"
