"""Facts as tokens, as samples, and their losses by the whole model."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import MM4KEError
from ..knowedit.prompts import Encoded, Question, encode
from .losses import IGNORED, Sample, answer_losses, samples_of


@dataclass(frozen=True)
class Fact(Encoded):
    """A question as token ids, and what ends its answer: the answer's own tokens are ids[answer_start:answer_stop]."""

    answer_stop: int


def encode_fact(tokenizer: PreTrainedTokenizerBase, prompt: str, target_new: str, prompt_format: str) -> Fact:
    """A fact as token ids in one of PROMPT_FORMATS, followed by the end-of-sequence token.

    Without that token a model learns to answer and not to stop.

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
    return Fact([*code.ids, tokenizer.eos_token_id], code.answer_start, len(code.ids))


def sample_of(fact: Fact, device: torch.device) -> Sample:
    """The fact as `FastForward` takes it."""
    batch, own = _batch_of(fact, torch.device("cpu"))
    (sample,) = samples_of(batch, device, own)
    return sample


def fact_losses(model: PreTrainedModel, fact: Fact) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of one fact that is trained, with a graph, and the one that is judged: see `losses_of_rows`."""
    batch, own = _batch_of(fact, model.device)
    kept = len(fact.ids) - fact.answer_start + 1  # the answer, and the token before it, which predicts its first one
    logits = model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=kept).logits
    return answer_losses(logits, batch["labels"][:, -kept:], own[:, -kept:])


def _batch_of(fact: Fact, device: torch.device) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch of this fact alone, and which of its labels are the answer's own tokens: see `samples_of`."""
    ids = torch.tensor([fact.ids], device=device)
    labels = ids.clone()
    labels[:, : fact.answer_start] = IGNORED
    own = torch.zeros_like(ids, dtype=torch.bool)
    own[:, fact.answer_start : fact.answer_stop] = True
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}, own
