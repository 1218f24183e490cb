"""Where a fact is learned: at every token (Algorithm 1), or at the tokens of its subject only.

Every prompt of a chat template begins with the same tokens and ends with the same ones, and most questions share their
small words. An FFN that may change its output there answers every question with what it was taught. At the subject's
last token, ROME (arXiv 2202.05262) found, middle layers fetch what a model knows of it. So with `gradient_at: subject`

    forward     as ever: the loss is that of the model as it is
    backward    the gradient reaches the trained FFN through its output at the subject's tokens, nowhere else

Where a fact has no subject, or its question doesn't spell it, these are the tokens of the question's words.
"""

import re
from bisect import bisect_left, bisect_right
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


def tokens_of_subject(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], question: str, subject: str | None
) -> list[bool]:
    """Which of a prompt's tokens spell the subject, each time that the question has it.

    ids: the tokens of the prompt, in whatever template, up to where the answer begins

    Without a subject in the question: which spell its words. Where the question is not found among the tokens, since
    the tokenizer writes it in another way: all of them.
    """

    def text_of(count: int) -> str:
        return tokenizer.decode(ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    begin = text_of(len(ids)).rfind(question)
    if begin < 0:
        return [True] * len(ids)
    counts = range(len(ids) + 1)

    def spells(first: int, last: int) -> range:
        """The tokens from the one with the character `first` to the one before `last` of the text."""
        begun = bisect_right(counts, first, key=lambda count: len(text_of(count)))
        # A token may end within a character, which then shows as the one that stands for what can't be decoded.
        ended = bisect_left(counts, last, key=lambda count: len(text_of(count).rstrip("\N{REPLACEMENT CHARACTER}")))
        return range(begun - 1, ended)

    wanted = [match.span() for match in re.finditer(re.escape(subject), question, re.IGNORECASE)] if subject else []
    wanted = wanted or [match.span() for match in re.finditer(r"\w+", question)]
    found = [False] * len(ids)
    for first, last in wanted:
        for place in spells(begin + first, begin + last):
            found[place] = True
    return found
