"""The facts of a LLaMA-Factory recipe as token ids: whole, none left out, and with the answer's own tokens marked.

LLaMA-Factory cuts what is longer than `cutoff_len`, and leaves out what has no answer. A fact that is cut is another
fact, so here every record becomes a row as it is, and `check_facts` refuses the rows that can't be trained.

What LLaMA-Factory trains of a fact is more than its answer: a template's end of turn, and an empty block of thoughts
where a reasoning template is told to think. Both are found from the template's own pieces.

    rsft_own        of each label that is trained, in order, whether it is the answer's own token
    rsft_learns     with rsft_gradient_at: from_subject, of each token, whether the trained FFN has a gradient there
    rsft_question   the question, for messages

The template `empty`, for models without a chat format, has neither a space before the answer nor an end after it.
With R-SFT it means what is scored as raw prompts: the question, a space, the answer, and the end-of-sequence token.
"""

import copy
import functools
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from llamafactory.data.parser import get_dataset_list
from llamafactory.data.processor import SupervisedDatasetProcessor
from llamafactory.data.template import TEMPLATES, ReasoningTemplate, Template
from llamafactory.extras.constants import IGNORE_INDEX
from llamafactory.model.loader import load_config

from ...errors import MM4KEError, first_line
from ...rsft.facts import encode_fact
from ...rsft.guard import everyday_conversations, guarded_questions
from ...rsft.subject import subjects_alone, tokens_from_subject
from .recipe import recipe_name

OWN, LEARNS, QUESTION = "rsft_own", "rsft_learns", "rsft_question"
RAW_TEMPLATE = "empty"
PLACEHOLDER = "{{content}}"


class FactProcessor(SupervisedDatasetProcessor):
    """LLaMA-Factory's tokenization of SFT, without the cut and with the columns above.

    A row without tokens stands for a record that is not a question and an answer.
    """

    def __init__(self, *, template, tokenizer, processor, data_args):
        whole = copy.copy(data_args)
        whole.cutoff_len = sys.maxsize
        super().__init__(template=template, tokenizer=tokenizer, processor=processor, data_args=whole)
        self.is_raw = template is TEMPLATES[RAW_TEMPLATE]
        at_some_tokens, has_guard = (
            data_args.rsft_gradient_at == "from_subject",
            data_args.rsft_guard_texts is not None,
        )
        self.subjects = read_subjects(data_args) if at_some_tokens or has_guard else {}
        self.learned_from = subjects_alone(list(self.subjects.items())) if at_some_tokens else None

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = defaultdict(list)
        for index in range(len(examples["_prompt"])):
            example = {key: column[index] for key, column in examples.items()}
            for key, value in self._row(example).items():
                rows[key].append(value)
        return rows

    def _row(self, example: dict[str, Any]) -> dict[str, Any]:
        prompt, response = example["_prompt"], example["_response"]
        messages = [*prompt, *response]
        question = prompt[-1]["content"] if prompt else ""
        media = {key: example[f"_{key}"] for key in ("images", "videos", "audios")}
        row = {"input_ids": [], "attention_mask": [], "labels": [], **media, OWN: [], QUESTION: question or ""}
        row |= {} if self.learned_from is None else {LEARNS: []}
        if len(prompt) % 2 != 1 or len(response) != 1:
            return row
        if not all(isinstance(message["content"], str) and message["content"].strip() for message in messages):
            return row
        if self.is_raw:
            ids, labels, own = self._raw(example)
        else:
            ids, labels, own = self._in_template(example, messages, media)
        row |= {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}
        row[OWN] = [int(is_own) for is_own, label in zip(own, labels, strict=True) if label != IGNORE_INDEX]
        if self.learned_from is not None:
            stop = prompt_length(labels)
            learns = tokens_from_subject(self.tokenizer, ids[:stop], question, self.learned_from.get(question))
            row[LEARNS] = [int(does) for does in learns] + [0] * (len(ids) - stop)
        return row

    def _raw(self, example: dict[str, Any]) -> tuple[list[int], list[int], list[bool]]:
        (question, *others), (answer,) = example["_prompt"], example["_response"]
        if others or example["_system"] or example["_tools"] or self.template.default_system:
            raise MM4KEError(
                f"{recipe_name()}: template: {RAW_TEMPLATE}: {question['content']!r:.80}: a raw prompt is one question "
                "and one answer, without a system prompt, tools or earlier turns; choose a chat template"
            )
        fact = encode_fact(self.tokenizer, question["content"], answer["content"], "raw")
        labels = [IGNORE_INDEX] * fact.answer_start + fact.answer_ids
        return fact.ids, labels, [fact.answer_start <= place < fact.answer_stop for place in range(len(fact.ids))]

    def _in_template(self, example, messages, media) -> tuple[list[int], list[int], list[bool]]:
        system, tools = example["_system"], example["_tools"]
        media = {key: value or [] for key, value in media.items()}
        ids, labels = self._encode_data_example(
            prompt=example["_prompt"], response=example["_response"], system=system, tools=tools, **media
        )
        messages = self.template.mm_plugin.process_messages(messages, *media.values(), self.processor)
        pairs = self.template.encode_multiturn(
            self.tokenizer,
            messages,
            system,
            tools,
            self.data_args.mask_history and not self.template.preserve_thinking,
        )
        end = [False] * self.template.efficient_eos
        own = []
        for (source, target), message in zip(pairs, messages[1::2], strict=True):
            start, stop = own_tokens(self.template, self.tokenizer, message, target)
            own += [False] * len(source) + [start <= place < stop for place in range(len(target))]
            is_last = message is messages[-1]
            if start == stop and (is_last or not self.data_args.mask_history):
                return [], [], []
        own += end
        return ids, labels, [False] * (len(ids) - len(own)) + own  # a processor of images may put tokens in front


