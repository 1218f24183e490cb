"""What is measured of a point of the grid, on one live model that is loaded once.

Edit success, generalization, portability and locality are those of `knowedit/metrics.py`. Two things that no fact is
about show what the edit did to everything else: a neutral text, by KL(base || edited) and the perplexity, and what the
base answers to everyday questions, by KL(base || edited) along its right answers (`knowedit/known_facts.py`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..delta.live import LiveDelta
from ..knowedit.known_facts import KnownFacts, known_facts
from ..knowedit.metrics import METRICS, mean_scores, predict, question_scores, questions_of
from ..knowedit.prompts import Encoded, Question, encode
from ..knowedit.records import Record
from ..rsft.layers import decoder_layers
from .points import HALVES, Point, Row, settings, title

WINDOW = 512  # tokens of the neutral text that are read at once, as by `metrics.perplexity`
ROWS = 64  # of them whose logits are compared at once


@dataclass(frozen=True)
class Part:
    """Questions that are asked together.

    codes:   their tokens
    by_base: what the base predicts at the tokens of each answer, with which locality is compared
    """

    questions: list[Question]
    codes: list[Encoded]
    by_base: list[list[int]]

    def scores(self, predicted: list[list[int]], metrics: Sequence[str]) -> dict[str, float | None]:
        """The mean of each of these metrics. predicted: what the model predicts, in the order of the questions."""
        means = mean_scores(self.questions, question_scores(self.questions, self.codes, predicted, self.by_base))
        return {metric: means[metric] for metric in metrics}

    def by_record(self, predicted: list[list[int]], metric: str) -> list[float]:
        """The score of each record that has such questions."""
        scores = question_scores(self.questions, self.codes, predicted, self.by_base)
        records = groupby(zip(self.questions, scores, strict=True), key=lambda entry: entry[0].record)
        found = [mean_scores(*zip(*entries, strict=True))[metric] for _, entries in records]
        return [score for score in found if score is not None]


class NeutralText:
    """A text and the base's log-probabilities of every next token: float32 on a CPU, 0.2 GB for 1000 tokens of a
    vocabulary of 50 000. Those of the edited model exist for one window at a time."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str):
        ids = torch.tensor(tokenizer(text).input_ids)
        window = min(WINDOW, getattr(model.config, "max_position_embeddings", WINDOW))
        self.windows = [part for part in ids.split(window) if len(part) > 1]
        self.by_base = [
            torch.cat([rows.log_softmax(-1).cpu() for rows in _next_token_logits(model, part)])
            for part in self.windows
        ]

    @torch.inference_mode()
    def measure(self, model: PreTrainedModel) -> tuple[float | None, float | None]:
        """KL(base || model) in nats per token, and the perplexity; None for what is not finite."""
        divergence = loss = 0.0
        count = 0
        for part, by_base in zip(self.windows, self.by_base, strict=True):
            targets = part[1:, None].to(model.device).split(ROWS)
            pieces = _next_token_logits(model, part), by_base.split(ROWS), targets
            for logits, base, target in zip(*pieces, strict=True):
                found, base = logits.log_softmax(-1), base.to(model.device)
                divergence += float((base.exp() * (base - found)).sum(dtype=torch.float64))
                loss -= float(found.gather(1, target).sum(dtype=torch.float64))
            count += len(part) - 1
        kl, loss = divergence / count, loss / count
        return kl if math.isfinite(kl) else None, math.exp(loss) if loss < 700 else None


@torch.inference_mode()
def _next_token_logits(model: PreTrainedModel, ids: torch.Tensor) -> Iterator[torch.Tensor]:
    """The logits of all tokens but the first: float32 (ROWS, vocabulary), piece by piece."""
    logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0, :-1]
    for rows in logits.split(ROWS):
        yield rows.float()


