"""The known facts (`../known_facts.py`) as a task of lm-eval (0.4.13), beside KnowEdit's.

A document is one question, with the keys of KnowEdit's documents (`utils.py`): `axis` is the kind of question, and
`target` the words of a right answer as known_facts.txt writes them.
"""

from typing import Any

from datasets import Dataset

from ..known_facts import known_facts
from .utils import Text, Texts, is_probe

NAME = "known_facts"


def documents(**_) -> dict[str, Dataset]:
    """The `custom_dataset` of the task: all questions, in the order of the file, as the split "test"."""
    docs = [
        {
            "record": place,
            "record_id": f"{NAME}:{place}",
            "metric": NAME,
            "axis": fact.kind,
            "prompt": fact.question,
            "target": "; ".join(" | ".join(part) for part in fact.parts),
            "subject": "",
        }
        for place, fact in enumerate(known_facts())
    ]
    return {"test": Dataset.from_list(docs)}


def score(doc: dict[str, Any], results: list[Texts]) -> dict[str, float]:
    """`right`, 0 or 1, of a free answer; with a reference `reference_right` as well.

    Where the reference is right also `kept` and `unchanged`, 0 or 1, which ask for a right answer and for the very
    same one, and the number of `words` and `reference_words`.
    """
    if not is_probe(doc):
        return {}
    fact = known_facts()[doc["record"]]
    answer, before = (text.strip() for text in results[0])
    scores = {"right": float(fact.is_right(answer))}
    if not isinstance(results[0].response, Text):
        return scores
    scores["reference_right"] = float(fact.is_right(before))
    if scores["reference_right"]:
        scores |= {"kept": scores["right"], "unchanged": float(answer == before)}
        scores |= {"words": float(len(answer.split())), "reference_words": float(len(before.split()))}
    return scores
