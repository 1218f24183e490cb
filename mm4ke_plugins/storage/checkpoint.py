"""A checkpoint on disk as files of tensors: which file holds which, and new files made from them.

What stays as it is goes from file to file by the kernel and never becomes a tensor, so that writing a checkpoint costs
a copy of its files, and the memory of the largest tensor that is new.

A safetensors file is the length of its header (8 bytes, little endian), the header (JSON: dtype, shape and place of
each tensor), and the tensors' bytes.
"""

import errno
import json
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import MM4KEError, first_line
from .atomic import replaced_file
from .tensors import DTYPE_NAMES, DTYPES, is_finite

INDEX = "model.safetensors.index.json"

# Bytes that are read at once: few enough to be in the processor's cache when they are looked at again.
CHUNK = 1 << 19
COPIES_BEHIND = 16

# copy_file_range is not there, or not between these two file systems.
NO_KERNEL_COPY = (None, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor where it lies: `length` bytes from `offset` on in the file `path`, in row-major order."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True)
class NewTensor:
    """A tensor of which only dtype and shape are known, until `make` is called when it is to be written.

    `make` may also find that a tensor in a file is the one that is wanted.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], "torch.Tensor | StoredTensor"]

    @property
    def length(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


# ---- reading ----


def is_safetensors(folder: Path) -> bool:
    """Whether a folder has a model's weights under the names that transformers gives to safetensors files."""
    return any((folder / name).is_file() for name in (INDEX, "model.safetensors"))


def tensor_files(folder: Path) -> dict[str, Path]:
    """The safetensors file that holds each tensor of a model folder, by the tensor's name.

    Raises MM4KEError, naming folder or file: no such folder, no weights in it, weights in another format, an index or
    a file that can't be read, a tensor that is not in the file that the index names.
    """
    if not folder.is_dir():
        raise MM4KEError(f"{folder}: no such folder; give a model's folder")
    index = folder / INDEX
    if not index.is_file():
        file = folder / "model.safetensors"
        if not file.is_file() and (other := next(folder.glob("*.bin*"), None)):
            raise MM4KEError(f"{other}: not in safetensors format; save the model in safetensors format")
        with open_safetensors(file) as opened:
            return dict.fromkeys(opened.keys(), file)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: folder / file for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MM4KEError(f"{index}: not an index of safetensors files: {first_line(error)}") from error
    for file in sorted(set(files.values())):
        with open_safetensors(file) as opened:
            held = set(opened.keys())
        if absent := sorted(name for name, path in files.items() if path == file and name not in held):
            raise MM4KEError(f"{file}: {absent[0]} is not in it, though {index.name} says so; copy or save it again")
    return files


def open_tensors(folder: Path, stack: ExitStack) -> dict[str, safe_open]:
    """The open safetensors file of each tensor of a model folder, by the tensor's name. Raises as `tensor_files`."""
    files = tensor_files(folder)
    opened = {file: stack.enter_context(open_safetensors(file)) for file in sorted(set(files.values()))}
    return {name: opened[file] for name, file in files.items()}


def open_safetensors(file: Path) -> safe_open:
    """An open safetensors file, whose length was compared with its header. Raises MM4KEError if it can't be opened."""
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise MM4KEError(f"{file}: no such file; save the model in safetensors format") from None
    except (OSError, SafetensorError) as error:
        raise MM4KEError(
            f"{file}: not a readable safetensors file: {first_line(error)}; copy or save it again"
        ) from error


def stored_tensors(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of a safetensors file by name, in the order of their bytes, and the file's metadata.

    Raises MM4KEError: an unreadable file, a dtype that torch has no type for.
    """
    with open_safetensors(file):
        pass  # checks the header: lengths, overlaps, gaps
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise MM4KEError(
                f"{file}: {name}: is {entry['dtype']}, which torch can't read; give floating point weights"
            )
        begin, end = entry["data_offsets"]
        dtype = DTYPES[entry["dtype"]]
        tensors[name] = StoredTensor(file, dtype, tuple(entry["shape"]), 8 + length + begin, end - begin)
    return tensors, metadata


def equal_and_finite(first: StoredTensor, others: Sequence[StoredTensor]) -> bool:
    """Whether tensors hold the same bytes in the same dtype and shape, and no NaN or infinite entry. Reads each once.

    False also for a dtype that torch can't add up (8-bit floats). Takes a third of the time of comparing and checking
    memory-mapped tensors whole, and no more memory than a chunk of each.

    Raises MM4KEError for a file that became shorter.
    """
    if any((other.dtype, other.shape) != (first.dtype, first.shape) for other in others):
        return False
    is_float = first.dtype.is_floating_point
    if is_float and first.dtype.itemsize == 1:
        return False
    tensors = (first, *others)
    # What an earlier chunk left behind the end of a last, shorter one is equal and finite too, as are the zeros.
    buffers = [bytearray(CHUNK) for _ in tensors]
    views = [memoryview(buffer) for buffer in buffers]
    entries = torch.frombuffer(buffers[0], dtype=first.dtype)
    with ExitStack() as stack:
        files = [stack.enter_context(open(tensor.path, "rb", buffering=0)) for tensor in tensors]
        for file, tensor in zip(files, tensors, strict=True):
            file.seek(tensor.offset)
        for begin in range(0, first.length, CHUNK):
            size = min(CHUNK, first.length - begin)
            for file, view in zip(files, views, strict=True):
                if file.readinto(view[:size]) != size:
                    raise MM4KEError(f"{file.name}: became shorter while it was read; make or copy it again")
            if any(buffer != buffers[0] for buffer in buffers[1:]) or (is_float and not is_finite(entries)):
                return False
    return True


# ---- writing ----


def rewrite(
    source: Path,
    target: Path,
    replacements: Mapping[str, Callable[[], torch.Tensor]],
    dtypes: Mapping[str, torch.dtype] | None = None,
    without: Collection[str] = (),
) -> None:
    """Write to `target` a safetensors file like `source` in which some tensors are replaced.

    replacements: what makes each new tensor, by name. The next is made while one is written
    dtypes:       of those new tensors that are not of the old one's dtype
    without:      names of tensors to leave out

    Where no dtype changes and nothing is left out, every other byte is the source's, those of the header included. `target` may be `source`.

    Raises what `write_tensors` raises, and MM4KEError for an unreadable source and for a name that is not in it.
    """
    tensors, metadata = stored_tensors(source)
    new = {}
    for name, make in replacements.items():
        if name not in tensors:
            raise MM4KEError(f"{source}: {name}: no such tensor in this file, so it can't be replaced")
        old = tensors[name]
        new[name] = NewTensor((dtypes or {}).get(name, old.dtype), old.shape, make)
    if without or any(new[name].dtype != tensors[name].dtype for name in new):
        kept = {name: tensor for name, tensor in (tensors | new).items() if name not in without}
        write_tensors(target, kept, metadata)
    else:
        with open(source, "rb") as file:
            header = file.read(min((tensor.offset for tensor in tensors.values()), default=-1))
        _write(target, header, tensors | new, threads=1)


def write_tensors(
    target: Path,
    tensors: Mapping[str, StoredTensor | NewTensor],
    metadata: Mapping[str, str] | None = None,
    threads: int = 1,
) -> None:
    """Write a safetensors file, byte for byte as safetensors itself would, without having its tensors in memory.

    threads: how many new tensors may be made at once, by threads of that number. Two more may be waiting

    `target` appears, or is replaced, when the file is complete. A failure leaves nothing behind.

    Raises MM4KEError: a new tensor of another shape or dtype than announced; OSError: a full disk and the like.
    """
    order = list(DTYPES.values())
    tensors = dict(sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.length
        shape = list(tensor.shape)
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    _write(target, len(text).to_bytes(8, "little") + text, tensors, threads)


def _write(target: Path, header: bytes, tensors: Mapping[str, StoredTensor | NewTensor], threads: int) -> None:
    """The header, then the tensors as they come. While one is written, the next are made."""
    with replaced_file(target) as temporary, ExitStack() as sources, ExitStack() as pools:
        # Unbuffered: what we write and what the kernel copies go to the same position.
        file = sources.enter_context(open(temporary, "xb", buffering=0))
        opened: dict[Path, FileIO] = {}

        def append(content: memoryview | StoredTensor) -> None:
            if isinstance(content, StoredTensor):
                if (path := content.path) not in opened:
                    opened[path] = sources.enter_context(open(path, "rb", buffering=0))
                _copy_bytes(opened[path], file, content.offset, content.length)
            else:
                _write_bytes(file, content)

        _write_bytes(file, header)
        makers = pools.enter_context(ThreadPoolExecutor(threads))
        writer = pools.enter_context(ThreadPoolExecutor(1))
        calls = (partial(_content, tensor, name) for name, tensor in tensors.items())
        contents = _in_order(makers, calls, threads)
        # A copy takes no memory, so many may wait. Of tensors in memory one may wait while others are made.
        waiting: dict[bool, deque[Future]] = {True: deque(), False: deque()}
        for content in contents:
            is_copy = isinstance(content, StoredTensor)
            waiting[is_copy].append(writer.submit(append, content))
            if len(waiting[is_copy]) > (COPIES_BEHIND if is_copy else 1):
                waiting[is_copy].popleft().result()
        for write in (*waiting[True], *waiting[False]):
            write.result()


def _in_order(pool: Executor, calls: Iterable[Callable[[], Any]], ahead: int) -> Iterator[Any]:
    """What the calls return, in their order. The next `ahead` of them are under way meanwhile."""
    pending: deque[Future] = deque()
    for call in calls:
        pending.append(pool.submit(call))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _content(new: StoredTensor | NewTensor, name: str) -> memoryview | StoredTensor:
    """The bytes of a new tensor, or where they are, after comparing the tensor with what the header says."""
    tensor = new if isinstance(new, StoredTensor) else new.make()
    if (tensor.dtype, tuple(tensor.shape)) != (new.dtype, new.shape):
        raise MM4KEError(
            f"{name}: the new tensor is {tensor.dtype} {list(tensor.shape)}, not {new.dtype} {list(new.shape)}"
        )
    if isinstance(tensor, StoredTensor):
        return tensor
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _write_bytes(file: FileIO, content: bytes | memoryview) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]  # the kernel writes at most 2 GiB at once


def _copy_bytes(source: FileIO, target: FileIO, offset: int, length: int) -> None:
    """Append a part of a file to another; where the kernel can't copy between the two, read and write it."""
    end = offset + length
    try:
        while offset < end:
            if not (copied := os.copy_file_range(source.fileno(), target.fileno(), end - offset, offset)):
                raise MM4KEError(f"{source.name}: became shorter while it was read; make or copy it again")
            offset += copied
    except (OSError, AttributeError) as error:
        if getattr(error, "errno", None) not in NO_KERNEL_COPY:
            raise
        source.seek(offset)
        while offset < end:
            if not (content := source.read(min(CHUNK, end - offset))):
                raise MM4KEError(f"{source.name}: became shorter while it was read; make or copy it again") from None
            _write_bytes(target, content)
            offset += len(content)