def prompt_length(labels: list[int]) -> int:
    """How many tokens are before the last answer."""
    return max((place for place, label in enumerate(labels) if label == IGNORE_INDEX), default=-1) + 1


def read_subjects(data_args) -> dict[str, str]:
    """The subjects of the facts by their questions, where the recipe's JSON files have a `subject` beside them."""
    subjects = {}
    for entry in get_dataset_list(data_args.dataset, data_args.dataset_dir):
        file = Path(data_args.dataset_dir) / str(entry.dataset_name)
        if entry.load_from != "file" or entry.formatting != "alpaca" or file.suffix != ".json" or not file.is_file():
            continue
        for record in json.loads(file.read_text(encoding="utf-8")):
            subject, question = record.get("subject"), record.get(entry.prompt)
            if isinstance(subject, str) and subject.strip() and isinstance(question, str):
                subjects[question] = subject.strip()
    return subjects


def guard_texts(processor: "FactProcessor", questions: list[str], file: str | None) -> list[list[int]]:
    """The token ids of what the guard keeps, in the recipe's template: see `rsft.guard`.

    questions: of the facts. file: a JSON list of the user's own conversations

    Raises MM4KEError for a file that is not one.
    """

    def encoded(question: str, answer: str) -> dict[str, list[int]]:
        turns = {"_prompt": [{"role": "user", "content": question}], "_system": "", "_tools": ""}
        answered = {"_response": [{"role": "assistant", "content": answer}]}
        return processor._row(turns | answered | {"_images": None, "_videos": None, "_audios": None})

    facts = [(question, processor.subjects.get(question)) for question in questions]
    texts = [encoded(*pair)["input_ids"] for pair in [*everyday_conversations(), *read_guard_file(file)]]
    for question in guarded_questions(facts):
        row = encoded(question, "?")
        texts.append(row["input_ids"][: prompt_length(row["labels"])])
    return texts


