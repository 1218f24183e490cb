"""How well a causal language model of the transformers library knows edited facts, and what it kept.

A question is a prompt and its answer. The model reads both, and at every token of the answer we note the token
that it finds most likely after all that came before (teacher forcing). Compared with the answer's tokens:

    edit_success     prompt -> target_new               the fraction of tokens predicted right
    generalization   rephrase_prompts -> target_new     the same
    portability      the record's portability probes    the same
    locality         the record's locality probes       the fraction of predictions equal to the base model's

A probe with several answers is asked with the first one. A score is the mean over the probes of one axis, then
over a record's axes, then over the records that have any. All this follows EasyEdit: `test_prediction_acc` in
easyeditor/evaluate/evaluate_utils.py, `finalize_locality_metrics` in easyeditor/editors/editor.py and the averages
of examples/run_knowedit_llama2.py, which takes the first of an answer's aliases as well.

Teacher forcing flatters a model that cannot stop by itself, so there is also `answer`: free generation, and
`exact_match` for what it says. `ngram_entropy` tells fluent text from repetition, and `perplexity` shows whether
ordinary text became less likely.
"""

import copy
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from importlib.resources import files
from itertools import groupby
from statistics import fmean

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .normalize import normalize_answer
from .prompts import Encoded, Question, chat_prompt, prompt_formats
from .records import Record

METRICS = ("edit_success", "generalization", "portability", "locality")


def questions_of(records: Iterable[Record]) -> list[Question]:
    """All questions of the records, record by record."""
    questions = []
    for index, record in enumerate(records):
        questions.append(Question(index, "edit_success", "", record.prompt, record.target_new))
        for prompt in record.rephrase_prompts:
            questions.append(Question(index, "generalization", "", prompt, record.target_new))
        for metric, axes in (("portability", record.portability), ("locality", record.locality)):
            for axis, probes in axes.items():
                questions += [Question(index, metric, axis, probe.prompt, probe.answers[0]) for probe in probes]
    return questions


@torch.inference_mode()
def predict(
    model: PreTrainedModel,
    encoded: list[Encoded],
    *,
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda count: None,
) -> list[list[int]]:
    """The model's most likely token at every token of every answer: one list per question, as long as the answer.

    Each question is read once, in batches of similar length; the result does not depend on `batch_size`. What all
    questions begin with, such as a chat template's system message, is read once for all.
    `advance` is told after each batch how many questions it had.
    """
    predicted: list[list[int]] = [[] for _ in encoded]
    for batch, places, logits in _answer_logits(model, encoded, batch_size):
        for index, place, row in zip(batch, places, logits.argmax(dim=-1).tolist()):
            predicted[index] = row[place]
        advance(len(batch))
    return predicted


@torch.inference_mode()
def predict_and_score(
    model: PreTrainedModel,
    encoded: list[Encoded],
    *,
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda count: None,
) -> list[tuple[list[int], float]]:
    """`predict`, and beside each question's predictions the log-likelihood of its answer in nats (summed)."""
    results: list[tuple[list[int], float]] = [([], 0.0) for _ in encoded]
    for batch, places, logits in _answer_logits(model, encoded, batch_size):
        for index, place, row, tokens in zip(batch, places, logits, logits.argmax(dim=-1).tolist()):
            answer_ids = torch.tensor(encoded[index].answer_ids, device=logits.device)[:, None]
            likelihood = row[place].float().log_softmax(dim=-1).gather(1, answer_ids).sum().item()
            results[index] = (tokens[place], likelihood)
        advance(len(batch))
    return results


def _answer_logits(
    model: PreTrainedModel, encoded: list[Encoded], batch_size: int
) -> Iterator[tuple[list[int], list[slice], torch.Tensor]]:
    """For each batch: the questions' places in `encoded`, where each row's answer is, and the logits.

    The logits are (rows, positions, vocabulary) in the model's dtype; row[place] predicts the answer's tokens.
    """
    # The token before the answer stays in every row: its prediction is wanted.
    shared = os.path.commonprefix([code.ids[: code.answer_start - 1] for code in encoded])
    cache = None
    if shared:
        shared_ids = torch.tensor([shared], device=model.device)
        cache = model(input_ids=shared_ids, use_cache=True, logits_to_keep=1).past_key_values
    rows = [code.ids[len(shared) :] for code in encoded]
    starts = [code.answer_start - len(shared) for code in encoded]

    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        input_ids, attention_mask = _padded([rows[index] for index in batch], model.device, side="right")
        past = copy.deepcopy(cache)  # the forward appends to it
        if past is not None:
            past.batch_repeat_interleave(len(batch))
            attention_mask = torch.nn.functional.pad(attention_mask, (len(shared), 0), value=1)
        # The output layer is a quarter of a small model's work; the prompts' own predictions are not needed.
        first = min(starts[index] for index in batch) - 1
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past,
            use_cache=False,
            logits_to_keep=input_ids.shape[1] - first,
        )
        places = [slice(starts[index] - 1 - first, len(rows[index]) - 1 - first) for index in batch]
        yield batch, places, output.logits


def question_scores(
    questions: list[Question],
    encoded: list[Encoded],
    predicted: list[list[int]],
    predicted_by_base: list[list[int]],
) -> list[float | None]:
    """Each question's score, 0 to 1; None where the answer has no token of its own.

    encoded, predicted, predicted_by_base: as from `encode` and `predict`, in the order of `questions`
    """
    scores = []
    for question, code, tokens, base_tokens in zip(questions, encoded, predicted, predicted_by_base, strict=True):
        expected = base_tokens if question.metric == "locality" else code.answer_ids
        same = [token == other for token, other in zip(tokens, expected, strict=True)]
        scores.append(fmean(same) if same else None)
    return scores


