"""Work on many tensors in threads, without torch's own threads in each of them."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


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
