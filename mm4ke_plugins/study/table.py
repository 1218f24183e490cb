"""What a study found, as numbers: means, paired intervals against one row, and who is on which front.

A row's score on a record is the mean over its questions of an axis, then over axes (as EasyEdit's), then over seeds;
a row's score is the mean over records. Intervals are over records, paired (`report.statistics`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from ..knowedit.metrics import questions_of
from ..knowedit.prompts import Question
from ..knowedit.records import Record
from ..report.statistics import Difference, Value, compare, record_values
from .plan import BASE
from .run import Row


@dataclass(frozen=True)
class Measure:
    """One column: shares are better the higher they are, and have intervals; other numbers are shown only."""

    key: str
    title: str
    values: Callable[[Row, list[Question]], list[Value]]


def _asked(form: str, metric: str) -> Callable[[Row, list[Question]], list[Value]]:
    def values(row: Row, questions: list[Question]) -> list[Value]:
        scores = row.scores["scores"].get(form, [])
        return [
            Value(str(question.record), question.axis, score)
            for question, score in zip(questions, scores)
            if question.metric == metric and score is not None
        ]

    return values


def _known(row: Row, questions: list[Question]) -> list[Value]:
    return [Value(question, "", float(right)) for question, right in row.scores["known"].items()]


def measures(form: str) -> list[Measure]:
    """What counts, asked in this prompt format: the pairs of these have fronts."""
    return [
        Measure("edit_success", "edit success", _asked(form, "edit_success")),
        Measure("generalization", "generalization", _asked(form, "generalization")),
        Measure("portability", "portability", _asked(form, "portability")),
        Measure("locality", "locality", _asked(form, "locality")),
        Measure("known", "known facts kept", _known),
        Measure("free", "free answers", _asked("free", "edit_success")),
        Measure("free_generalization", "free, rephrased", _asked("free", "generalization")),
    ]


def raw_measures() -> list[Measure]:
    return [
        Measure(f"raw_{metric}", f"raw: {metric.replace('_', ' ')}", _asked("raw", metric))
        for metric in ("edit_success", "generalization", "portability", "locality")
    ]


@dataclass(frozen=True)
class Line:
    """One method: the mean of each measure over its seeds, None where it wasn't asked, and what it cost.

    error:  why it failed, with every seed; failed: with how many of them it did
    spread: of each measure, the smallest and the largest seed's mean; None with one seed
    """

    method: str
    error: str | None
    failed: int
    seeds: int
    means: dict[str, float | None]
    spread: dict[str, tuple[float, float] | None]
    kl: float | None
    perplexity: float | None
    seconds: float | None
    peak: int | None
    commands: list[str]


def lines_of(rows: Sequence[Row], records: list[Record], columns: Sequence[Measure]) -> list[Line]:
    """The methods of one set of facts, in their order."""
    questions = questions_of(records)
    lines = []
    for name in dict.fromkeys(row.method for row in rows):
        of_method = [row for row in rows if row.method == name]
        scored = [row for row in of_method if row.scores]
        by_seed = {
            column.key: [
                fmean(record_values(values).values()) for row in scored if (values := column.values(row, questions))
            ]
            for column in columns
        }
        first = (scored or of_method)[0]
        lines.append(
            Line(
                method=name,
                error=None if scored else of_method[0].error,
                failed=len(of_method) - len(scored),
                seeds=len(of_method),
                means={key: fmean(found) if found else None for key, found in by_seed.items()},
                spread={key: (min(found), max(found)) if len(found) > 1 else None for key, found in by_seed.items()},
                kl=_mean([row.scores["known_kl"] for row in scored]),
                perplexity=_mean([row.scores["perplexity"] for row in scored]),
                seconds=_mean([row.cost["seconds"] for row in scored]),
                peak=max((row.cost["peak"] for row in scored if row.cost["peak"]), default=None),
                commands=first.cost["commands"],
            )
        )
    return lines


def _mean(numbers: list[float | None]) -> float | None:
    found = [number for number in numbers if number is not None]
    return fmean(found) if found else None


def differences(
    rows: Sequence[Row], records: list[Record], columns: Sequence[Measure], first: str, second: str
) -> dict[str, Difference]:
    """second - first, paired on the same questions; of several seeds the means of both. Without failed ones: empty."""
    questions = questions_of(records)

    def values(method: str, column: Measure) -> list[Value]:
        of_seeds = [column.values(row, questions) for row in rows if row.method == method and row.scores]
        return [
            Value(same[0].record, same[0].axis, fmean(value.score for value in same))
            for same in zip(*of_seeds, strict=True)
        ]

    found = {}
    for column in columns:
        before, after = values(first, column), values(second, column)
        if before and len(before) == len(after):
            found[column.key] = compare(before, after)
    return found


def is_ahead(other: Sequence[float], point: Sequence[float]) -> bool:
    """Whether `other` is at least as good in all, and better in one."""
    return other != point and all(one >= two for one, two in zip(other, point, strict=True))


def fronts_of(lines: Sequence[Line], keys: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """For each method the pairs of measures on whose Pareto front it is. The base has learned nothing and is left out.

    On the front: no other method is at least as good in both, and better in one.
    """
    found: dict[str, list[tuple[str, str]]] = {line.method: [] for line in lines}
    for pair in combinations(keys, 2):
        points = {
            line.method: tuple(line.means[key] for key in pair)
            for line in lines
            if line.method != BASE and all(line.means.get(key) is not None for key in pair)
        }
        for name, point in points.items():
            if not any(is_ahead(other, point) for other in points.values()):
                found[name].append(pair)
    return found
