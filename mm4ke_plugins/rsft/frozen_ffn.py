"""A frozen FFN on a CPU: the same numbers, computed with the weights on the left.

    down (silu(gate x) * up x)        x: one sample, 40 to 60 tokens

PyTorch gives a matrix product with few rows to the BLAS in a form that two threads share badly: here Wx' takes two
thirds of the time of xW'. In between nothing need be turned back, since the products meet element by element. That it
is one node of the graph instead of five saves some more. The sums have the same order, so the bits are the same.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import silu
from transformers.activations import SiLUActivation

# With fewer rows (tokens) or a smaller matrix the BLAS adds up in another order.
MIN_ROWS = 16
MIN_SIZE = 64


class _FrozenFFN(torch.autograd.Function):
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
