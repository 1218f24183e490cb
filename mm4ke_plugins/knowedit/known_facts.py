"""Known facts kept: everyday questions that a model answers right before an edit, asked again after it.

`known_facts.txt` has some 150 of them, of many kinds and lengths, written for this project; none is about a fact that
is taught. A model is asked freely, in its chat template or, where it has none, in raw prompts. Of two models

    kept        the share of the base's right answers for which the edited model has a right one as well
    kl          KL(base || edited) of the next token, the mean over the tokens of the base's answers, in nats
    length      the words of the edited model's answers per word of the base's, to these questions
    unchanged   the share of answers that are the same

An answer is right if it has the words that the file names: a coarse judgement, alike for both models.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .metrics import generate, prompt_ids

MAX_NEW_TOKENS = 48
# Of the base's distribution so many likeliest tokens are kept one by one, and the others as one: a vocabulary of
# 150 000 would take GBs. KL is a little lower for it, never higher.
LIKELIEST = 1024


@dataclass(frozen=True)
class KnownFact:
    """parts: all are needed in an answer; of each, one of its words or phrases, in lower case."""

    kind: str
    question: str
    parts: tuple[tuple[str, ...], ...]

    def is_right(self, answer: str) -> bool:
        words = re.sub(r"[^\w'₂-]+", " ", answer.lower())
        return all(any(f" {phrase} " in f" {words} " for phrase in part) for part in self.parts)


def known_facts() -> list[KnownFact]:
    lines = (files(__package__) / "known_facts.txt").read_text(encoding="utf-8").splitlines()
    found = []
    for line in lines:
        if not line.startswith("#"):
            kind, question, parts = (cell.strip() for cell in line.split(" | ", 2))
            phrases = (tuple(phrase.strip() for phrase in part.split("|")) for part in parts.split(";"))
            found.append(KnownFact(kind, question, tuple(phrases)))
    return found


@dataclass(frozen=True)
class Kept:
    """What an edited model kept of `asked` right answers; answers: by question, the base's and its own."""

    asked: int
    kept: float
    kl: float
    length: float
    unchanged: float
    answers: dict[str, tuple[str, str]]
    lost: list[str]


class KnownFacts:
    """The base's answers, against which `measure` holds other models with the same tokenizer."""

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        advance: Callable[[int], None] = lambda count: None,
    ):
        """advance: called with the number of questions that were answered since its last call."""
        self.tokenizer = tokenizer
        facts = known_facts()
        tokens = self._ask(base, facts, advance)
        texts = [self._text(answer) for answer in tokens]
        right = [index for index, fact in enumerate(facts) if fact.is_right(texts[index])]
        self.facts = [facts[index] for index in right]
        self.tokens = [tokens[index] for index in right]
        self.texts = [texts[index] for index in right]
        self.asked = len(facts)
        self.by_base = [self._likeliest(rows) for rows in self._log_probabilities(base)]

    def measure(
        self, model: PreTrainedModel, advance: Callable[[int], None] = lambda count: None, *, batch_size: int = 32
    ) -> Kept | None:
        """Ask a model what the base knew. None where the base answered nothing right.

        batch_size: of the questions that it answers together
        """
        if not self.facts:
            return None
        divergence, follows = self._along(model)
        texts = self._answers(model, follows, advance, batch_size)
        lost = [fact.question for fact, text in zip(self.facts, texts, strict=True) if not fact.is_right(text)]
        pairs = list(zip(self.texts, texts, strict=True))
        return Kept(
            asked=len(self.facts),
            kept=1 - len(lost) / len(self.facts),
            kl=divergence,
            length=sum(len(text.split()) for text in texts) / sum(len(text.split()) for text in self.texts),
            unchanged=sum(base == text for base, text in pairs) / len(pairs),
            answers={fact.question: pair for fact, pair in zip(self.facts, pairs, strict=True)},
            lost=lost,
        )

    def kept(self, model: PreTrainedModel, advance: Callable[[int], None] = lambda count: None) -> float:
        """`measure`'s `kept` alone, of a base that answered something right."""
        texts = self._answers(model, self._along(model)[1], advance)
        return sum(fact.is_right(text) for fact, text in zip(self.facts, texts, strict=True)) / len(texts)

    def divergence(self, model: PreTrainedModel) -> float:
        """KL(base || model) in nats, the mean over all tokens of the base's right answers."""
        return self._along(model)[0]

    def _along(self, model: PreTrainedModel) -> tuple[float, list[bool]]:
        """The model along the base's answers: its divergence, and for each answer whether it gives the same one."""
        total, count, follows = 0.0, 0, []
        for answer, (chosen, base), rows in zip(
            self.tokens, self.by_base, self._log_probabilities(model), strict=True
        ):
            found = self._with_the_rest(rows.gather(1, chosen.to(rows.device)).cpu())
            total += float((base.exp() * (base - found)).sum(dtype=torch.float64))
            count += len(base)
            follows.append(rows.argmax(1).tolist() == answer)
        return max(total / count, 0.0), follows

    def _answers(
        self, model: PreTrainedModel, follows: Sequence[bool], advance: Callable[[int], None], batch_size: int = 32
    ) -> list[str]:
        """What a model says to the questions that the base answered right; it speaks only where it says another thing.

        follows: of `_along`
        """
        advance(sum(follows))
        other = [fact for fact, same in zip(self.facts, follows, strict=True) if not same]
        said = iter(self._ask(model, other, advance, batch_size))
        return [text if same else self._text(next(said)) for text, same in zip(self.texts, follows, strict=True)]

    def _ask(
        self,
        model: PreTrainedModel,
        facts: Sequence[KnownFact],
        advance: Callable[[int], None],
        batch_size: int = 32,
    ) -> list[list[int]]:
        prompts = [fact.question for fact in facts]
        return generate(model, self.tokenizer, prompts, MAX_NEW_TOKENS, batch_size=batch_size, advance=advance)

    def _text(self, answer: list[int]) -> str:
        return self.tokenizer.decode(answer, skip_special_tokens=True).strip()

    @torch.inference_mode()
    def _log_probabilities(self, model: PreTrainedModel) -> Iterator[torch.Tensor]:
        """For each answer of the base, float32 (tokens, vocabulary): of every next token along it."""
        for fact, answer in zip(self.facts, self.tokens, strict=True):
            asked = prompt_ids(self.tokenizer, fact.question)
            ids = torch.tensor([[*asked, *answer]], device=model.device)
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1]
            yield logits.float().log_softmax(-1)

    def _likeliest(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest tokens' ids, and their log-probabilities with that of all others together as the last."""
        values, chosen = rows.topk(min(LIKELIEST, rows.shape[1]))
        return chosen.cpu(), self._with_the_rest(values.cpu())

    @staticmethod
    def _with_the_rest(values: torch.Tensor) -> torch.Tensor:
        rest = (1 - values.exp().sum(1, keepdim=True)).clamp(min=1e-9).log()
        return torch.cat([values, rest], 1)
