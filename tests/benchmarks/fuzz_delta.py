"""Damage knowledge deltas in every way that comes to mind, and see that nobody is harmed.

    python tests/benchmarks/fuzz_delta.py --count 100000 --seed 0

Each damaged file must give an MM4KEError, or load and change a model by what it says and no more: the model has other
numbers in the delta's tensors only, all of them finite, and is the base again afterwards. Damage that the checksum
covers must not load at all, unless the content is still the same. One half of the files was changed by somebody who
knows the format and made the checksum fit again. Processes of a few thousand files each, with little memory and little
time, show crashes, hangs and large allocations.
"""

import argparse
import collections
import json
import multiprocessing
import os
import random
import resource
import struct
import sys
import tempfile
import time
from pathlib import Path

import torch

from mm4ke_plugins.delta.format import MANIFEST_KEY, SHA256_KEY, _file_sha256, load_delta, save_delta
from mm4ke_plugins.delta.live import apply_delta
from mm4ke_plugins.errors import MM4KEError

FILES_PER_PROCESS = 5000
SECONDS_PER_PROCESS = 300
EXTRA_MEMORY = 1 << 30  # bytes of address space beyond what the process has when it begins

ODD_VALUES = [
    -1, 0, 1, 2, 3, 7, 255, 2**31, 2**48, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"),
    None, True, False, "", "x", "1", "all", "bitmap", "gaps", "float32", "bfloat16", "float16", "float64", "int8",
    "F32", "BF16", "I16", "I32", "U8", "\x1b[31m", "\u202e", "x" * 100_000, "0" * 64, [], [0], [1], [[]],
    [2**62, 2**62, 4], [10**12], [[[[[[[[]]]]]]]], {}, {"x": 1}, [0] * 10_000,
]  # fmt: skip
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "C64", "X7"]


# ---- what is damaged ----


def make_model(dtype: torch.dtype) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(17, 13), torch.nn.Linear(13, 9), torch.nn.Linear(9, 5))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    return model


def make_deltas(folder: Path) -> list[tuple[Path, torch.dtype]]:
    """Deltas with every encoding, finished and not, in one or two dtypes; and the dtype of each one's base."""
    made = []
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16):
        base = {name: parameter.detach() for name, parameter in make_model(dtype).named_parameters()}
        edited = dict(base)
        for name, share in {"0.weight": 0.5, "0.bias": 1.0, "1.weight": 0.05, "2.weight": 1.0}.items():
            change = torch.randn(base[name].shape, generator=generator) * 0.1
            change[torch.rand(change.shape, generator=generator) >= share] = 0
            edited[name] = base[name].float() + change
        for number, choice in enumerate(({}, {"weight": 0.8, "density": 0.6}, {"weight": 1, "density": 1})):
            path = folder / f"{dtype}-{number}.safetensors"
            save_delta(path, base, edited, architecture="Tiny", recipe={"a": [1, 2.5], "b": "c"}, facts=3, **choice)
            made.append((path, dtype))
    return made


# ---- files as parts that can be changed ----


