"""What the KnowEdit tasks of lm-eval (0.4.13) share: their documents, and how a response is scored.

A document is one probe of one record:

    record, record_id   the record's place in the file, counted from 0, and `Record.id`
    metric, axis        as in `metrics.Question`
    prompt, target      what is asked, and the answer that counts as right (the first, where there are several)
    subject             what the fact is about; "" where the file does not say

The teacher-forced tasks are `multiple_choice` with one choice, because only then lm-eval leaves out the space before
the answer under a chat template. Every score is read off the response, which the model type `mm4ke` fills with more
than other backends can: see `Response` and `Text`.

`--metadata` knows `knowedit_file=FILE` and `knowedit_limit=N`, the first N records. Of these the facts are asked that
`mm4ke facts` keeps.
"""

import logging
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset

from ...errors import MM4KEError, first_line, report_in_one_line, require_report_extra
from ..dataset import read_facts
from ..metrics import exact_match, ngram_entropy, questions_of
from ..records import Record

LOG = logging.getLogger("lm_eval.knowedit")

HUB_DATASET = "zjunlp/KnowEdit"
HUB_FILES = {
    "knowedit_zsre": "benchmark/ZsRE/ZsRE-test-all.json",
    "knowedit_wiki_recent": "benchmark/wiki_recent/recent_test.json",
    "knowedit_wiki_counterfact": "benchmark/wiki_counterfact/test_cf.json",
    "knowedit_wikibio": "benchmark/WikiBio/wikibio-test-all.json",
}
OWN_FACTS = Path("recipes/facts.json")
# The axes that have tasks of their own; those of all KnowEdit files and of CounterFact. The group of
# users' own facts has one more, OTHER, for all the others together.
AXES = {
    "portability": ("Reasoning", "Subject_Aliasing", "Logical_Generalization"),
    "locality": ("Relation_Specificity", "Forgetfulness", "neighborhood"),
}
OWN_GROUP, OTHER = "knowedit_facts", "other"
# A task without a single document makes lm-eval fail, with all others of its group. This one is not scored.
NOTHING = {"record": -1, "record_id": "", "subject": "", "prompt": "-", "target": "-"}


class Response(tuple):
    """lm-eval's (log-likelihood, is_greedy) of an answer, which also knows what was predicted at its tokens.

    answer:              the answer's token ids
    predicted:           the model's most likely token ids, as many
    reference_predicted: the reference model's; None without a reference
    text, reference_text: both as text
    """

    answer: list[int]
    predicted: list[int]
    reference_predicted: list[int] | None
    text: str
    reference_text: str


class Text(str):
    """What the model said; `reference_text` is what the reference model said to the same prompt."""

    reference_text: str


class Texts(list):
    """[what the model predicts or says, what the reference does]: lm-eval logs it. `response` is the whole response.

    An answer that another backend's model does not predict as a whole is "", since nothing more is known of it.
    """

    response: Any


def is_probe(doc: Any) -> bool:
    """Whether a document of lm-eval is one of ours that is to be scored."""
    return isinstance(doc, dict) and "record_id" in doc and doc.get("record", -1) >= 0


# ---- documents ----


def documents(
    group: str, metric: str, axis: str = "", knowedit_file: str | None = None, knowedit_limit: int | None = None, **_
) -> dict[str, Dataset]:
    """The `custom_dataset` of a task: all probes of one metric and axis of the data, as the split "test".

    Without a `knowedit_file`, `knowedit_facts` reads recipes/facts.json of the working directory, and the others the
    test file of their data set on the hub.

    Raises MM4KEError: no such file, the hub can't be reached, no NLTK for the fluency, what `read_facts` raises.
    """
    report_in_one_line()
    if metric == "fluency":
        require_report_extra(f"{group}_fluency", "nltk")  # now, not when all texts are generated
    if knowedit_limit is not None and (not isinstance(knowedit_limit, int) or knowedit_limit < 1):
        raise MM4KEError(f"--metadata knowedit_limit={knowedit_limit}: give how many records to read, at least 1")
    path = Path(str(knowedit_file)) if knowedit_file else _default_file(group)
    records = _records(group, path, knowedit_limit)
    asked_metric = "edit_success" if metric == "fluency" else metric
    axes = _other_axes(records, metric) if axis == OTHER else {axis}
    docs = [
        {
            "record": records[question.record].index,
            "record_id": records[question.record].id,
            "metric": metric,
            "axis": question.axis,
            "prompt": question.prompt,
            "target": question.answer,
            "subject": records[question.record].subject or "",
        }
        for question in questions_of(records)
        if question.metric == asked_metric and question.axis in axes
    ]
    if not docs:
        if axis != OTHER:
            LOG.warning(f"{path}: no {metric} {axis}".rstrip() + " probes: this task is not scored")
        docs = [NOTHING | {"metric": metric, "axis": axis}]
    return {"test": Dataset.from_list(docs)}


