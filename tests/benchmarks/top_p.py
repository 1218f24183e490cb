"""Selecting the largest entries of a delta: `top_p_mask`, a full sort, and two selections that torch has.

    python tests/benchmarks/top_p.py                 up to 2^26 entries; 5 minutes, most of them sorting
    python tests/benchmarks/top_p.py --largest 24

A bfloat16 delta is the difference of two bfloat16 matrices, which has few distinct values. Each mask is compared with
that of a stable full sort, which takes the lowest index of equal ones.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable

import click
import torch
from rich.console import Console
from rich.table import Table

from mm4ke_plugins.merging.top_p import top_p_by_sorting, top_p_mask


def delta(entries: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A knowledge delta, float32, of a model that is stored in `dtype`."""
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(entries, generator=generator) * 0.02).to(dtype)
    edited = (base.float() + torch.randn(entries, generator=generator) * 1e-3).to(dtype)
    return (edited.float() - base.float()).to(device)


def sorted_mask(values: torch.Tensor, count: int) -> torch.Tensor:
    mask = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    mask[values.abs().argsort(descending=True)[:count]] = True
    return mask


def topk_mask(values: torch.Tensor, count: int) -> torch.Tensor:
    mask = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    mask[values.abs().topk(count, sorted=False).indices] = True
    return mask


def kthvalue_mask(values: torch.Tensor, count: int) -> torch.Tensor:
    """Not exact: keeps all that equal the threshold."""
    magnitudes = values.abs()
    return magnitudes >= magnitudes.kthvalue(len(values) - count + 1).values


def seconds(run: Callable[[], torch.Tensor], device: str, runs: int) -> float:
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


@click.command()
@click.option("--smallest", type=int, default=20, show_default=True, help="2 to the power of this many entries.")
@click.option("--largest", type=int, default=26, show_default=True)
@click.option("--density", type=click.FloatRange(0, 1), default=0.8, show_default=True)
@click.option("--runs", type=click.IntRange(min=1), default=3, show_default=True)
def main(smallest: int, largest: int, density: float, runs: int) -> None:
    """Compare ways to find the largest entries."""
    console = Console(width=110)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    names = {"cpu": platform.machine(), "cuda": torch.cuda.get_device_name() if len(devices) > 1 else ""}
    for device in devices:
        table = Table("entries", "delta of", "top_p_mask", "sort", "topk", "kthvalue", "sort / top_p_mask")
        table.title = f"{names[device]}: milliseconds, density {density}, medians of {runs}"
        for power in range(smallest, largest + 1, 2):
            for dtype in (torch.float32, torch.bfloat16):
                values = delta(1 << power, dtype, device)
                count = round(density * len(values))
                if not torch.equal(top_p_mask(values, density), top_p_by_sorting(values, density)):
                    raise SystemExit(f"2^{power} {dtype} on {device}: top_p_mask differs from a stable sort")
                times = [
                    seconds(run, device, runs)
                    for run in (
                        lambda values=values: top_p_mask(values, density),
                        lambda values=values, count=count: sorted_mask(values, count),
                        lambda values=values, count=count: topk_mask(values, count),
                        lambda values=values, count=count: kthvalue_mask(values, count),
                    )
                ]
                cells = [f"{1e3 * value:.1f}" for value in times]
                name = str(dtype).removeprefix("torch.")
                table.add_row(f"2^{power}", name, *cells, f"{times[1] / times[0]:.1f}")
        console.print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
        console.print(table)


if __name__ == "__main__":
    main()
