"""Everything that is asked of an edited model, question by question, so that two models can be compared in pairs.

    Scorer(base, tokenizer, records)    while the model is the base
    scorer.score(edited)                the same object after an edit, or another model with the same tokenizer

The scores by question, in this order of `questions_of(records)`:

    raw, chat        EasyEdit's metrics, teacher-forced (`metrics.py`), in each prompt format of the tokenizer
    free             1 or 0: whether what the model says freely, and ends by itself, is the answer and nothing else
                     (WILD, arXiv 2502.11177); of the facts and of each one's first rephrase
"""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .known_facts import KnownFacts, known_facts
from .metrics import answer, exact_match, neutral_text, perplexity, predict, question_scores, questions_of
from .prompts import Question, encode, prompt_formats
from .records import Record

FREE_METRICS = ("edit_success", "generalization")


class Scorer:
    """The questions, and what the base says to them."""

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        records: Sequence[Record],
        advance: Callable[[int], None] = lambda count: None,
    ):
        """advance: called with how many questions were asked since its last call; `cost` is their number."""
        self.tokenizer, self.records = tokenizer, records
        self.questions = questions_of(records)
        self.formats = prompt_formats(tokenizer)
        firsts: dict[tuple[int, str], int] = {}
        for place, question in enumerate(self.questions):
            if question.metric in FREE_METRICS:
                firsts.setdefault((question.record, question.metric), place)
        self.asked_freely = sorted(firsts.values())
        self.by_base = {}
        for name in self.formats:
            codes = [encode(tokenizer, question, name) for question in self.questions]
            self.by_base[name] = predict(base, codes, advance=advance)
        self.known = KnownFacts(base, tokenizer, advance)

    @staticmethod
    def cost(tokenizer: PreTrainedTokenizerBase, records: Sequence[Record]) -> int:
        """How many questions the base is asked."""
        return len(prompt_formats(tokenizer)) * len(questions_of(records)) + len(known_facts())

    def score(
        self,
        model: PreTrainedModel,
        *,
        in_context: bool = False,
        batch_size: int = 16,
        advance: Callable[[int], None] = lambda count: None,
    ) -> dict[str, Any]:
        """Ask a model all.

        in_context: begin each question with its record's fact, as text: what a model could do that was just told
        batch_size: of the questions that are read; 1 for a model that decides by its whole input what it does

        Returns, ready for JSON:
            scores      by format (raw, chat, free): for each question 0 to 1, or None where it is not asked
            known       of the base's right everyday answers, by question: whether this model has a right one as well
            known_kl    KL(base || model) along them (nats a token); None where the base knew nothing
            length      the words of the answers to them, per word of the base's
            perplexity  of the neutral text
        """
        told = self.questions
        if in_context:
            facts = [f"{record.prompt} {record.target_new}\n" for record in self.records]
            told = [
                Question(each.record, each.metric, each.axis, facts[each.record] + each.prompt, each.answer)
                for each in self.questions
            ]
        scores: dict[str, list[float | None]] = {}
        for name in self.formats:
            codes = [encode(self.tokenizer, question, name) for question in told]
            found = predict(model, codes, batch_size=batch_size, advance=advance)
            scores[name] = question_scores(told, codes, found, self.by_base[name])
        scores["free"] = [None] * len(told)
        said = answer(
            model, self.tokenizer, [told[place].prompt for place in self.asked_freely], batch_size=batch_size
        )
        for place, text in zip(self.asked_freely, said, strict=True):
            scores["free"][place] = float(exact_match(text, told[place].answer))
        kept = self.known.measure(model, advance, batch_size=batch_size)
        return {
            "scores": scores,
            "known": {fact.question: fact.question not in kept.lost for fact in self.known.facts} if kept else {},
            "known_kl": kept and kept.kl,
            "length": kept and kept.length,
            "perplexity": perplexity(model, self.tokenizer, neutral_text()),
        }