class Evaluator:
    """Puts points on the live model, which must be the base when this is made, and measures it.

    Edit success is asked first and apart from the rest: a point that loses too much of it need not be asked more.
    The base is asked the everyday questions freely when this is made; the points, only in `confirm`.

    layers_name: of the model's list of layers, such as "model.layers"
    names_of:    the edit's tensors in each layer that it changed, by the layer's number
    """

    def __init__(
        self,
        live: LiveDelta,
        tokenizer: PreTrainedTokenizerBase,
        records: Sequence[Record],
        prompt_format: str,
        text: str,
        progress: Progress,
    ):
        self.live, self.model, self.progress = live, live.model, progress
        self.layers_name, _ = decoder_layers(self.model)
        self.names_of: dict[int, list[str]] = {}
        for name in live.edited:
            number, _, rest = name.removeprefix(f"{self.layers_name}.").partition(".")
            if number.isdecimal() and rest:
                self.names_of.setdefault(int(number), []).append(name)

        questions = {half: questions_of(records[place::2]) for place, half in enumerate(HALVES)}
        self.task = progress.add_task("base", total=sum(map(len, questions.values())) + len(known_facts()))
        self.first: dict[str, Part] = {}
        self.rest: dict[str, Part] = {}
        for half, asked in questions.items():
            for parts, is_first in ((self.first, True), (self.rest, False)):
                part = [question for question in asked if (question.metric == METRICS[0]) == is_first]
                codes = [encode(tokenizer, question, prompt_format) for question in part]
                parts[half] = Part(part, codes, self._predict(codes))
        self.text = NeutralText(self.model, tokenizer, text)
        self.known = KnownFacts(self.model, tokenizer, self._advance)
        self.cost = len(questions[HALVES[0]]) + len(self.known.facts)  # of a point

    def _advance(self, count: int) -> None:
        self.progress.advance(self.task, count)

    def _predict(self, codes: list[Encoded]) -> list[list[int]]:
        return predict(self.model, codes, advance=self._advance)

    def plan(self, points: int) -> None:
        """Expect so many more points, or fewer."""
        self.progress.update(self.task, total=self.progress.tasks[self.task].total + points * self.cost)

    def untouched(self) -> Row:
        """The base's row, from what it predicted at first."""
        row = Row(Point(0.0, 1.0), in_grid=False)
        for half in HALVES:
            row.scores[half] = self._scores(half, lambda part: part.by_base)
        row.kl, row.perplexity = self.text.measure(self.model)
        if self.known.facts:
            row.known_kl, row.known_kept = 0.0, 1.0
        return row

    def measure(self, point: Point, required: float = -math.inf) -> Row:
        """A point's row on the half that decides; `hopeless` with an edit success below `required`."""
        half, row = HALVES[0], Row(point)
        self._put_on(point)
        found = self._predict(self.first[half].codes)
        row.scores[half] = self.first[half].scores(found, METRICS[:1])
        if row.edit_success < required:
            row.state = "hopeless"
            self._advance(len(self.rest[half].codes) + len(self.known.facts))
            return row
        found = self._predict(self.rest[half].codes)
        row.scores[half] |= self.rest[half].scores(found, METRICS[1:])
        row.locality_by_record = self.rest[half].by_record(found, "locality")
        row.kl, row.perplexity = self.text.measure(self.model)
        if self.known.facts:
            divergence = self.known.divergence(self.model)
            row.known_kl = divergence if math.isfinite(divergence) else None
            self._advance(len(self.known.facts))
        return row

    def confirm(self, row: Row) -> None:
        """Add the scores on the other half, and what is kept of the base's right answers."""
        if HALVES[1] in row.scores:
            return
        self._put_on(row.point)
        row.scores[HALVES[1]] = self._scores(HALVES[1], lambda part: self._predict(part.codes))
        if self.known.facts:
            row.known_kept = self.known.kept(self.model, self._advance)

    def _scores(self, half: str, predictions: Callable[[Part], list[list[int]]]) -> dict[str, float | None]:
        first, rest = self.first[half], self.rest[half]
        return first.scores(predictions(first), METRICS[:1]) | rest.scores(predictions(rest), METRICS[1:])

    def _put_on(self, point: Point) -> None:
        self.progress.update(self.task, description=title(point))
        self.live.set(*settings(point, self.live.edited, self.names_of))