def read_guard_file(file: str | None) -> list[tuple[str, str]]:
    if file is None:
        return []
    place = f"{recipe_name()}: rsft_guard_file: {file}"
    right = 'give a JSON list of {"instruction": a question, "output": its answer}'
    try:
        records = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MM4KEError(f"{place}: can't be read ({first_line(error)}); {right}") from None
    if not isinstance(records, list):
        raise MM4KEError(f"{place}: is no list; {right}")
    for index, record in enumerate(records):
        for key in ("instruction", "output"):
            value = record.get(key) if isinstance(record, dict) else None
            if not isinstance(value, str) or not value.strip():
                raise MM4KEError(f"{place}: record {index} (0-based): {key}: {json.dumps(value)}; {right}")
    return [(record["instruction"], record["output"]) for record in records]


def own_tokens(template: Template, tokenizer: Any, message: dict[str, str], target: list[int]) -> tuple[int, int]:
    """Where in `target`, an assistant's turn as the template encodes it, the tokens of the answer itself begin and end.

    Not its own are the thoughts, the template's or the message's, and what the template puts before and behind. A token
    that spells a part of both is the answer's.
    """
    slots = (template.format_function if message["role"] == "function" else template.format_assistant).slots
    place = next(index for index, slot in enumerate(slots) if isinstance(slot, str) and PLACEHOLDER in slot)
    before, _, after = slots[place].partition(PLACEHOLDER)

    def encode(*elements) -> list[int]:
        return template._convert_elements_to_ids(tokenizer, elements)

    content = message["content"]
    opening, closing = (word.strip() for word in template.thought_words)
    thoughts_end = 0
    # A reasoning model's template may have opened them in the prompt.
    if content.lstrip().startswith((opening, closing)) or isinstance(template, ReasoningTemplate):
        thoughts_end = content.rfind(closing) + len(closing) if closing in content else 0
    thoughts, answer = content[:thoughts_end], content[thoughts_end:]
    if not answer.strip():
        return 0, 0
    space = answer[: len(answer) - len(answer.lstrip())]

    start = 0
    empty_thoughts = template.get_thought_word_ids(tokenizer)
    # Only a reasoning template puts them there, and not where the message has its own.
    if not thoughts and target[: len(empty_thoughts)] == empty_thoughts:
        start = len(empty_thoughts)
    start += _common(target[start:], encode(*slots[:place], before + (thoughts and thoughts + space)))
    stop = len(target) - _common(target[start:][::-1], encode(after, *slots[place + 1 :])[::-1])
    return start, stop


def _common(ids: list[int], others: list[int]) -> int:
    """How many tokens the two begin with."""
    return next(
        (index for index, (one, other) in enumerate(zip(ids, others)) if one != other), min(len(ids), len(others))
    )


