"""How a knowledge delta's numbers are put into arrays, and back: steps between floats, and which entries are kept.

A step is by how many representable numbers an entry moved: a float's bits, ordered as an integer, of the edited number
minus those of the base's, wrapping. Which entries moved is one bit each (a bitmap), or the gaps between them.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}

MAX_GAP = 255


def bits_of(tensor: torch.Tensor, dtype: torch.dtype, copy: bool = False) -> torch.Tensor:
    """The bits of a tensor's numbers as flat integers, after a cast to `dtype`; a view where `copy` allows it."""
    return tensor.detach().to(dtype, copy=copy).contiguous().reshape(-1).view(BITS[dtype])


def ordered(bits: Any) -> Any:
    """Integers that are ordered as the floats with these bits are, and back again. int16 or int32, torch or numpy."""
    width = 8 * bits.dtype.itemsize
    return bits ^ (bits >> (width - 1) & ((1 << (width - 1)) - 1))


def identical(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape hold the same numbers; where they have one dtype, the same bits."""
    if first.dtype == second.dtype in BITS:
        return torch.equal(bits_of(first, first.dtype), bits_of(second, second.dtype))
    dtype = torch.promote_types(first.dtype, second.dtype)
    return torch.equal(first.to(dtype), second.to(dtype))


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
    counts = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1)
    return int(np.bincount(bitmap, minlength=256) @ counts)


def tensor_sha256(tensor: torch.Tensor) -> str:
    """The hash of a tensor's dtype, shape and bytes in row-major order, on whatever device it is."""
    digest = hashlib.sha256(f"{dtype_name(tensor.dtype)} {list(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """The function of each item. Hashing, numpy and torch let other threads run meanwhile."""
    with one_thread_in_torch(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


# Who is in `one_thread_in_torch`, and torch's number of threads before the first of them.
_inside = threading.Lock()
_entered, _outside = 0, 1


@contextmanager
def one_thread_in_torch() -> Iterator[None]:
    """Where threads of ours work, torch's own in each of them would wait for each other in every small operation.

    Several threads may be inside at once. torch keeps one number for each thread, and one for new threads: who enters
    while others are inside may find theirs, so all go back to the number that was there before the first.
    """
    global _entered, _outside
    with _inside:
        if not _entered:
            _outside = torch.get_num_threads()
        _entered += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _inside:
            _entered -= 1
            torch.set_num_threads(_outside)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a single number"
