"""A guard in R-SFT: the trained FFN is held to what it was, on the inputs that it gets from what must stay.

Layer n's FFN f maps the normed hidden state x of a token to what is added to the residual stream. With the base's f0,
and h(x) the residual stream behind that layer in the base, every update of R-SFT also lowers

    weight * ( mean over ROWS tokens x of the guard, chosen anew for every update,  |f(x) - f0(x)|^2 / |h(x)|^2
             + mean over the tokens x that all prompts begin with,                  the same )

What lies below layer n is frozen, so the inputs x and the targets f0(x) are computed once, as far as layer n. An update
then costs one pass of ROWS tokens through one FFN: no teacher, and no pass through the other layers.

With several trained layers, what a lower one changed is mixed by attention and reaches the upper ones, on inputs that the
base never had; there an upper one would amplify what is left of the change. So every update also reads READ of the texts
with the model as it is, as far as the last trained layer, and lowers for each trained layer above the first, over their
tokens, the mean of |f(x) - f0(x)|^2 / |h(x)|^2 at the inputs x that it has now.

The guard's tokens are of everyday conversations (guard.txt) and questions (guard_questions.txt), and, for facts with a
subject, of the facts' questions with the subjects of other facts: what is asked of one thing must not be answered of all
things. Where facts are learned at some tokens only, three quarters of the ROWS are of tokens that are spelled like one of
these, such as question marks, since there the FFN is pulled most. AlphaEdit (arXiv 2410.02355) holds closed-form edits to the
same outputs, by projecting them off the inputs' principal directions.
"""

import copy
import re
from collections.abc import Collection, Sequence
from importlib.resources import files

import torch
from transformers import PreTrainedTokenizerBase

from ..knowedit.prompts import chat_prompt
from .facts import encode_fact
from .layers import decoder_layers
from .prefix import stop_forward

# How many tokens of the guard take part in one update, and which share of them is spelled like those that learn.
ROWS, ALIKE = 512, 0.75
BATCH = 32  # texts that are read together
READ = 12  # texts that are read anew in an update, where several layers are trained
# How often each everyday question is asked, with other words each time.
ROUNDS = 8
# With how many other facts' subjects the guard asks each fact's question, and how many such questions there are at most.
SWAPS, MOST_SWAPPED = 4, 1000


def everyday_conversations() -> list[tuple[str, str]]:
    """Questions and answers of daily life, written for this project; none is asked by `known_facts`."""
    pairs = (line.split(" | ") for line in _lines("guard.txt"))
    return [(question.strip(), answer.strip()) for question, answer in pairs]


def everyday_questions() -> list[str]:
    """What else people ask, without answers, written for this project; none is asked by `known_facts`."""
    lines = _lines("guard_questions.txt")
    words = {
        name: listed.split(", ") for name, is_list, listed in (line.partition(" = ") for line in lines) if is_list
    }
    questions = [line for line in lines if " = " not in line]

    def filled(number: int, turn: int) -> str:
        # A second place of the same kind gets another word, and so does the next question.
        places = iter(range(number + turn, number + turn + 100, 3))
        return re.sub(r"{(\w+)}", lambda kind: (of := words[kind[1]])[next(places) % len(of)], questions[number])

    return list(dict.fromkeys(filled(number, turn) for turn in range(ROUNDS) for number in range(len(questions))))


