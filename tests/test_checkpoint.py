"""Safetensors files made from parts of others, against what safetensors itself writes."""

import errno
import json
import os
import resource
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.storage import checkpoint
from mm4ke_plugins.storage.checkpoint import (
    NewTensor,
    StoredTensor,
    equal_and_finite,
    open_tensors,
    rewrite,
    stored_tensors,
    tensor_files,
    write_tensors,
)
from mm4ke_plugins.storage.tensors import DTYPES


def some_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Names, dtypes and sizes whose order in a file differs from the order given here; also an empty one and a
    scalar."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b.weight": (5, 7), "a.weight": (3,), "Ä.bias": (), "none": (0, 4), "c.weight": (2, 3, 5)}
    tensors = {}
    for number, dtype in enumerate(dtype for dtype in DTYPES.values() if not dtype.is_complex):
        for name, shape in shapes.items():
            content = torch.randint(0, 2, shape, generator=generator)
            tensors[f"{number % 3}.{name}.{number}"] = content.to(dtype)
    return tensors


FORMAT = {"format": "pt"}


def stored(folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = FORMAT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    return folder / "model.safetensors"


def new(tensor: torch.Tensor) -> NewTensor:
    return NewTensor(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


# Writing


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "ä": '"'}])
def test_a_file_from_new_tensors_is_what_safetensors_writes(tmp_path, metadata):
    tensors = some_tensors()
    expected = stored(tmp_path / "expected", tensors, metadata)
    write_tensors(tmp_path / "new.safetensors", {name: new(tensor) for name, tensor in tensors.items()}, metadata)
    if metadata and len(metadata) > 1:  # safetensors writes these in any order
        assert stored_tensors(tmp_path / "new.safetensors")[1] == metadata
    else:
        assert (tmp_path / "new.safetensors").read_bytes() == expected.read_bytes()


def test_a_file_from_parts_of_others(tmp_path):
    """Some tensors from one file, some from another, some new."""
    first, second = some_tensors(1), some_tensors(2)
    parts = [stored_tensors(stored(tmp_path / str(seed), some_tensors(seed)))[0] for seed in (1, 2)]
    mixed, expected = {}, {}
    for number, name in enumerate(first):
        mixed[name] = (parts[0][name], parts[1][name], new(first[name].double()))[number % 3]
        expected[name] = (first[name], second[name], first[name].double())[number % 3]
    write_tensors(tmp_path / "mixed.safetensors", mixed, {"format": "pt"})
    assert (tmp_path / "mixed.safetensors").read_bytes() == stored(tmp_path / "expected", expected).read_bytes()


def test_rewriting_keeps_every_other_byte(tmp_path):
    """Also of a header that another program wrote in its own way."""
    source = tmp_path / "source.safetensors"
    header = b'{ "b": {"shape": [2], "dtype": "F32", "data_offsets": [0, 8]},'
    header += b' "a": {"shape": [1], "dtype": "F64", "data_offsets": [8, 16]} }      '
    content = torch.tensor([1.0, 2.0]).numpy().tobytes() + torch.tensor([3.0], dtype=torch.float64).numpy().tobytes()
    source.write_bytes(len(header).to_bytes(8, "little") + header + content)
    rewrite(source, tmp_path / "target.safetensors", {"b": lambda: torch.tensor([5.0, 6.0])})
    before, after = source.read_bytes(), (tmp_path / "target.safetensors").read_bytes()
    assert after == before[: 8 + len(header)] + torch.tensor([5.0, 6.0]).numpy().tobytes() + before[-8:]


def test_rewriting_to_another_dtype(tmp_path):
    tensors = some_tensors()
    source = stored(tmp_path / "source", tensors)
    name = next(name for name, tensor in tensors.items() if tensor.dtype == torch.bfloat16 and tensor.numel() == 35)
    rewrite(source, tmp_path / "target", {name: lambda: tensors[name].double()}, {name: torch.float64})
    expected = stored(tmp_path / "expected", tensors | {name: tensors[name].double()})
    assert (tmp_path / "target").read_bytes() == expected.read_bytes()


def test_rewriting_in_place(tmp_path):
    source = stored(tmp_path, some_tensors(1))
    name = "0.b.weight.0"
    rewrite(source, source, {name: lambda: some_tensors(2)[name]})
    expected = stored(tmp_path / "expected", some_tensors(1) | {name: some_tensors(2)[name]})
    assert source.read_bytes() == expected.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "model.safetensors"]


def test_a_tensor_that_is_not_contiguous(tmp_path):
    tensor = torch.arange(12.0).view(3, 4).T
    write_tensors(tmp_path / "file", {"a": new(tensor)})
    assert torch.equal(load_file(tmp_path / "file")["a"], tensor)


