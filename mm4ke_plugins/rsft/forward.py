"""The losses of R-SFT's samples without work that changes nothing: the same numbers, from a part of the model.

frozen prefix     what lies below the trained FFN comes from memory (prefix.py)
answer rows       the output head, a fifth of a small model, runs for the tokens that predict an answer's token only
frozen FFNs       on a CPU, those above the trained one are computed in a form that suits few tokens

All are exact, in the mathematics and, where a matrix product does not depend on how many rows it is computed with, in
every bit. Both matter: a difference in the last bit grows, by the optimizer's division by the size of a gradient, to
1e-3 of what an update does within some dozen updates.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext

import torch
from torch.nn.functional import silu
from transformers.activations import SiLUActivation

from .layers import FFN_NAMES, decoder_layers
from .losses import Sample, losses_of_rows
from .prefix import FrozenPrefix, Prefix, PrefixCache, replace_forward
from .subject import gradient_only_at

# With fewer rows (tokens) or a smaller matrix the BLAS adds up in another order.
MIN_ROWS = 16
MIN_SIZE = 64


class FastForward:
    """Computes the losses of samples under a model's current parameters.

    model:   a decoder of the transformers library, what is called, or the same as a host has wrapped it
    layer:   the lowest layer with a trained parameter, which must be one of its FFN
    budget:  how many bytes of prefixes are kept
    autocast: the model is not called within autocast by itself, and is to compute in bfloat16
    """

    def __init__(self, model: torch.nn.Module, layer: int, budget: int, *, autocast: bool = False):
        self.model = model
        self.autocast = autocast
        self.prefix = FrozenPrefix(model, layer)
        self.head = model.get_output_embeddings()
        self.cache = PrefixCache(budget)
        _, layers = decoder_layers(model)
        ffns = [child for above in layers[layer:] for name, child in above.named_children() if name in FFN_NAMES]
        self.ffns = [(ffn, forward) for ffn in ffns if (forward := frozen_ffn(ffn))]

    def losses(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses that are trained and those that are judged: see `losses_of_rows`."""
        return losses_of_rows(
            self.logits(samples), [sample.targets for sample in samples], [sample.own for sample in samples]
        )

    def logits(self, samples: Sequence[Sample]) -> tuple[torch.Tensor, ...]:
        """Of each sample (rows, vocabulary). Samples of other lengths are padded to the longest."""
        tokens = max(len(sample.ids) for sample in samples)
        ids = torch.stack([_pad(sample.ids, tokens) for sample in samples])
        mask = torch.stack([_pad(sample.ids.new_ones(sample.length), tokens) for sample in samples])
        rows = torch.cat(
            [
                index * tokens + torch.arange(sample.rows.start, sample.rows.stop, device=ids.device)
                for index, sample in enumerate(samples)
            ]
        )

        def only_answer_rows(module, args):
            return (args[0].flatten(0, 1)[rows][None],)

        learns = None
        if samples[0].learns is not None:
            learns = torch.stack([_pad(sample.learns, tokens) for sample in samples])
        prefix = self._prefix(samples, tokens)
        with ExitStack() as undo:
            undo.enter_context(gradient_only_at(learns, self.model))
            undo.enter_context(self.prefix.given(prefix))
            undo.callback(self.head.register_forward_pre_hook(only_answer_rows).remove)
            for ffn, forward in self.ffns:
                undo.callback(replace_forward(ffn, forward))
            logits = self._forward(input_ids=ids, attention_mask=mask).logits[0]
        return logits.split([len(sample.rows) for sample in samples])

    def _forward(self, **inputs: torch.Tensor):
        device_type = inputs["input_ids"].device.type
        # Autocast that is not enabled would switch off a host's.
        with torch.autocast(device_type, dtype=torch.bfloat16) if self.autocast else nullcontext():
            return self.model(**inputs, use_cache=False)

    def _prefix(self, samples: Sequence[Sample], tokens: int) -> Prefix:
        def compute(index: int) -> Prefix:
            # Alone and padded as in its own batch: the numbers of a visit, also when it was first scored among others.
            sample = samples[index]
            mask = _pad(sample.ids.new_ones(sample.length), len(sample.ids))
            prefix = self.prefix.compute(self._forward, input_ids=sample.ids[None], attention_mask=mask[None])
            return Prefix(
                *(
                    None if part is None else part[0, : sample.length].clone()
                    for part in (prefix.hidden, prefix.attention)
                )
            )

        parts = self.cache.fetch([sample.key for sample in samples], compute)
        return Prefix(
            torch.stack([_pad(part.hidden, tokens) for part in parts]),
            None if parts[0].attention is None else torch.stack([_pad(part.attention, tokens) for part in parts]),
        )


class _FrozenFFN(torch.autograd.Function):
    """down (silu(gate x) * up x), computed with the weights on the left.

    PyTorch gives a matrix product with few rows (x: one sample, 40 to 60 tokens) to the BLAS in a form that two threads
    share badly: here Wx' takes two thirds of the time of xW'. In between nothing need be turned back, since the products
    meet element by element. That it is one node of the graph instead of five saves some more. The sums have the same
    order, so the bits are the same.
    """

    @staticmethod
    def forward(ctx, x, gate, up, down):
        columns = x.reshape(-1, x.shape[-1]).t()
        gated, upper = gate @ columns, up @ columns
        activated = silu(gated)
        ctx.save_for_backward(gated, upper, activated)
        ctx.weights = gate, up, down  # frozen: nothing changes them between forward and backward
        return (down @ (activated * upper)).t().contiguous().view(x.shape)

    @staticmethod
    def backward(ctx, gradient):
        gated, upper, activated = ctx.saved_tensors
        gate, up, down = ctx.weights
        inner = down.t() @ gradient.reshape(-1, gradient.shape[-1]).t()
        columns = up.t() @ (inner * activated)
        columns += gate.t() @ torch.ops.aten.silu_backward(inner.mul_(upper), gated)
        return columns.t().contiguous().view(gradient.shape), None, None, None


def frozen_ffn(ffn: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A forward that can stand in for this FFN's. None where it can't: it is trained, has biases or another form, is on
    another device, in another dtype than float32, or tiny."""
    parts = [getattr(ffn, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(type(part) is torch.nn.Linear for part in parts) or len(list(ffn.parameters())) != len(parts):
        return None
    if not isinstance(getattr(ffn, "act_fn", None), (torch.nn.SiLU, SiLUActivation)):
        return None
    weights = [part.weight for part in parts]
    if min(weights[0].shape) < MIN_SIZE:
        return None
    if any(weight.requires_grad or weight.device.type != "cpu" or weight.dtype != torch.float32 for weight in weights):
        return None

    def forward(x: torch.Tensor) -> torch.Tensor:
        return _FrozenFFN.apply(x, *weights) if x[..., 0].numel() >= MIN_ROWS else type(ffn).forward(ffn, x)

    return forward


def active_dropout(model: torch.nn.Module) -> str | None:
    """Which module drops activations in training, and at which rate: "model.layers.0.self_attn.attention_dropout: 0.1".

    None in a model without dropout, like nearly all of today's.
    """
    for name, module in model.named_modules():
        rates = {"p": module.p} if isinstance(module, torch.nn.Dropout) else vars(module)
        for key, rate in rates.items():
            if (key == "p" or "dropout" in key) and isinstance(rate, float) and rate > 0:
                return f"{name}.{key}: {rate}"
    return None


def _pad(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """Zeros behind the entries, up to `length` of them along the first dimension."""
    padded = tensor.new_zeros(length, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return padded