def _lines(name: str) -> list[str]:
    lines = (files(__package__) / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def swapped_questions(facts: Sequence[tuple[str, str | None]]) -> list[str]:
    """Each fact's question with the subjects of the SWAPS facts after it; a fact is a question and its subject.

    Facts without a subject, or whose question doesn't have it, are left out, and what comes out as a fact's question.
    Of more than MOST_SWAPPED every so many one is taken.
    """
    with_subject = [(question, subject) for question, subject in facts if subject and subject in question]
    asked = {question for question, _ in facts}
    count = len(with_subject)
    swapped = [
        question.replace(subject, with_subject[(place + distance) % count][1])
        for place, (question, subject) in enumerate(with_subject)
        for distance in range(1, min(SWAPS, count - 1) + 1)
    ]
    found = [question for question in dict.fromkeys(swapped) if question not in asked]
    return found[:: -(-len(found) // MOST_SWAPPED) or 1]


def guarded_questions(facts: Sequence[tuple[str, str | None]]) -> list[str]:
    """What the guard asks without an answer; a fact is a question and its subject."""
    return [*everyday_questions(), *swapped_questions(facts)]


def guard_texts(
    tokenizer: PreTrainedTokenizerBase, facts: Sequence[tuple[str, str | None]], prompt_format: str
) -> list[list[int]]:
    """The token ids of the guard's conversations in one of PROMPT_FORMATS; a fact is a question and its subject."""
    conversations = [
        encode_fact(tokenizer, question, answer, prompt_format).ids for question, answer in everyday_conversations()
    ]
    return conversations + [
        chat_prompt(tokenizer, question) if prompt_format == "chat" else tokenizer(question).input_ids
        for question in guarded_questions(facts)
    ]


class Guard:
    """Holds FFNs of a model to what they are now, before the first update."""

    def __init__(
        self,
        model: torch.nn.Module,
        ffns: Sequence[torch.nn.Module],
        texts: Sequence[Sequence[int]],
        weight: float,
        learned: Collection[int] = (),
    ):
        """
        model:   a decoder of the transformers library
        ffns:    those of its FFNs that are trained
        texts:   the token ids of the guard's conversations
        weight:  of the guard's loss, above 0
        learned: the ids of the tokens at which facts are learned, where that is not at all of them
        """
        self.weight = weight
        self.model, self.ffns = model, ffns
        _, layers = decoder_layers(model)
        self.above = [next(layer for layer in layers if ffn in layer.children()) for ffn in self.ffns]
        shared = _common_length(texts)
        found: list[list] = [[None] * len(texts) for _ in self.ffns]
        firsts = [shared if number else 0 for number in range(len(texts))]
        numbers = _equally_long(texts)
        self.batches = [[texts[number] for number in batch] for batch in numbers]
        self.sizes = torch.tensor([len(batch) for batch in self.batches], dtype=torch.float)
        for places, batch in zip(numbers, self.batches, strict=True):
            for place, (inputs, behind) in enumerate(_pass(model, self.ffns, self.above, batch)):
                for row, number in enumerate(places):
                    found[place][number] = inputs[row, firsts[number] :], behind[row, firsts[number] :]
        # Of the rows below.
        tokens = [token for ids, first in zip(texts, firsts, strict=True) for token in ids[first:]]
        self.inputs, self.targets, self.scales = [], [], []
        for ffn, parts in zip(self.ffns, found, strict=True):
            inputs, behind = (torch.cat(tensors).float() for tensors in zip(*parts, strict=True))
            self.inputs.append(inputs)
            with torch.no_grad():
                self.targets.append(ffn(inputs))
            self.scales.append(1 / behind.square().sum(1))
        self.bases = [copy.deepcopy(ffn).requires_grad_(False) for ffn in ffns[1:]]
        self.shared = shared
        self.alike = torch.tensor([row for row, token in enumerate(tokens) if row >= shared and token in learned])

    def loss(self, number: int) -> torch.Tensor:
        """The guard's loss at the update with this number, by which its tokens are chosen; a scalar with a graph."""
        generator = torch.Generator().manual_seed(number)
        total = 0.0
        for place in range(len(self.ffns)):
            count = len(self.inputs[place])
            if count > self.shared:
                rows = torch.randint(self.shared, count, (min(ROWS, count - self.shared),), generator=generator)
                if len(self.alike):
                    part = rows[: int(ALIKE * len(rows))]
                    part[:] = self.alike[torch.randint(len(self.alike), part.shape, generator=generator)]
                total = total + self._mean(place, rows.to(self.inputs[place].device))
            if self.shared:
                total = total + self._mean(place, slice(self.shared))
        if self.bases:
            total = total + self._as_it_is(generator)
        return self.weight * total

    def _as_it_is(self, generator: torch.Generator) -> torch.Tensor:
        """The mean over some texts that the model reads as it is, summed over the trained layers above the first."""
        batch = self.batches[int(torch.multinomial(self.sizes, 1, generator=generator))]
        chosen = torch.randperm(len(batch), generator=generator)[:READ].tolist()
        was_training = self.model.training
        self.model.eval()  # without dropout
        passed = _pass(self.model, self.ffns, self.above, [batch[number] for number in chosen])
        self.model.train(was_training)
        total = 0.0
        for ffn, base, states in zip(self.ffns[1:], self.bases, passed[1:], strict=True):
            inputs, behind = (state[:, self.shared :].flatten(0, 1).float() for state in states)
            change = ffn(inputs) - base(inputs)
            total = total + (change.square().sum(1) / behind.square().sum(1)).mean()
        return total

    def _mean(self, place: int, rows: torch.Tensor | slice) -> torch.Tensor:
        change = self.ffns[place](self.inputs[place][rows]) - self.targets[place][rows]
        return (change.square().sum(1) * self.scales[place][rows]).mean()


@torch.no_grad()
def _pass(model, ffns, layers, texts: Sequence[Sequence[int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each FFN its inputs, and the hidden states behind its layer, (texts, tokens, hidden size)."""
    inputs, behind = {}, {}

    def enter_ffn(ffn, args):
        inputs[ffn] = args[0].detach()

    def leave_layer(layer, args, output):
        behind[layer] = (output[0] if isinstance(output, tuple) else output).detach()

    hooks = [ffn.register_forward_pre_hook(enter_ffn) for ffn in ffns]
    hooks += [layer.register_forward_hook(leave_layer) for layer in layers]
    try:
        # An FFN that is trained in float32 in a model of 16 bits.
        mixed = len({parameter.dtype for parameter in model.parameters()}) > 1
        autocast = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=mixed)
        with stop_forward(layers[-1]), autocast:
            model(input_ids=torch.tensor(texts, device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [(inputs[ffn], behind[layer]) for ffn, layer in zip(ffns, layers, strict=True)]


def _equally_long(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The numbers of the texts in batches, at most BATCH in each, all of one length, so that nothing has to be padded."""
    by_length: dict[int, list[int]] = {}
    for number, ids in enumerate(texts):
        by_length.setdefault(len(ids), []).append(number)
    return [alike[start : start + BATCH] for alike in by_length.values() for start in range(0, len(alike), BATCH)]


def _common_length(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all texts begin with, if there are several; at least one token of each is its own."""
    shortest = min(len(ids) for ids in texts)
    length = next((k for k in range(shortest) if len({ids[k] for ids in texts}) > 1), shortest - 1)
    return length if len(texts) > 1 else 0
