"""Equations 5 and 6 of arXiv 2506.12384 in pure torch: the knowledge delta, its top-p entries, its weight.

    delta  = theta_sft - theta_base                        Equation 5
    merged = theta_base + weight * Top_density(delta)      Equation 6, one weight matrix at a time

`weight` is the paper's 1 - alpha, `density` its p. Everything is computed in float32, also where a checkpoint
stores less: a delta of bfloat16 numbers has few distinct values, and rounding belongs at the end. On a CPU it is
computed a piece at a time, so that no float32 copy of a matrix is ever in memory.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from .errors import MM4KEError

# Entries that a CPU works on at once: few enough to stay in its cache from one operation to the next.
CHUNK = 1 << 17
SAMPLE = 1 << 16


def top_p_mask(delta: torch.Tensor, density: float) -> torch.Tensor:
    """Mark the `round(density * delta.numel())` entries of `delta` that are largest in absolute value.

    delta:   any shape and device, floating point without NaN, compared in float32
    density: from 0 (no entry) to 1 (all). `round` is Python's: half a number goes to the even one
    returns: bool, delta's shape and device. The count is exact: of equal entries those with the lowest index in
             row-major order are taken, so the result is the same on every device

    Raises MM4KEError for a density out of range.
    """
    count = _count(density, delta.numel())
    if count in (0, delta.numel()):
        return torch.full_like(delta, bool(count), dtype=torch.bool)
    flat = delta.detach().reshape(-1).float()
    top = _Largest(count, flat.numel(), lambda: _parts(flat), _sample(flat))
    mask = torch.empty(delta.shape, dtype=torch.bool, device=delta.device)
    for part, marks in zip(_parts(flat), _parts(mask.view(-1))):
        top.mark(part, marks)
    return mask


class _Largest:
    """The largest `count` of `numel` float32 magnitudes, among equal ones the first.

    parts:  gives the entries piece by piece, again and again. They are read once, or more often if the sample misleads
    sample: some of the entries. It tells between which two numbers the smallest magnitude to be kept is; how many
            are larger, and which of the few in between it is, is then counted

    On a CPU this takes a twentieth of the time of a full sort or less, and a fifth of that of `torch.kthvalue`.
    """

    def __init__(
        self, count: int, numel: int, parts: Callable[[], Iterable[torch.Tensor]], sample: torch.Tensor
    ) -> None:
        sample = sample.abs().sort().values
        place = (1 - count / numel) * len(sample)
        margin = 2 * math.sqrt(len(sample)) + 1  # four standard deviations or more
        low, high = int(place - margin), int(place + margin)
        brackets = [
            (float(sample[low]) if low >= 0 else 0.0, float(sample[high]) if high < len(sample) else math.inf),
            (0.0, math.inf),
        ]
        guess = float(sample[min(int(place), len(sample) - 1)])
        if int((sample == guess).sum()) > 1:  # many entries are equal to it, so it may well be the one
            brackets.insert(0, (guess, guess))
        for lowest, highest in brackets:
            larger, within, between = 0, 0, []
            for part in parts():
                magnitudes = abs(_comparable(part))
                is_larger = magnitudes > highest
                is_within = (magnitudes >= lowest) ^ is_larger
                larger += _how_many(is_larger)
                within += _how_many(is_within)
                if lowest < highest:
                    between.append(torch.as_tensor(magnitudes[is_within]))
            if larger < count <= larger + within:
                break
        # `ties`: of the entries that equal the threshold, how many are still to be kept.
        self.threshold, self.ties = lowest, count - larger
        if lowest < highest:
            candidates = torch.cat(between)
            self.threshold = float(candidates.kthvalue(within - self.ties + 1).values)
            self.ties -= _how_many(_comparable(candidates) > self.threshold)

    def mark(self, part: torch.Tensor, mask: torch.Tensor) -> None:
        """Write to `mask` which entries of the next part are kept. Parts must come in their order."""
        magnitudes = abs(_comparable(part))
        mask.copy_(torch.as_tensor(magnitudes > self.threshold))
        mask[self._kept_ties(magnitudes)] = True

    def keep(self, part: torch.Tensor) -> torch.Tensor:
        """The next part with zeros for the entries that are not kept."""
        kept = torch.nn.functional.hardshrink(part, self.threshold)
        if self.threshold:
            ties = self._kept_ties(abs(_comparable(part)))
            kept[ties] = part[ties]
        return kept

    def _kept_ties(self, magnitudes: "np.ndarray | torch.Tensor") -> torch.Tensor:
        """Where the next of those entries are that equal the threshold and are kept."""
        if not self.ties:
            return torch.empty(0, dtype=torch.int64)
        equal_to_it = magnitudes == self.threshold
        found = np.flatnonzero(equal_to_it) if isinstance(magnitudes, np.ndarray) else equal_to_it.nonzero()[:, 0]
        found = torch.as_tensor(found[: self.ties])
        self.ties -= len(found)
        return found


def _count(density: float, numel: int) -> int:
    if not 0 <= density <= 1:
        raise MM4KEError(f"density: {density}: give a share from 0 to 1")
    return round(density * numel)


def _parts(flat: torch.Tensor) -> Sequence[torch.Tensor]:
    """A tensor of one dimension in pieces: many for a CPU's cache, one for a GPU."""
    return flat.split(CHUNK) if flat.device.type == "cpu" else (flat,)