def mean_scores(questions: list[Question], scores: list[float | None]) -> dict[str, float | None]:
    """The mean of each metric in METRICS, 0 to 1: over probes, then axes, then records. None where nothing asks it."""
    means = {}
    for metric in METRICS:
        scored = [
            (question.record, question.axis, score)
            for question, score in zip(questions, scores, strict=True)
            if question.metric == metric and score is not None
        ]
        of_records = [
            fmean(fmean(score for *_, score in probes) for _, probes in groupby(axes, key=lambda entry: entry[1]))
            for _, axes in groupby(scored, key=lambda entry: entry[0])
        ]
        means[metric] = fmean(of_records) if of_records else None
    return means


def mean_scores_by_axis(questions: list[Question], scores: list[float | None]) -> dict[str, dict[str, float]]:
    """The mean of each axis of each metric that has axes, 0 to 1: over a record's probes, then over the records."""
    means: dict[str, dict[str, float]] = {}
    for metric, axis in dict.fromkeys((question.metric, question.axis) for question in questions if question.axis):
        of_axis = [
            place for place, question in enumerate(questions) if (question.metric, question.axis) == (metric, axis)
        ]
        mean = mean_scores([questions[place] for place in of_axis], [scores[place] for place in of_axis])[metric]
        if mean is not None:
            means.setdefault(metric, {})[axis] = mean
    return means


def exact_match(text: str, target: str) -> bool:
    """Whether a free answer says the target and nothing else, after `normalize_answer`: WILD's exact match.

    Source: arXiv 2502.11177, and `exact_match_score` in EasyEdit's easyeditor/evaluate/evaluate_utils.py.
    """
    return normalize_answer(text) == normalize_answer(target)


def ngram_entropy(text: str) -> float:
    """EasyEdit's fluency, without its factor of 100: the mean of 2/3 of the bigrams' and 4/3 of the trigrams' entropy.

    In bits. Low for text that repeats itself; 0 for text of less than two words. Words are those of NLTK's
    tokenizer without its sentence splitter, which needs a download (EasyEdit's splits sentences first, so that a
    full stop inside the text is a word of its own). Source: `compute_n_gram_entropy` in EasyEdit's
    easyeditor/evaluate/evaluate_utils.py.
    """
    from nltk import ngrams, word_tokenize  # half a second that no other metric should wait for

    words = word_tokenize(text, preserve_line=True)
    entropies = []
    for size, weight in ((2, 2 / 3), (3, 4 / 3)):
        counts = Counter(ngrams(words, size)).values()
        total = sum(counts)
        entropies.append(weight * -sum(count / total * math.log2(count / total) for count in counts))
    return fmean(entropies)


def neutral_text() -> str:
    """A text that no fact is about."""
    return (files(__package__) / "neutral_text.txt").read_text(encoding="utf-8")


@torch.inference_mode()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, *, window: int = 512) -> float:
    """exp of the mean negative log-likelihood per token of `text`, read in windows of at most `window` tokens.

    A window's first token is not predicted, and a window sees nothing of the one before.
    """
    ids = torch.tensor(tokenizer(text).input_ids, device=model.device)
    window = min(window, getattr(model.config, "max_position_embeddings", window))
    loss_sum, count = torch.zeros((), dtype=torch.float64), 0
    for part in ids.split(window):
        if len(part) > 1:
            logits = model(input_ids=part[None], use_cache=False).logits[0, :-1].float()
            loss_sum += torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum").item()
            count += len(part) - 1
    return (loss_sum / count).exp().item()


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int = 32,
    *,
    batch_size: int = 32,
) -> list[str]:
    """What the model says to each prompt, see `generate`. One that was not finished in so many tokens ends in "…"."""
    stops = _stops(model, tokenizer)
    answers = []
    for tokens in generate(model, tokenizer, prompts, max_new_tokens, batch_size=batch_size):
        text = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        answers.append(text if stops & set(tokens) else f"{text}…")
    return answers


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_new_tokens: int,
    *,
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda count: None,
) -> list[list[int]]:
    """The tokens of the model's answer to each prompt: the most likely one each time, until it ends its turn.

    In the chat template, or, where the tokenizer has none, to the raw prompt. The token that ends the turn is the last.
    """
    asked = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    stops = _stops(model, tokenizer)
    # A fresh configuration: the model's own may ask for sampling.
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(stops), pad_token_id=min(stops, default=0)
    )
    answers: list[list[int]] = []
    for start in range(0, len(asked), batch_size):
        input_ids, attention_mask = _padded(asked[start : start + batch_size], model.device, side="left")
        output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=greedy)
        for tokens in output[:, input_ids.shape[1] :].tolist():
            end = next((index for index, token in enumerate(tokens) if token in stops), len(tokens))
            answers.append(tokens[: end + 1])
        advance(len(input_ids))
    return answers


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """A question that is asked freely: in the chat template, or raw where the tokenizer has none."""
    in_chat = "chat" in prompt_formats(tokenizer)
    return chat_prompt(tokenizer, prompt) if in_chat else tokenizer(prompt).input_ids


def _stops(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    stops = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}


def _padded(rows: list[list[int]], device: torch.device, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of token ids as one int64 tensor (rows, longest) with its attention mask, padded on the given side."""
    width = max(map(len, rows))
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(len(row))
        input_ids[index, place] = torch.tensor(row)
        attention_mask[index, place] = 1
    return input_ids.to(device), attention_mask.to(device)