@lru_cache
def _records(group: str, path: Path, limit: int | None) -> list[Record]:
    """The file's records, read once for all tasks of a group; probes that none of these asks are mentioned."""
    records = read_facts(path, limit)
    for metric, axes in AXES.items():
        if group != OWN_GROUP and (others := _other_axes(records, metric)):
            LOG.warning(
                f"{path}: {metric}: {', '.join(sorted(others))}: no task of {group} asks this; "
                f"{OWN_GROUP}_{metric}_{OTHER} does, or name it one of {', '.join(axes)}"
            )
    return records


def _other_axes(records: list[Record], metric: str) -> set[str]:
    return {axis for record in records for axis in getattr(record, metric)} - set(AXES[metric])


@lru_cache
def _default_file(group: str) -> Path:
    if group not in HUB_FILES:
        if not OWN_FACTS.is_file():
            raise MM4KEError(f"{OWN_FACTS}: no such file here; name your facts with --metadata knowedit_file=FILE")
        return OWN_FACTS
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(HUB_DATASET, HUB_FILES[group], repo_type="dataset"))
    except Exception as error:  # noqa: BLE001  (offline, no such file, no permission: as many kinds as ways to fail)
        raise MM4KEError(
            f"{group}: can't get {HUB_FILES[group]} of {HUB_DATASET} from the hub ({first_line(error)}); "
            "name your copy with --metadata knowedit_file=FILE"
        ) from None


def choices(doc: dict[str, Any]) -> list[str]:
    """The one continuation whose likelihood a teacher-forced task asks for."""
    return [doc["target"]]


# ---- scores ----


def texts(responses: Iterable[list], docs: list[dict[str, Any]]) -> list[Texts]:
    """The tasks' filter: what lm-eval shall log of each response, and hand to the functions below."""
    found = []
    for (response, *_), doc in zip(responses, docs):
        if isinstance(response, str):
            entry = Texts([str(response), getattr(response, "reference_text", "")])
        elif isinstance(response, Response):
            entry = Texts([response.text, response.reference_text])
        else:
            entry = Texts([doc["target"] if response[1] else "", ""])
        entry.response = response
        found.append(entry)
    return found


def score_forced(doc: dict[str, Any], results: list[Texts]) -> dict[str, float]:
    """`token_acc` and `exact` of a teacher-forced response, 0 to 1, and the reference's own as `reference_...`.

    For locality probes `locality` instead of `token_acc`: the share of predictions equal to the reference's.
    From a backend that does not say what it predicted: `exact` only.
    """
    if not is_probe(doc):
        return {}
    response = results[0].response
    scores = {"exact": float(response[1])}
    if not isinstance(response, Response):
        return scores
    is_locality = doc["metric"] == "locality"
    if response.reference_predicted is None:
        return scores | ({} if is_locality else _agreement("token_acc", response.predicted, response.answer))
    scores["reference_exact"] = float(response.reference_predicted == response.answer)
    if is_locality:
        return scores | _agreement("locality", response.predicted, response.reference_predicted)
    return (
        scores
        | _agreement("token_acc", response.predicted, response.answer)
        | _agreement("reference_token_acc", response.reference_predicted, response.answer)
    )


def _agreement(name: str, tokens: list[int], expected: list[int]) -> dict[str, float]:
    """The share of equal tokens; nothing where the answer has no token of its own."""
    same = [token == other for token, other in zip(tokens, expected, strict=True)]
    return {name: sum(same) / len(same)} if same else {}


def score_free(doc: dict[str, Any], results: list[Texts]) -> dict[str, float]:
    """`exact_match` of a free answer, 0 or 1, and `reference_exact_match`."""
    return _of_both("exact_match", lambda text: float(exact_match(text, doc["target"])), doc, results)


def score_fluency(doc: dict[str, Any], results: list[Texts]) -> dict[str, float]:
    """`ngram_entropy` of a generated text, in hundredths of a bit as EasyEdit's users print it, and the reference's."""
    return _of_both("ngram_entropy", lambda text: 100 * ngram_entropy(text), doc, results)


def _of_both(name, score, doc: dict[str, Any], results: list[Texts]) -> dict[str, float]:
    if not is_probe(doc):
        return {}
    (text, reference_text), response = results[0], results[0].response
    scores = {name: score(text)}
    if isinstance(response, Text):
        scores[f"reference_{name}"] = score(reference_text)
    return scores