def split(content: bytes) -> tuple[dict, bytes]:
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(header: dict | str, payload: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    encoded = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", (len(encoded) if length is None else length) % 2**64) + encoded + payload


def tensor_of(entry: dict, payload: bytes) -> torch.Tensor:
    dtype = {"I32": torch.int32, "I16": torch.int16, "U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16,
             "F16": torch.float16}[entry["dtype"]]  # fmt: skip
    begin, end = entry["data_offsets"]
    return torch.frombuffer(bytearray(payload[begin:end]), dtype=dtype).reshape(entry["shape"])


def seal(header: dict, payload: bytes) -> bytes:
    """The file with the checksum that its content has, if its tensors are any that have one."""
    try:
        arrays = {name: tensor_of(entry, payload) for name, entry in header.items() if name != "__metadata__"}
        header["__metadata__"][SHA256_KEY] = _file_sha256(header["__metadata__"][MANIFEST_KEY], arrays)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        pass
    return join(header, payload)


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The path of every value in nested dicts and lists."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in items:
        found += places(entry, (*path, key))
    return found


def change_somewhere(value: object, chance: random.Random) -> object:
    """The same JSON with one value replaced, removed, renamed or doubled."""
    value = json.loads(json.dumps(value))
    path = chance.choice(places(value)[1:])
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    key, kind = path[-1], chance.randrange(6)
    if kind == 0:
        parent.pop(key)
    elif kind == 1 and isinstance(parent, dict):
        parent[chance.choice(["", "x", "0.weight", "0.weight:steps", "9.weight", "\x07", "__metadata__"])] = parent[
            key
        ]
    elif kind == 2 and isinstance(parent[key], int):
        parent[key] += chance.choice([-8, -2, -1, 1, 2, 8, 1 << 20, -parent[key], parent[key]])
    elif kind == 3 and isinstance(parent[key], str) and parent[key]:
        at = chance.randrange(len(parent[key]))
        parent[key] = parent[key][:at] + chr(chance.randrange(1, 0x250)) + parent[key][at + 1 :]
    elif kind == 4 and isinstance(parent, list):
        parent.insert(key, parent[key])
    else:
        parent[key] = chance.choice(ODD_VALUES)
    return value


# ---- damage ----


def damage_bytes(content: bytes, chance: random.Random) -> bytes:
    """What disks, networks and people with a hex editor do."""
    content = bytearray(content)
    kind = chance.randrange(8)
    at = chance.randrange(len(content))
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    if kind == 0:
        for _ in range(chance.choice([1, 1, 1, 2, 8, 100])):
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif kind == 1:
        content[chance.randrange(header_end)] ^= 1 << chance.randrange(8)
    elif kind == 2:
        del content[at:]
    elif kind == 3:
        del content[at : at + chance.choice([1, 2, 8, 100])]
    elif kind == 4:
        content[at:at] = chance.randbytes(chance.choice([1, 2, 8, 100]))
    elif kind == 5:
        size = chance.choice([1, 8, 64, 1000])
        content[at : at + size] = bytes(len(content[at : at + size]))
    elif kind == 6:
        other = chance.randrange(len(content))
        content[at : at + 16], content[other : other + 16] = content[other : other + 16], content[at : at + 16]
    else:
        lie = chance.choice([0, 1, 7, 8, header_end, len(content), len(content) * 2, 2**31, 2**63, 2**64 - 1])
        content[:8] = struct.pack("<Q", chance.choice([lie, (header_end - 8 + chance.randrange(-9, 9)) % 2**64]))
    return bytes(content)


def damage_header(content: bytes, chance: random.Random) -> bytes:
    """Lies about dtypes, shapes and places: overlaps, gaps, doubled names. The checksum stays."""
    header, payload = split(content)
    names = [name for name in header if name != "__metadata__"]
    name, other = chance.choice(names), chance.choice(names)
    kind = chance.randrange(7)
    if kind == 0:
        header[name]["data_offsets"] = header[other]["data_offsets"]
    elif kind == 1:
        header[name]["dtype"] = chance.choice(DTYPES)
    elif kind == 2:
        header[name], header[other] = header[other], header[name]
    elif kind == 3:
        header[chance.choice(["x", f"{name}x", "9.weight:steps"])] = header[name]
    elif kind == 4:
        text = json.dumps(header)
        return join(text[:-1] + f", {json.dumps(name)}: {json.dumps(header[other])}}}", payload)
    elif kind == 5:
        return join("[" * chance.choice([10, 1000, 100_000]), payload)
    else:
        header = change_somewhere(header, chance)
    return join(header, payload)


def damage_content(content: bytes, chance: random.Random) -> bytes:
    """Another manifest or other numbers, and the checksum that fits."""
    header, payload = split(content)
    kind = chance.randrange(4)
    metadata = header["__metadata__"]
    if kind in (0, 1):
        manifest = json.loads(metadata[MANIFEST_KEY])
        for _ in range(chance.choice([1, 1, 2, 3])):
            manifest = change_somewhere(manifest, chance)
        metadata[MANIFEST_KEY] = json.dumps(manifest)
        if chance.randrange(20) == 0:
            metadata[MANIFEST_KEY] = chance.choice(["", "null", "[]", "[" * 100_000, '{"a":' * 50_000, "\x00", "{}"])
    elif kind == 2:
        payload = bytearray(payload)
        begin, end = chance.choice([entry["data_offsets"] for key, entry in header.items() if key != "__metadata__"])
        if chance.randrange(3) == 0:
            payload[begin:end] = chance.randbytes(end - begin)
        for _ in range(chance.choice([1, 1, 2, 8, 1000])):
            payload[chance.randrange(begin, end)] = chance.choice([0, 1, 0x7F, 0x80, 0xFF])
        payload = bytes(payload)
    else:
        # One array shorter or longer, and all places right.
        name = chance.choice([name for name in header if name != "__metadata__"])
        parts = {
            key: (entry, payload[entry["data_offsets"][0] : entry["data_offsets"][1]])
            for key, entry in header.items()
            if key != "__metadata__"
        }
        entry, part = parts[name]
        size = len(part) // entry["shape"][0]
        count = max(0, entry["shape"][0] + chance.choice([-2, -1, 1, 2, 100, -entry["shape"][0]]))
        parts[name] = entry | {"shape": [count]}, (part + chance.randbytes(count * size))[: count * size]
        payload, header = b"", {"__metadata__": metadata}
        for key, (entry, part) in parts.items():
            header[key] = entry | {"data_offsets": [len(payload), len(payload) + len(part)]}
            payload += part
    return seal(header, payload)


# ---- what must hold ----


def same_content(path: Path, content: bytes, original: bytes) -> bool:
    """Whether a file that loads says what the original says, though its header may be written differently."""
    header, payload = split(content)
    first, first_payload = split(original)
    if header["__metadata__"][MANIFEST_KEY] != first["__metadata__"][MANIFEST_KEY]:
        return False
    names = [name for name in first if name != "__metadata__"]
    return all(
        name in header and torch.equal(*(tensor_of(entry[name], part).view(torch.uint8) for entry, part in
                                         ((header, payload), (first, first_payload))))
        for name in names
    )  # fmt: skip


def examine(path: Path, content: bytes, original: bytes, sealed: bool, model: torch.nn.Module) -> str:
    """What became of a damaged file; raises AssertionError, or whatever should not have been raised."""
    path.write_bytes(content)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    outcome = "loaded, and refused by the model"
    try:
        delta = load_delta(path)
    except MM4KEError as error:
        assert "\n" not in str(error) and str(error).isprintable() and len(str(error)) < 1500, repr(str(error))
        return "refused"
    if not sealed:
        assert same_content(path, content, original), "a change was not noticed"
    try:
        with apply_delta(model, delta):
            outcome = "loaded and applied"
            for name, parameter in model.named_parameters():
                assert parameter.isfinite().all(), f"{name} is not finite"
                untouched = name not in delta.manifest.tensors
                assert not untouched or torch.equal(parameter, before[name]), f"{name} changed"
                if not untouched:
                    kept = delta.positions(name)
                    rest = torch.ones(parameter.numel(), dtype=torch.bool)
                    rest[torch.from_numpy(kept)] = False
                    assert torch.equal(parameter.reshape(-1)[rest], before[name].reshape(-1)[rest]), "other entries"
    except MM4KEError as error:
        assert "\n" not in str(error) and str(error).isprintable(), repr(str(error))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), f"{name} did not come back"
    return outcome + (", made to fit" if sealed else ", same content")


