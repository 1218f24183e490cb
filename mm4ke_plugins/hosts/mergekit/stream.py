"""The execution of a merge, one tensor at a time from file to file, instead of mergekit's own.

mergekit's executor loads every tensor of every model, runs the method on each, and collects the results for a file of
up to 5 GB. But an edit changes one FFN: all else goes from the base's file to the result's by the kernel. What did
change goes through mergekit's executor as ever, and so do its dtypes, its device and its parameters, which mergekit
resolved when it planned; the files of the result are divided, named and listed by mergekit's own writer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from mergekit.common import dtype_from_name
from mergekit.graph import Executor, Task
from mergekit.io.tasks import FinalizeModel, GatherTensors, LoaderCache, LoadTensor, SaveTensor
from mergekit.merge_methods.task_adapter import ExecuteMergeMethodTask
from tqdm import tqdm

from ...storage.checkpoint import NewTensor, StoredTensor, equal_and_finite, stored_tensors, write_tensors
from ...storage.threads import one_thread_in_torch

# Reading and comparing two models takes one of them a little longer than the kernel takes to write the third.
THREADS = 2


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor of the result.

    save:   mergekit's task, with all that it depends on
    base:   where the base's tensor lies
    others: where the edited models' tensors lie
    """

    save: SaveTensor
    base: StoredTensor
    others: tuple[StoredTensor, ...]

    @property
    def dtype(self) -> torch.dtype:
        return dtype_from_name(self.save.dtype) or self.base.dtype


class StreamingExecutor:
    """Takes the place of mergekit's `Executor` in `run_merge`, and hands over to it what can't be streamed."""

    def __init__(self, method_name: str, targets: Sequence[Task], **devices: Any) -> None:
        self.targets, self.devices = targets, devices
        self.planned = plan(method_name, targets)

    def run(self, quiet: bool = False) -> Iterator[tuple[Task, Any]]:
        """Yield the values of tasks that `run_merge` asks for; of a merge that is streamed there are none."""
        if self.planned is None:
            yield from Executor(self.targets, **self.devices).run(quiet=quiet)
        else:
            self._stream(self.planned, quiet)

    def _stream(self, planned: dict[str, PlannedTensor], quiet: bool) -> None:
        total = sum(tensor.base.length for tensor in planned.values())
        bar = tqdm(desc="Merging", total=total, unit="B", unit_scale=True, disable=quiet)

        def make(tensor: PlannedTensor) -> torch.Tensor | StoredTensor:
            bar.update(tensor.base.length)
            if tensor.dtype == tensor.base.dtype and equal_and_finite(tensor.base, tensor.others):
                return tensor.base
            ((_, merged),) = Executor([tensor.save.tensor_task], **self.devices).run(quiet=True)
            return merged.to(tensor.dtype)

        def save_shard(shard: Mapping[str, torch.Tensor], path: str) -> None:
            parts = {
                name: NewTensor(tensor.dtype, tuple(tensor.shape), partial(make, planned[name]))
                for name, tensor in shard.items()
            }
            write_tensors(Path(path), parts, {"format": "pt"}, THREADS)

        # mergekit's writer sees tensors without content: it divides them among files, names these, writes the index.
        writer = self.targets[0].writer_task.execute()
        writer._save_st = save_shard
        with bar, one_thread_in_torch():
            for name, tensor in planned.items():
                writer.save_tensor(name, torch.empty(tensor.base.shape, dtype=tensor.dtype, device="meta"))
            writer.finalize()


def plan(method_name: str, targets: Sequence[Task]) -> dict[str, PlannedTensor] | None:
    """Every tensor of the result by name, in the order in which mergekit would write them; None where the merge is
    not just a function of stored tensors (another method, another vocabulary, pickled files, converted tensors).
    """
    *saves, finalize = targets
    if not isinstance(finalize, FinalizeModel) or not finalize.writer_task.safe_serialization:
        return None
    planned = {}
    headers = cache(lambda path: stored_tensors(path)[0])
    for save in sorted(saves, key=lambda save: save.group_label() or ""):
        task = save.tensor_task
        if not (
            isinstance(task, ExecuteMergeMethodTask)
            and task.method_name == method_name
            and isinstance(task.gather_tensors, GatherTensors)
        ):
            return None
        found = {load.model: find(load, headers) for load in task.gather_tensors.arguments().values()}
        base = found.pop(task.base_model)
        # An output head that only the base stores is the base's, so an optional tensor may be missing elsewhere.
        if base is None or not (save.optional or all(found.values())):
            return None
        planned[save.tensor_name] = PlannedTensor(save, base, tuple(filter(None, found.values())))
    return planned


def find(load: LoadTensor, headers: Callable[[Path], dict[str, StoredTensor]]) -> StoredTensor | None:
    """Where the tensor lies that mergekit would load, if it lies in a safetensors file as it is."""
    loader = LoaderCache().get(load.model)
    name = load._resolve_name(loader)
    if name is None or not loader.index.is_safetensors:
        return None
    return headers(Path(loader.index.base_path, loader.index.tensor_paths[name]))[name]