@pytest.mark.parametrize("error", [errno.EXDEV, errno.EOPNOTSUPP, None])
def test_where_the_kernel_cannot_copy(tmp_path, monkeypatch, error):
    def no_copy(*_):
        raise OSError(error, "no") if error else AttributeError("copy_file_range")

    source = stored(tmp_path, some_tensors())
    monkeypatch.setattr(checkpoint, "CHUNK", 16)
    monkeypatch.setattr(os, "copy_file_range", no_copy)
    rewrite(source, tmp_path / "target", {})
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("kernel_copies", [True, False])
def test_a_source_that_becomes_shorter(tmp_path, monkeypatch, kernel_copies):
    source = stored(tmp_path / "source", some_tensors())
    parts = stored_tensors(source)[0]
    source.write_bytes(source.read_bytes()[:-1])
    if not kernel_copies:
        monkeypatch.delattr(os, "copy_file_range")
    with pytest.raises(MM4KEError, match=f"^{source}: became shorter while it was read"):
        write_tensors(tmp_path / "target", parts)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("content", [torch.zeros(4, 5), torch.zeros(5, 7, dtype=torch.float16)])
def test_a_new_tensor_that_is_not_as_announced(tmp_path, content):
    source = stored(tmp_path, some_tensors())
    before = source.read_bytes()
    with pytest.raises(MM4KEError, match="^0.b.weight.0: the new tensor is torch.float.*, not torch.uint64"):
        rewrite(source, source, {"0.b.weight.0": lambda: content})
    assert source.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_unknown_name(tmp_path):
    source = stored(tmp_path, some_tensors())
    with pytest.raises(MM4KEError, match=f"^{source}: no-such-name: no such tensor in this file"):
        rewrite(source, tmp_path / "target", {"no-such-name": lambda: torch.zeros(1)})
    assert not (tmp_path / "target").exists()


