"""How a knowledge delta's numbers are put into arrays, and back: steps between floats, and which entries are kept.

A step is by how many representable numbers an entry moved: a float's bits, ordered as an integer, of the edited number
minus those of the base's, wrapping. Which entries moved is one bit each (a bitmap), or the gaps between them.
"""

from typing import Any

import numpy as np
import torch

MAX_GAP = 255


def ordered(bits: Any) -> Any:
    """Integers that are ordered as the floats with these bits are, and back again. int16 or int32, torch or numpy."""
    width = 8 * bits.dtype.itemsize
    return bits ^ (bits >> (width - 1) & ((1 << (width - 1)) - 1))


def to_gaps(positions: np.ndarray) -> np.ndarray:
    """How many entries are skipped before each of these, uint8; MAX_GAP: so many, and none kept here."""
    skipped = np.diff(positions, prepend=-1) - 1
    full = skipped // MAX_GAP
    gaps = np.full(int(full.sum()) + len(positions), MAX_GAP, np.uint8)
    gaps[np.cumsum(full + 1) - 1] = skipped % MAX_GAP
    return gaps


def from_gaps(gaps: np.ndarray) -> np.ndarray:
    """The positions, int64 and ascending, of which these are the gaps."""
    is_entry = gaps != MAX_GAP
    return np.cumsum(gaps + is_entry.astype(np.int64))[is_entry] - 1


def unpack_bits(bitmap: torch.Tensor) -> torch.Tensor:
    """Which bits are set, as bool, on the bitmap's device."""
    if bitmap.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bitmap.numpy(), bitorder="little").view(bool))
    return shifted_bits(bitmap)


def shifted_bits(bitmap: torch.Tensor) -> torch.Tensor:
    """What `unpack_bits` gives, in torch alone: on a GPU the faster way, on a CPU the slower one."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    return (bitmap[:, None] >> shifts & 1).reshape(-1).bool()


def count_bits(bitmap: np.ndarray) -> int:
    """How many bits are set in uint8 numbers."""
    counts = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)
    return int(np.bincount(bitmap, minlength=256) @ counts)
