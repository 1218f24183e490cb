"""Equations 5 and 6 of arXiv 2506.12384 in pure torch: the knowledge delta, its top-p entries, its weight.

    delta  = theta_sft - theta_base                        Equation 5
    merged = theta_base + weight * Top_density(delta)      Equation 6, one weight matrix at a time

`weight` is the paper's 1 - alpha, `density` its p. Everything is computed in float32, also where a checkpoint
stores less: a delta of bfloat16 numbers has few distinct values, and rounding belongs at the end. On a CPU it is
computed a piece at a time, so that no float32 copy of a matrix is ever in memory.
"""

from collections.abc import Iterable, Sequence

import torch

from ..storage.tensors import equal, pieces, require_finite
from .top_p import LargestEntries, count_kept, sample_of


@torch.no_grad()
def merge(
    base: torch.Tensor,
    edited: Sequence[torch.Tensor],
    weights: Sequence[float],
    densities: Sequence[float],
    *,
    names: Sequence[str],
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Add to `base` the weighted top-p entries of each edited tensor's delta (Equations 5 and 6).

    base:      any shape and device, floating point
    edited:    tensors of that shape on that device, of any floating dtype. The deltas of several add up
    weights:   one number for each edited tensor; 0 leaves it out
    densities: the share of each delta's entries that is kept, from 0 to 1. A tensor of fewer than two dimensions
               (a norm, a bias) is kept whole: the paper prunes weight matrices, and a vector of which every entry
               acts on a whole channel has nothing redundant to drop
    names:     what an error calls `base` and each edited tensor, in this order
    dtype:     of the result, by default base's. The sum is float32 and is rounded once, to this

    Returns `base` itself, cast to `dtype`, where no edited tensor with a weight differs from it.
    Raises MM4KEError for a NaN or an infinite entry and for a density out of range.
    """
    for name, tensor in zip(names, (base, *edited), strict=True):
        require_finite(tensor, name)
    dtype = dtype or base.dtype
    original = base.reshape(-1)
    changes = []
    for tensor, weight, density in zip(edited, weights, densities, strict=True):
        if weight == 0 or equal(base, tensor):
            continue
        changed = tensor.reshape(-1)
        count = count_kept(density if tensor.ndim >= 2 else 1, tensor.numel())
        if count == 0:
            keep = torch.zeros_like
        elif count == tensor.numel():
            keep = torch.positive
        else:

            def deltas(changed=changed) -> Iterable[torch.Tensor]:
                return (part.float() - start.float() for part, start in zip(pieces(changed), pieces(original)))

            keep = LargestEntries(count, tensor.numel(), deltas, sample_of(changed) - sample_of(original)).keep
        changes.append((pieces(changed), weight, keep))
    if not changes:
        return base.to(dtype)
    merged = torch.empty_like(original, dtype=dtype)
    for index, (start, result) in enumerate(zip(pieces(original), pieces(merged))):
        start = total = start.float()
        for parts, weight, keep in changes:
            total = torch.add(total, keep(parts[index].float() - start), alpha=weight)
        result.copy_(total)
    return merged.view(base.shape)
