"""Means as EasyEdit takes them, and what the difference of two models on the same questions is worth.

The questions of one record are not independent, so records are the unit: a record's value is the mean over the
questions of an axis, then over its axes, and everything below is about these values. A task of general ability has
one question a record.

interval      of the mean difference, 95 %: Student's t over the records' differences; scores from 0 to 1 end it at ±1
p             McNemar's exact test, that is, the two-sided sign test of the records that got better against those
              that got worse. With one right-or-wrong question a record it is McNemar's; else its generalization.
detectable    the difference that a test of this size would find in 80 of 100 repetitions (5 % level, two sides)
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Value:
    """One question's score (of any unit), and the record and the axis that it belongs to."""

    record: str
    axis: str
    score: float


@dataclass(frozen=True)
class Difference:
    """What changed from one model to another on the questions that both answered.

    questions, records: how many both answered
    before, after:      the two means, over records
    mean:               after - before
    low, high:          the interval; None with fewer than two records, or where no record changed by another
                        amount than the rest, which leaves nothing to estimate it from
    better, worse:      records whose value rose, fell
    p:                  None where a record's value is not a count of right answers (see `is_binary`)
    detectable:         None where low and high are, and where no score from 0 to 1 could move so far
    """

    questions: int
    records: int
    before: float
    after: float
    mean: float
    low: float | None
    high: float | None
    better: int
    worse: int
    p: float | None
    detectable: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the interval lies on one side of 0, and p, where there is one, is under 5 %."""
        if self.low is None:  # all records moved by the same amount
            beyond = self.mean != 0 and self.records > 1
        else:
            beyond = self.low > 0 or self.high < 0
        return beyond and (self.p is None or self.p < 1 - CONFIDENCE)

    @property
    def hidden(self) -> float:
        """The largest share of changed records that goes unseen in so many with a probability of 5 %."""
        return 1 - (1 - CONFIDENCE) ** (1 / self.records)


def record_values(values: Iterable[Value]) -> dict[str, float]:
    """Each record's value: the mean over the questions of each axis, then over its axes."""
    axes: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for value in values:
        axes[value.record][value.axis].append(value.score)
    return {record: fmean(map(fmean, of_axis.values())) for record, of_axis in axes.items()}


def compare(before: list[Value], after: list[Value]) -> Difference:
    """The paired difference; the lists have the same questions in the same order, at least one."""
    old, new = record_values(before), record_values(after)
    differences = [new[record] - old[record] for record in old]
    count = len(differences)
    low = high = detectable = None
    if count > 1 and (spread := stdev(differences)) > 1e-12:
        error = spread / math.sqrt(count)
        width = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
        low, high = fmean(differences) - width * error, fmean(differences) + width * error
        detectable = (width + stats.norm.ppf(POWER)) * error
        if all(0 <= value.score <= 1 for value in [*before, *after]):
            low, high = max(low, -1.0), min(high, 1.0)  # with few records, t reaches beyond what is possible
            detectable = detectable if detectable <= 1 else None
    better = sum(difference > 1e-12 for difference in differences)
    worse = sum(difference < -1e-12 for difference in differences)
    return Difference(
        questions=len(before),
        records=count,
        before=fmean(old.values()),
        after=fmean(new.values()),
        mean=fmean(differences),
        low=low,
        high=high,
        better=better,
        worse=worse,
        p=mcnemar(better, worse) if is_binary(before) and is_binary(after) else None,
        detectable=detectable,
    )


def is_binary(values: Iterable[Value]) -> bool:
    """Whether every question is right or wrong."""
    return all(value.score in (0, 1) for value in values)


def mcnemar(better: int, worse: int) -> float:
    """The exact two-sided p of McNemar's test: as many one way as the other, by a binomial of one half."""
    changed = better + worse
    return float(stats.binomtest(better, changed, 0.5).pvalue) if changed else 1.0