def _sample(flat: torch.Tensor) -> torch.Tensor:
    return flat[:: max(64, len(flat) // SAMPLE)].float()


def _comparable(tensor: torch.Tensor) -> "np.ndarray | torch.Tensor":
    """On a CPU, NumPy compares, counts and picks several times faster than torch."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _how_many(mask: "np.ndarray | torch.Tensor") -> int:
    return int(np.count_nonzero(mask) if isinstance(mask, np.ndarray) else mask.count_nonzero())


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
        count = _count(density if tensor.ndim >= 2 else 1, tensor.numel())
        if count == 0:
            keep = torch.zeros_like
        elif count == tensor.numel():
            keep = torch.positive
        else:

            def deltas(changed=changed) -> Iterable[torch.Tensor]:
                return (part.float() - start.float() for part, start in zip(_parts(changed), _parts(original)))

            keep = _Largest(count, tensor.numel(), deltas, _sample(changed) - _sample(original)).keep
        changes.append((_parts(changed), weight, keep))
    if not changes:
        return base.to(dtype)
    merged = torch.empty_like(original, dtype=dtype)
    for index, (start, result) in enumerate(zip(_parts(original), _parts(merged))):
        start = total = start.float()
        for parts, weight, keep in changes:
            total = torch.add(total, keep(parts[index].float() - start), alpha=weight)
        result.copy_(total)
    return merged.view(base.shape)


def equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers, whatever their dtypes."""
    dtype = torch.promote_types(first.dtype, second.dtype)
    pairs = zip(_parts(first.reshape(-1)), _parts(second.reshape(-1)), strict=True)
    return all(torch.equal(part.to(dtype), other.to(dtype)) for part, other in pairs)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite. `tensor`: floating point of 16 bits or more."""
    # A NaN or an infinite number always shows in the sum, which is the fastest to take; so may finite but large ones.
    # The extremes show a NaN as well, and need neither a copy nor a mask as isfinite().all() does.
    return math.isfinite(tensor.sum()) or all(extreme.isfinite() for extreme in tensor.aminmax())


def require_finite(tensor: torch.Tensor, name: str) -> None:
    """Raise MM4KEError for a NaN or infinite entry. `name`: what the error calls the tensor."""
    if not is_finite(tensor):
        found = "NaN" if tensor.isnan().any() else "an infinite number"
        raise MM4KEError(f"{name}: holds {found}; numbers like this can't be merged, train or copy it again")
