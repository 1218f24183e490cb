"""A question, and the token ids that a model reads of it.

Edits of a live model and all measurements make their tokens here, so that a model is asked in the format that it was
taught in (LLaMA-Factory's training has templates of its own). Which questions a record has, and how answers are scored,
is in `metrics.py`.
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

# "raw": the bare prompt, a space and the answer, as EasyEdit. "chat": the answer is the assistant's turn.
PROMPT_FORMATS = ("raw", "chat")


@dataclass(frozen=True)
class Question:
    """One prompt of one record (its index in the list) with the answer that counts as right.

    axis: the name that the record gives a group of probes, such as "Reasoning"; "" for the fact itself
    """

    record: int
    metric: str
    axis: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Encoded:
    """A question as token ids; the answer's tokens are ids[answer_start:]."""

    ids: list[int]
    answer_start: int

    @property
    def answer_ids(self) -> list[int]:
        """What the model has to predict; empty where the prompt's tokens leave nothing to the answer."""
        return self.ids[self.answer_start :]


def encode(tokenizer: PreTrainedTokenizerBase, question: Question, prompt_format: str) -> Encoded:
    """Tokenize a question in one of PROMPT_FORMATS.

    raw:  prompt, space and answer are tokenized together, with the special tokens that the tokenizer adds. The
          answer starts where the prompt alone would end. EasyEdit's own count of padding tokens gives the same
          start, unless the answer spells the padding token.
    chat: the answer's tokens follow the chat template's prompt for the assistant; the end of turn is not scored.
          Both parts are tokenized apart, as they are in training.
    """
    if prompt_format == "raw":
        ids = tokenizer(f"{question.prompt} {question.answer}").input_ids
        return Encoded(ids, min(len(ids), len(tokenizer(question.prompt).input_ids)))
    prompt_ids = chat_prompt(tokenizer, question.prompt)
    return Encoded(prompt_ids + tokenizer(question.answer, add_special_tokens=False).input_ids, len(prompt_ids))


def prompt_formats(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The formats that a model can be asked in: without a chat template raw prompts only."""
    return PROMPT_FORMATS if tokenizer.chat_template else ("raw",)


def chat_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The token ids of a conversation in which the user has said `prompt` and the assistant is to speak."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,  # for the templates that know it: the answer comes at once
    )
    return tokenizer(text, add_special_tokens=False).input_ids