def fuzz(count: int, seed: int, folder: Path) -> collections.Counter:
    """Examine `count` damaged files; returns how many had which outcome. The failing file stays in `folder`."""
    outcomes: collections.Counter = collections.Counter()
    deltas = [(path.read_bytes(), make_model(dtype)) for path, dtype in make_deltas(folder)]
    for number in range(count):
        chance = random.Random(f"{seed} {number}")
        original, model = chance.choice(deltas)
        damage = chance.choice([damage_bytes, damage_header, damage_content, damage_content])
        content = damage(original, chance)
        if content == original:
            outcomes["not damaged"] += 1
            continue
        try:
            outcome = examine(folder / "damaged.safetensors", content, original, damage is damage_content, model)
        except BaseException as error:
            error.add_note(f"seed {seed}, file {number}, {damage.__name__}: {folder / 'damaged.safetensors'}")
            raise
        outcomes[outcome] += 1
    return outcomes


def limited_fuzz(count: int, seed: int, folder: Path, results) -> None:
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_MEMORY, used + EXTRA_MEMORY))
    results.put(fuzz(count, seed, folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.nice(10)
    total, started = collections.Counter(), time.monotonic()
    context = multiprocessing.get_context("spawn")
    for batch in range(-(-options.count // FILES_PER_PROCESS)):
        count = min(FILES_PER_PROCESS, options.count - batch * FILES_PER_PROCESS)
        seed = options.seed * 1_000_000 + batch
        with tempfile.TemporaryDirectory() as folder:
            results = context.SimpleQueue()
            process = context.Process(target=limited_fuzz, args=(count, seed, Path(folder), results))
            process.start()
            process.join(SECONDS_PER_PROCESS)
            if process.exitcode != 0:
                process.kill()
                what = "did not end in time" if process.exitcode is None else f"ended with {process.exitcode}"
                kept = Path(f"damaged-{seed}.safetensors")
                kept.write_bytes(Path(folder, "damaged.safetensors").read_bytes())
                sys.exit(f"batch {batch}, seed {seed}: the process {what}; its last file is {kept}")
            total += results.get()
        print(f"{sum(total.values()):>8} files, {time.monotonic() - started:.0f} s", file=sys.stderr)
    for outcome, number in total.most_common():
        print(f"{number:>8}  {outcome}")


if __name__ == "__main__":
    main()
