"""Where a fact is learned: at every token (Algorithm 1), or from its subject to the end of its question.

Every prompt of a chat template begins with the same tokens and ends with the same ones, and most questions begin with
the same words. An FFN that may change its output there answers every question with what it was taught. From the subject
on a token has seen what the question is about; ROME (arXiv 2202.05262) found that middle layers fetch there what a model
knows of it. The words behind the subject, and the question mark, have seen what is asked of it as well, so that another
question about the same subject is another one to the FFN. Where several facts are about one subject, they need more to
be told apart, and are learned at all of their question. So with `gradient_at: from_subject`

    forward     as ever: the loss is that of the model as it is
    backward    the gradient reaches the trained FFN through its output at these tokens, nowhere else
"""

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedTokenizerBase

from .layers import FFN_NAMES, decoder_layers


@contextmanager
def gradient_only_at(places: torch.Tensor | None, model: torch.nn.Module) -> Iterator[None]:
    """Within the block the outputs of the model's trained FFNs have a gradient at some tokens only. None: at all of them.

    places: bool, (samples, tokens)
    """

    def keep(module, args, output):
        return torch.where(places.to(output.device)[..., None], output, output.detach())

    with ExitStack() as hooks:
        for ffn in trained_ffns(model) if places is not None else ():
            hooks.callback(ffn.register_forward_hook(keep).remove)
        yield


def trained_ffns(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The FFNs of the decoder's layers that have a parameter with a gradient."""
    _, layers = decoder_layers(model)
    ffns = [child for layer in layers for name, child in layer.named_children() if name in FFN_NAMES]
    return [ffn for ffn in ffns if any(parameter.requires_grad for parameter in ffn.parameters())]


def tokens_from_subject(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], question: str, subject: str | None
) -> list[bool]:
    """Which of a prompt's tokens spell the question from its subject on.

    ids:     the tokens of the prompt, in whatever template, up to where the answer begins
    subject: see `subjects_alone`

    Without a subject in the question: from its first name on, see `first_name`. Where the question is not found among
    the tokens, since the tokenizer writes it in another way: all of them.
    """

    def text_of(count: int) -> str:
        return tokenizer.decode(ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    begin = text_of(len(ids)).rfind(question)
    if begin < 0:
        return [True] * len(ids)
    spelled = re.search(re.escape(subject), question, re.IGNORECASE) if subject else None
    start = spelled.start() if spelled else first_name(question)
    counts = range(len(ids) + 1)
    # From the token with the first character, to the one before that with the first character behind.
    first = bisect_right(counts, begin + start, key=lambda n: len(text_of(n)))
    # A token may end within a character, which then shows as the one that stands for what can't be decoded.
    last = bisect_left(
        counts, begin + len(question), key=lambda n: len(text_of(n).rstrip("\N{REPLACEMENT CHARACTER}"))
    )
    return [first - 1 <= index < last for index in range(len(ids))]


def subjects_alone(facts: Sequence[tuple[str, str | None]]) -> dict[str, str | None]:
    """From where each fact is learned, by its question: its subject, or all of the question if others share the subject.

    facts: questions and their subjects
    """
    counts = Counter(subject.lower() for _, subject in dict(facts).items() if subject)
    return {question: question if subject and counts[subject.lower()] > 1 else subject for question, subject in facts}


def learned_tokens(ids: Sequence[Sequence[int]], learns: Sequence[Sequence[bool] | None]) -> frozenset[int]:
    """The ids of all tokens at which facts are learned; none where they are learned at all of their tokens."""
    facts = zip(ids, learns, strict=True)
    return frozenset(token for tokens, at in facts if at for token, does in zip(tokens, at, strict=True) if does)


def first_name(question: str) -> int:
    """Where a question has its first word with a capital or a digit, the first word aside; 0 where it has none."""
    words = list(re.finditer(r"\w+", question))[1:]
    return next((word.start() for word in words if word[0] != word[0].lower() or word[0].isdigit()), 0)