def test_a_full_disk_leaves_nothing(tmp_path):
    source = stored(tmp_path / "source", {"a": torch.zeros(1000, 100), "b": torch.zeros(1000, 100)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            rewrite(source, tmp_path / "target", {"a": lambda: torch.ones(1000, 100)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


PEAK = """
import resource, sys, torch
from pathlib import Path
from mm4ke_plugins.storage.checkpoint import rewrite

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.ones(10, 10)
before = peak()
names = [f"{number}" for number in range(8)]
rewrite(Path(sys.argv[1]), Path(sys.argv[2]), {name: lambda: torch.ones(1 << 22) for name in names})
print(peak() - before)
"""


def test_few_new_tensors_are_in_memory_at_a_time(tmp_path):
    """16 MiB each: 8 are new and 24 stay. One is written while another waits and two are made."""
    source = stored(tmp_path, {f"{number}": torch.zeros(1 << 22) for number in range(32)})
    command = [sys.executable, "-c", PEAK, str(source), str(tmp_path / "target")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 4.5 * 2**24
    assert load_file(tmp_path / "target")["7"].sum() == 1 << 22


# Reading


def test_tensor_files(tmp_path):
    tensors = some_tensors()
    one, two = stored(tmp_path / "one", tensors).parent, sharded(tmp_path / "two", tensors)
    assert tensor_files(one) == dict.fromkeys(tensors, one / "model.safetensors")
    files = tensor_files(two)
    assert files.keys() == tensors.keys() and len(set(files.values())) == 2
    for name, tensor in tensors.items():
        assert torch.equal(load_file(files[name])[name].double(), tensor.double())
    with ExitStack() as stack:
        opened = open_tensors(two, stack)
        assert torch.equal(opened["0.b.weight.0"].get_tensor("0.b.weight.0"), tensors["0.b.weight.0"])


def test_stored_tensors(tmp_path):
    tensors = some_tensors()
    file = stored(tmp_path, tensors)
    found, metadata = stored_tensors(file)
    assert metadata == {"format": "pt"} and found.keys() == tensors.keys()
    content = file.read_bytes()
    for name, tensor in tensors.items():
        entry = found[name]
        assert (entry.path, entry.dtype, entry.shape) == (file, tensor.dtype, tuple(tensor.shape))
        expected = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert content[entry.offset : entry.offset + entry.length] == expected
    assert [entry.offset for entry in found.values()] == sorted(entry.offset for entry in found.values())


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_damaged_file(tmp_path, damage):
    file = stored(tmp_path, some_tensors())
    content = file.read_bytes()
    file.write_bytes({"truncated": content[:-100], "header": b"\xff" * 8 + content[8:], "empty": b""}[damage])
    for read in (lambda: tensor_files(tmp_path), lambda: stored_tensors(file)):
        with pytest.raises(MM4KEError, match=f"^{file}: not a readable safetensors file: .*; copy or save it again"):
            read()


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}"])
def test_damaged_index(tmp_path, text):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(MM4KEError, match=f"^{index}: not an index of safetensors files: "):
        tensor_files(tmp_path)


def test_an_index_that_does_not_fit_its_files(tmp_path):
    folder = sharded(tmp_path / "model", some_tensors())
    first, second = sorted(folder.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(MM4KEError, match=rf"^{second}: .* is not in it, though model\.safetensors\.index\.json says"):
        tensor_files(folder)
    second.unlink()
    with pytest.raises(MM4KEError, match=f"^{second}: no such file; save the model in safetensors format"):
        tensor_files(folder)


def test_no_checkpoint(tmp_path):
    with pytest.raises(MM4KEError, match=f"^{tmp_path}/none: no such folder"):
        tensor_files(tmp_path / "none")
    with pytest.raises(MM4KEError, match=f"^{tmp_path}/model.safetensors: no such file"):
        tensor_files(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(MM4KEError, match=f"^{tmp_path}/pytorch_model.bin: not in safetensors format"):
        tensor_files(tmp_path)


def test_a_dtype_that_torch_does_not_have(tmp_path):
    header = b'{"a": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}'
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(MM4KEError, match=f"^{file}: a: is F8_E8M0, which torch can't read"):
        stored_tensors(file)


# Comparing


def pair(tmp_path: Path, dtype: torch.dtype, entries: int) -> tuple[torch.Tensor, StoredTensor]:
    """Some numbers, and the same stored twice: behind each other, so that they don't begin at a multiple of 8."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 2, (entries,), generator=generator).to(dtype)
    write_tensors(tmp_path / "first", {"0": new(torch.ones(1, dtype=dtype)), "1": new(numbers)})
    return numbers, stored_tensors(tmp_path / "first")[0]["1"]


def stored_as(tmp_path: Path, numbers: torch.Tensor) -> StoredTensor:
    write_tensors(tmp_path / "other", {"a": new(numbers)})
    return stored_tensors(tmp_path / "other")[0]["a"]


@pytest.mark.parametrize("entries", [0, 1, 3, 7, 32, 100, 101])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_equal_and_finite(tmp_path, monkeypatch, dtype, entries):
    """Chunks of 64 bytes: whole ones, and a shorter last one. A change of any one entry is found."""
    monkeypatch.setattr(checkpoint, "CHUNK", 64)
    numbers, first = pair(tmp_path, dtype, entries)
    assert equal_and_finite(first, [stored_as(tmp_path, numbers)])
    assert equal_and_finite(first, [])
    for place in range(entries):
        changed = numbers.clone()
        changed[place] = 1 - changed[place].to(torch.int8)
        same = StoredTensor(first.path, first.dtype, first.shape, first.offset, first.length)
        other = stored_as(tmp_path, changed)
        for others in ([other], [same, other], [other, same]):
            assert not equal_and_finite(first, others)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_not_a_number_is_found_everywhere(tmp_path, monkeypatch, dtype, value):
    monkeypatch.setattr(checkpoint, "CHUNK", 64)
    numbers, _ = pair(tmp_path, dtype, 101)
    for place in range(101):
        changed = numbers.clone()
        changed[place] = float(value)
        first = stored_as(tmp_path, changed)
        assert not equal_and_finite(first, [first])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_numbers_are_finite_though_their_sum_is_not(tmp_path, dtype):
    first = stored_as(tmp_path, torch.full((100,), torch.finfo(dtype).max, dtype=dtype))
    assert equal_and_finite(first, [first])


def test_another_shape_or_dtype_is_not_equal(tmp_path):
    parts = {"a": torch.zeros(2, 3), "b": torch.zeros(3, 2), "c": torch.zeros(2, 3, dtype=torch.int32)}
    write_tensors(tmp_path / "file", {name: new(tensor) for name, tensor in parts.items()})
    found = stored_tensors(tmp_path / "file")[0]
    assert not equal_and_finite(found["a"], [found["b"]])
    assert not equal_and_finite(found["a"], [found["c"]])


def test_comparing_a_file_that_became_shorter(tmp_path):
    _, first = pair(tmp_path, torch.float32, 100)
    first.path.write_bytes(first.path.read_bytes()[:-1])
    with pytest.raises(MM4KEError, match=f"^{tmp_path}/first: became shorter while it was read"):
        equal_and_finite(first, [])
