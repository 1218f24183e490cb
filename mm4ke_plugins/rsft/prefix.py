"""The frozen prefix: what lies below the lowest trained FFN gives a sample the same numbers during the whole training.

    layer 0 ... n-1      all of it              constant
    layer n              up to its attention    constant
    layer n              its FFN                trained
    layers above, head                          see another input after every update

So each sample's hidden states before layer n, and the output of layer n's attention, are computed once and kept. From
then on the layers below hand through what they are given, and the attention answers from memory.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch

from .layers import decoder_layers

# How much is kept, in megabytes, where nobody says otherwise.
PREFIX_CACHE_MB = 512


@dataclass(frozen=True)
class Prefix:
    """hidden: the hidden states before layer n. attention: what its attention returned, None in a layer without one.

    Tensors of the shape (samples, tokens, hidden size), in the dtype the model computed them in.
    """

    hidden: torch.Tensor
    attention: torch.Tensor | None

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in (self.hidden, self.attention) if tensor is not None]


class _Complete(Exception):
    """Ends a forward of which nothing more is wanted."""


@contextmanager
def stop_forward(module: torch.nn.Module) -> Iterator[None]:
    """Within the block the model's forward ends behind this module, and so does the block."""

    def leave(module, args, output):
        raise _Complete

    hook = module.register_forward_hook(leave)
    try:
        with suppress(_Complete):
            yield
    finally:
        hook.remove()


class FrozenPrefix:
    """Computes the prefixes of one model, and has the model use them.

    model: a decoder of the transformers library in which nothing below layer `layer` is trained
    layer: the lowest layer with a trained FFN, counted from 0
    """

    def __init__(self, model: torch.nn.Module, layer: int):
        _, layers = decoder_layers(model)
        self.below = list(layers[:layer])
        self.layer = layers[layer]
        # In all of the library's decoders the attention sees the layer's input only, and has this in its name.
        attentions = [child for name, child in self.layer.named_children() if name.endswith(("attn", "attention"))]
        self.attention = attentions[0] if len(attentions) == 1 else None

        self.layers_return_tuples = False
        self.attention_returns = 2  # how many things; None for a tensor that is not in a tuple

    @torch.no_grad()
    def compute(self, forward: Callable, **inputs: torch.Tensor) -> Prefix:
        """The prefix of a batch: the model's forward, called with these inputs, as far as layer n's attention."""
        found = {}

        def leave_layer_below(module, args, output):
            self.layers_return_tuples = isinstance(output, tuple)

        def enter_layer(module, args, kwargs):
            found["hidden"] = args[0] if args else kwargs["hidden_states"]
            if self.attention is None:
                raise _Complete

        def leave_attention(module, args, output):
            self.attention_returns = len(output) if isinstance(output, tuple) else None
            found["attention"] = output[0] if isinstance(output, tuple) else output
            raise _Complete

        with ExitStack() as hooks:
            for layer in self.below[-1:]:
                hooks.callback(layer.register_forward_hook(leave_layer_below).remove)
            hooks.callback(self.layer.register_forward_pre_hook(enter_layer, with_kwargs=True).remove)
            if self.attention is not None:
                hooks.callback(self.attention.register_forward_hook(leave_attention).remove)
            with suppress(_Complete):
                forward(**inputs)
        return Prefix(found["hidden"], found.get("attention"))

    @contextmanager
    def given(self, prefix: Prefix) -> Iterator[None]:
        """Within the block the model's forward begins with this prefix instead of computing it."""

        def hand_through(hidden_states, *args, **kwargs):
            return (hidden_states,) if self.layers_return_tuples else hidden_states

        def answer(*args, **kwargs):
            if self.attention_returns is None:
                return prefix.attention
            return prefix.attention, *[None] * (self.attention_returns - 1)

        def enter_layer(module, args, kwargs):
            if args:
                return (prefix.hidden, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": prefix.hidden}

        with ExitStack() as undo:
            for layer in self.below:
                undo.callback(replace_forward(layer, hand_through))
            if self.attention is not None:
                undo.callback(replace_forward(self.attention, answer))
            undo.callback(self.layer.register_forward_pre_hook(enter_layer, with_kwargs=True).remove)
            yield


def replace_forward(module: torch.nn.Module, forward: Callable) -> Callable[[], None]:
    """Have the module compute something else; the function returned puts back what it was."""
    before = vars(module).get("forward")  # a host may have put one there itself
    module.forward = forward

    def undo() -> None:
        if before is None:
            del module.forward
        else:
            module.forward = before

    return undo


class PrefixCache:
    """Keeps prefixes of samples up to a budget of bytes. Those that come first stay, since every epoch is the same
    round; the prefixes for which there is no room live until the next call."""

    def __init__(self, budget: int):
        self.budget = budget
        self.used = 0
        self.kept: dict[Hashable, Prefix] = {}
        self.passing: dict[Hashable, Prefix] = {}

    def fetch(self, keys: Sequence[Hashable], compute: Callable[[int], Prefix]) -> list[Prefix]:
        """The prefixes of these samples; `compute(index)` makes the one of `keys[index]` where it is not there."""
        found = {}
        for index, key in enumerate(keys):
            prefix = self.kept.get(key) or self.passing.get(key) or found.get(key)
            if prefix is None:
                prefix = compute(index)
                size = sum(tensor.nbytes for tensor in prefix.tensors())
                if self.used + size <= self.budget:
                    self.kept[key] = prefix
                    self.used += size
            found[key] = prefix
        self.passing = {key: prefix for key, prefix in found.items() if key not in self.kept}
        return [found[key] for key in keys]