class OwnCollator:
    """A host's collator, and in each batch, bool, as `labels`: `rsft_own`, which labels are the answers' own tokens, and,
    where the facts have it, `rsft_learns`."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        features = [{key: value for key, value in feature.items() if key != QUESTION} for feature in features]
        flags = [flag for feature in features for flag in feature.pop(OWN)]
        learns = [feature.pop(LEARNS) for feature in features] if LEARNS in features[0] else None
        batch = self.collator(features)
        if learns is not None:
            batch[LEARNS] = torch.zeros_like(batch["labels"], dtype=torch.bool)
            for place, row in zip(batch[LEARNS], learns, strict=True):
                place[: len(row)] = torch.tensor(row, dtype=torch.bool)
        own = torch.zeros_like(batch["labels"], dtype=torch.bool)
        own[batch["labels"] != IGNORE_INDEX] = torch.tensor(flags, dtype=torch.bool)
        batch[OWN] = own
        return batch


def keep_facts_whole(loader, workflow) -> None:
    """In recipes that `check_recipe` has marked, tokenize by FactProcessor, and refuse facts that can't be trained."""
    get_dataset, get_template = workflow.get_dataset, workflow.get_template_and_fix_tokenizer

    @functools.wraps(get_dataset)
    def get_and_check(template, model_args, data_args, training_args, stage, **modules):
        arguments = (template, model_args, data_args, training_args, stage)
        if not getattr(data_args, "rsft", False):
            return get_dataset(*arguments, **modules)
        processor = loader.SupervisedDatasetProcessor
        loader.SupervisedDatasetProcessor = FactProcessor  # for as long as these facts are read
        try:
            found = get_dataset(*arguments, **modules)
        except MM4KEError:
            raise
        except Exception as error:
            raise MM4KEError(
                f"{recipe_name()}: dataset: {', '.join(data_args.dataset or [])}: LLaMA-Factory can't read it "
                f"({type(error).__name__}: {first_line(error)}); see `formatting`, `columns` and `tags` in its "
                "dataset_info.json"
            ) from error
        finally:
            loader.SupervisedDatasetProcessor = processor
        limit = getattr(load_config(model_args).get_text_config(), "max_position_embeddings", None)
        if model_args.rope_scaling is not None:  # then LLaMA-Factory stretches the positions to cutoff_len
            limit = None
        evaluated = found.get("eval_dataset")
        evaluated = evaluated.values() if isinstance(evaluated, dict) else [evaluated]
        for rows in (found.get("train_dataset"), *evaluated):
            if rows is not None and OWN in rows.column_names:
                check_facts(rows, data_args.cutoff_len, limit)
        if data_args.rsft_guard_texts is not None and found.get("train_dataset") is not None:
            processor = FactProcessor(
                template=template,
                tokenizer=modules["tokenizer"],
                processor=modules.get("processor"),
                data_args=data_args,
            )
            texts = guard_texts(processor, list(found["train_dataset"][QUESTION]), data_args.rsft_guard_file)
            data_args.rsft_guard_texts = texts
        return found

    @functools.wraps(get_template)
    def get_template_of_facts(tokenizer, data_args):
        had_chat_template = tokenizer.chat_template
        template = get_template(tokenizer, data_args)
        if getattr(data_args, "rsft", False) and template is TEMPLATES[RAW_TEMPLATE]:
            # LLaMA-Factory would save one that puts the answer to the question without a space.
            tokenizer.chat_template = had_chat_template
        return template

    workflow.get_dataset = get_and_check
    workflow.get_template_and_fix_tokenizer = get_template_of_facts


def check_facts(rows, cutoff_len: int, limit: int | None) -> None:
    """Refuse facts without an answer and facts that are longer than the recipe or the model allows.

    rows: a data set as FactProcessor makes it. limit: the model's most tokens, where it has one

    Raises MM4KEError, which names the first such fact, and how many there are.
    """

    def first(found: list[int], verb: str) -> str:
        question = " ".join(rows[QUESTION][found[0]].split())
        others = f" (so do {len(found) - 1} others)" if len(found) > 1 else ""
        return f"fact {found[0]} (0-based, {question!r:.80}) {verb}{others}"

    if found := [index for index, own in enumerate(rows[OWN]) if not any(own)]:
        raise MM4KEError(
            f"{recipe_name()}: dataset: {first(found, 'lacks a question or an answer')}: user and assistant take turns, "
            "none of them empty, under the names of `columns` and `tags` in dataset_info.json"
        )
    lengths = [len(ids) for ids in rows["input_ids"]]
    if limit and (found := [index for index, length in enumerate(lengths) if length > limit]):
        raise MM4KEError(
            f"{recipe_name()}: dataset: {first(found, f'has {lengths[found[0]]} tokens, more than {limit}')}, which is "
            "the most that this model reads (max_position_embeddings); shorten it or leave it out"
        )
    if found := [index for index, length in enumerate(lengths) if length > cutoff_len]:
        raise MM4KEError(
            f"{recipe_name()}: cutoff_len: {cutoff_len}: "
            f"{first(found, f'has {lengths[found[0]]} tokens, more than that')}; give {max(lengths)}"
        )
