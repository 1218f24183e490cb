"""Facts as tokens, as samples, and their losses by the whole model."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import MM4KEError
from ..knowedit.prompts import Encoded, Question, encode
from .losses import IGNORED, Sample, answer_losses, samples_of
from .subject import gradient_only_at, tokens_from_subject


@dataclass(frozen=True)
class Fact(Encoded):
    """A question as token ids, and what ends its answer: the answer's own tokens are ids[answer_start:answer_stop].

    learns: at which tokens the trained FFN has a gradient; None: at all of them
    """

    answer_stop: int
    learns: list[bool] | None = None


def encode_fact(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    target_new: str,
    prompt_format: str,
    *,
    gradient_at: str = "all",
    subject: str | None = None,
) -> Fact:
    """A fact as token ids in one of PROMPT_FORMATS, followed by the end-of-sequence token.

    Without that token a model learns to answer and not to stop. With `gradient_at: from_subject` the fact is learned at
    the tokens of its question from the subject on: see `rsft.subject`.

    Raises MM4KEError: the answer has no token, or the tokenizer has no end-of-sequence token or no chat template.
    """
    if prompt_format == "chat" and not tokenizer.chat_template:
        raise MM4KEError("prompt_format: chat: the tokenizer has no chat template; add one, or give raw")
    if tokenizer.eos_token_id is None:
        raise MM4KEError("the tokenizer has no eos_token, without which a model can't learn to stop; give it one")
    if not target_new.strip():
        raise MM4KEError(f"{prompt!r:.80}: the answer is {target_new!r}; give a text that is not empty")
    code = encode(tokenizer, Question(0, "edit_success", "", prompt, target_new), prompt_format)
    if not code.answer_ids:
        raise MM4KEError(f"{prompt!r:.80}: the answer {target_new!r:.80} has no token of its own; give another one")
    learns = None
    if gradient_at == "from_subject":
        places = tokens_from_subject(tokenizer, code.ids[: code.answer_start], prompt, subject)
        learns = places + [False] * (len(code.ids) + 1 - len(places))
    return Fact([*code.ids, tokenizer.eos_token_id], code.answer_start, len(code.ids), learns)


def sample_of(fact: Fact, device: torch.device) -> Sample:
    """The fact as `FastForward` takes it."""
    batch, own = _batch_of(fact, torch.device("cpu"))
    (sample,) = samples_of(batch, device, own, _learns_of(fact))
    return sample


def fact_losses(model: PreTrainedModel, fact: Fact) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of one fact that is trained, with a graph, and the one that is judged: see `losses_of_rows`."""
    batch, own = _batch_of(fact, model.device)
    kept = len(fact.ids) - fact.answer_start + 1  # the answer, and the token before it, which predicts its first one
    with gradient_only_at(_learns_of(fact), model):
        logits = model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=kept).logits
    return answer_losses(logits, batch["labels"][:, -kept:], own[:, -kept:])


def _learns_of(fact: Fact) -> torch.Tensor | None:
    return None if fact.learns is None else torch.tensor([fact.learns])


def _batch_of(fact: Fact, device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch of this fact alone, and which of its labels are the answer's own tokens: see `samples_of`."""
    ids = torch.tensor([fact.ids], device=device)
    labels = ids.clone()
    labels[:, : fact.answer_start] = IGNORED
    own = torch.zeros_like(ids, dtype=torch.bool)
    own[:, fact.answer_start : fact.answer_stop] = True
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}, own
