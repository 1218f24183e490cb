"""lm-eval's SQuAD 2.0 with the official scores computed here.

lm-eval's `squadv2` (tasks/squadv2/task.py, version 3) downloads its metric from the hub and logs predictions instead
of scores. Prompts and requests stay lm-eval's; the scores are those of the official evaluate-v2.0.py, in percent.
An empty answer is the right one to an unanswerable question, so a model that has stopped answering looks good in
`exact` and `f1`: read HasAns (answerable) and NoAns (unanswerable) apart.
"""

from math import exp

from lm_eval.api.metrics import mean
from lm_eval.tasks.squadv2 import task as lm_eval_squadv2
from transformers.data.metrics.squad_metrics import compute_exact, compute_f1, normalize_answer


class SQuAD2(lm_eval_squadv2.SQuAD2):
    """`dataset_path` of the task's YAML replaces the hub's data set; it needs the split `validation`."""

    def __init__(self, config: dict):
        self.DATASET_PATH = config.get("dataset_path", self.DATASET_PATH)
        super().__init__(config)

    def has_training_docs(self) -> bool:
        return "train" in self.dataset

    def process_results(self, doc: dict, results: list) -> dict:
        """Scores of one question, 0 to 100; HasAns_* or NoAns_* is absent where it doesn't apply.

        `best_exact` and `best_f1` carry (score, probability of "unanswerable", has an answer, answered).
        """
        prediction, (logprob_unanswerable, _) = results
        # As officially: a gold answer of articles and punctuation only is none.
        golds = [gold for gold in doc["answers"]["text"] if normalize_answer(gold)] or [""]
        has_answer = bool(doc["answers"]["text"])
        scores = {
            "exact": 100.0 * max(compute_exact(gold, prediction) for gold in golds),
            "f1": 100.0 * max(compute_f1(gold, prediction) for gold in golds),
        }
        apart = {f"{'HasAns' if has_answer else 'NoAns'}_{name}": score for name, score in scores.items()}
        best = {
            f"best_{name}": (score, exp(logprob_unanswerable), has_answer, bool(prediction))
            for name, score in scores.items()
        }
        return scores | apart | best

    def aggregation(self) -> dict:
        return {name: best_score if name.startswith("best_") else mean for name in self.higher_is_better()}


def best_score(items: list[tuple[float, float, bool, bool]]) -> float:
    """The mean score, 0 to 100, at the best threshold on the probability of "unanswerable".

    Each item is (score, probability, has an answer, answered). A question above the threshold counts as left
    unanswered (`find_best_thresh` of evaluate-v2.0.py).
    """
    total = 100.0 * sum(not has_answer for _, _, has_answer, _ in items)
    best = total
    for score, _, has_answer, answered in sorted(items, key=lambda item: item[1]):
        total += score if has_answer else -100.0 * answered
        best = max(best, total)
    return best / len(items)
