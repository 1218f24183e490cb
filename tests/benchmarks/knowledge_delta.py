"""Size and speed of knowledge deltas.

    python tests/benchmarks/knowledge_delta.py sizes  # by density and encoding; one FFN matrix of a 7B model
    python tests/benchmarks/knowledge_delta.py disk BASE EDITED  # extract, apply, revert beside a copy of the folder
    python tests/benchmarks/knowledge_delta.py live  # on a live model with such an FFN, beside a copy of it

The matrix is 3584 x 18944 as in Qwen2.5-7B, whose checkpoint has 15.2 GB: bfloat16 weights of N(0, 0.02), and a
float32 edit that adds N(0, 0.001), as R-SFT leaves it. Times are the best of three, with files in the page cache.
"""

import argparse
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mm4ke_plugins.delta.encoding import to_gaps
from mm4ke_plugins.delta.folders import apply, extract, revert
from mm4ke_plugins.delta.format import load_delta, save_delta
from mm4ke_plugins.delta.live import LiveDelta, apply_delta
from mm4ke_plugins.storage.tensors import tensor_sha256

HIDDEN, INTERMEDIATE, CHECKPOINT = 3584, 18944, 15.2e9
RUNS = 3


def matrix(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(HIDDEN, INTERMEDIATE, generator=generator) * 0.02).bfloat16()
    return base, base.float() + torch.randn(HIDDEN, INTERMEDIATE, generator=generator) * 0.001


def best(function: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> float:
    seconds = []
    for _ in range(RUNS):
        prepare()
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def sizes() -> None:
    base, edited = matrix()
    print(f"One FFN of three such matrices, MB and share of a checkpoint of {CHECKPOINT / 1e9} GB")
    print(f"{'delta':<32}{'stored as':<10}{'all':>8}{'bitmap':>8}{'gaps':>8}{'file':>8}{'share':>8}")
    choices = [("unfinished, float32 R-SFT", edited, {}), ("unfinished, bfloat16 R-SFT", edited.bfloat16(), {})]
    choices += [
        (f"finished, density {density}", edited, {"weight": 0.8, "density": density})
        for density in (0.01, 0.05, 0.1, 0.2, 0.5, 0.8, 1.0)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "delta")
        for title, target, choice in choices:
            save_delta(path, {"w": base}, {"w": target}, **choice)
            delta = load_delta(path)
            info, steps = delta.manifest.tensors["w"], delta.arrays["w:steps"]
            kept = delta.positions("w")[steps.ne(0).numpy()]
            entry = steps.element_size() + (0 if choice else 2)
            costs = [info.numel * entry, info.numel / 8 + len(kept) * entry, len(to_gaps(kept)) + len(kept) * entry]
            size = 3 * path.stat().st_size
            columns = "".join(f"{3 * cost / 1e6:>8.0f}" for cost in (*costs, size / 3))
            print(f"{title:<32}{info.positions:<10}{columns}{size / CHECKPOINT:>8.2%}")
            if choice.get("density") in (0.2, 0.8):
                squeeze(steps)


def squeeze(steps: torch.Tensor) -> None:
    """What compression would give."""
    raw = steps[: 1 << 23].numpy().tobytes()
    begin = time.perf_counter()
    share = len(zlib.compress(raw, 1)) / len(raw)
    seconds = time.perf_counter() - begin
    one_byte = float(((steps >= -128) & (steps < 128)).float().mean())
    print(f"    steps: deflate leaves {share:.0%} at {len(raw) / seconds / 1e6:.0f} MB/s; {one_byte:.0%} fit a byte")


def disk(base: Path, edited: Path) -> None:
    with tempfile.TemporaryDirectory(dir=base.parent) as folder:
        out, whole, finished = Path(folder, "out"), Path(folder, "whole.delta"), Path(folder, "finished.delta")

        def clear() -> None:
            shutil.rmtree(out, ignore_errors=True)

        size = sum(path.stat().st_size for path in base.iterdir() if path.is_file())
        copy = best(lambda: shutil.copytree(base, out), clear)
        print(f"copy of {base}, {size / 1e6:.0f} MB: {copy:.2f} s")

        def report(title: str, seconds: float) -> None:
            print(f"{title:<36}{seconds:>6.2f} s, {seconds / copy:.2f} of a copy")

        report("extract, unfinished", best(lambda: extract(base, edited, whole)))
        report("extract, finished 0.8/0.8", best(lambda: extract(base, edited, finished, 0.8, 0.8)))
        for name, delta in (("unfinished", whole), ("finished", finished)):
            report(f"apply, {name}", best(lambda delta=delta: apply(base, [delta], out), clear))
            report(f"apply --link, {name}", best(lambda delta=delta: apply(base, [delta], out, link=True), clear))
            model = Path(folder, "model")
            clear()
            apply(base, [delta], model)
            report(f"revert, {name}", best(lambda model=model, delta=delta: revert(model, delta, out), clear))
            shutil.rmtree(model)
            print(f"    {name}: {delta.stat().st_size / 1e6:.2f} MB, {delta.stat().st_size / size:.2%} of the folder")


def live(device: str) -> None:
    base, edited = matrix()
    model = torch.nn.ModuleList(torch.nn.Linear(1, 1, bias=False) for _ in range(3))
    for linear in model:
        linear.weight = torch.nn.Parameter(base.to(device, copy=True))
    size = 3 * base.nbytes
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None

    def timed(function: Callable[[], object]) -> float:
        return best(lambda: (function(), sync()))

    copy = timed(lambda: [parameter.detach().clone() for parameter in model.parameters()])
    hashes = timed(lambda: [tensor_sha256(parameter) for parameter in model.parameters()])
    print(f"{size / 1e6:.0f} MB of weights on {device}: copy {copy:.2f} s, sha256 one after the other {hashes:.2f} s")
    with tempfile.TemporaryDirectory() as folder:
        for title, choice in (
            ("finished, density 0.2", {"weight": 0.8, "density": 0.2}),
            ("finished, density 0.8", {"weight": 0.8, "density": 0.8}),
            ("unfinished", {}),
        ):
            path = Path(folder, "delta")
            names = [f"{number}.weight" for number in range(3)]
            save_delta(path, dict.fromkeys(names, base), dict.fromkeys(names, edited), **choice)
            print(f"{title}: {path.stat().st_size / 1e6:.0f} MB")
            print(f"    load and check the file      {timed(lambda path=path: load_delta(path)):.2f} s")
            delta = load_delta(path)
            print(f"    check the base, decode       {timed(lambda delta=delta: LiveDelta(model, delta)):.2f} s")
            on = LiveDelta(model, delta)
            print(f"    put on                       {timed(on.set):.2f} s")
            print(f"    take off                     {best(lambda on=on: (on.remove(), sync()), on.set):.2f} s")

            def whole(delta=delta) -> None:
                with apply_delta(model, delta):
                    pass

            print(f"    all of `with apply_delta`    {timed(whole):.2f} s")
            assert all(torch.equal(parameter, base.to(device)) for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["sizes", "disk", "live"])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="BASE EDITED, for disk")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if options.part == "disk":
        disk(*options.folders)
    else:
        live(options.device) if options.part == "live" else sizes()
    print(f"torch {torch.__version__}, numpy {np.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
