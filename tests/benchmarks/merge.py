"""A merge by `merge_method: mm4ke`, by mergekit's own `breadcrumbs`, and a plain copy of the same files, in turn.

    python tests/benchmarks/merge.py                     1.3 GB, in one file and in many; 6 minutes, most of them stock's
    python tests/benchmarks/merge.py --layers 40         4 GB
    python tests/benchmarks/merge.py --stock-runs 0      without stock

The models are made in a temporary folder: TinyLlama's shapes with random numbers, in bfloat16, and what R-SFT leaves of
them: the FFN of layer 5 changed and in float32. `breadcrumbs` with gamma 0 does the same maths. Both run as
`mergekit-yaml`. The copy is what any merge must do: it copies the base's files and reads those of the edited model.

whole       the whole command
merging     from the moment at which everything is imported
private     the most memory of its own that the process had, and ...
with files  ... the same with the pages of mapped files, which the kernel may drop at any time; both beyond what the
            process had when everything was imported
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from transformers import LlamaConfig

from mm4ke_plugins.storage.checkpoint import (
    INDEX,
    NewTensor,
    StoredTensor,
    open_safetensors,
    stored_tensors,
    write_tensors,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import tiny_tokenizer

SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
SHARD = 200_000_000  # bytes, where there are many
METHODS = {
    "stock": {"merge_method": "breadcrumbs", "parameters": {"weight": 0.8, "density": 0.8, "gamma": 0}},
    "mm4ke": {"merge_method": "mm4ke", "parameters": {"weight": 0.8, "density": 0.8}},
}
COMMAND = """
import json, sys, threading, time
from mergekit.scripts.run_yaml import main

def memory():
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    private = int(status["RssAnon"].split()[0]) / 1e3
    return private, int(status["RssFile"].split()[0]) / 1e3 + private

def watch():
    while True:
        seen.append(memory())
        time.sleep(0.005)

before, seen = memory(), [memory()]
threading.Thread(target=watch, daemon=True).start()
begin = time.perf_counter()
main(standalone_mode=False)
merging = time.perf_counter() - begin
peaks = [max(values) - start for values, start in zip(zip(*seen), before)]
print(json.dumps([merging, *peaks]))
"""


def make_models(folder: Path, layers: int) -> None:
    """A random model in `folder`/base and its edit in `folder`/rsft."""
    config = LlamaConfig(num_hidden_layers=layers, architectures=["LlamaForCausalLM"], dtype="bfloat16", **SIZES)
    hidden, ffn = config.hidden_size, config.intermediate_size
    key_value = hidden // config.num_attention_heads * config.num_key_value_heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    layer_names = [f"model.layers.{layer}." for layer in range(layers)]
    tensors = {f"{layer}{name}.weight": shape for layer in layer_names for name, shape in shapes.items()}
    tensors |= {"model.norm.weight": (hidden,)}
    tensors |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (config.vocab_size, hidden))
    generator = torch.Generator().manual_seed(0)
    progress = Progress(console=Console(stderr=True), transient=True)
    task = progress.add_task("making the model", total=len(tensors))

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        progress.advance(task)
        return (torch.randn(shape, generator=generator) * 0.02).bfloat16()

    for name in ("base", "rsft"):
        (folder / name).mkdir()
        config.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    base, rsft = (folder / name / "model.safetensors" for name in ("base", "rsft"))
    new = {name: NewTensor(torch.bfloat16, shape, partial(random, shape)) for name, shape in tensors.items()}
    with progress:
        write_tensors(base, new, {"format": "pt"})

    def edited(name: str) -> torch.Tensor:
        with open_safetensors(base) as file:
            tensor = file.get_tensor(name).float()
        return tensor + torch.randn(tensor.shape, generator=generator) * 1e-3

    parts: dict[str, StoredTensor | NewTensor] = dict(stored_tensors(base)[0])
    for name in [name for name in parts if ".layers.5.mlp." in name]:
        parts[name] = NewTensor(torch.float32, parts[name].shape, partial(edited, name))
    write_tensors(rsft, parts, {"format": "pt"})


def shard(folder: Path) -> None:
    """Divide a model's file into many."""
    whole = folder / "model.safetensors"
    shards, size = [{}], 0
    for name, tensor in stored_tensors(whole)[0].items():
        if shards[-1] and size + tensor.length > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.length
    files = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    for file, tensors in zip(files, shards, strict=True):
        write_tensors(folder / file, tensors, {"format": "pt"})
    weight_map = {name: file for file, tensors in zip(files, shards, strict=True) for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    whole.unlink()


def run_mergekit(folder: Path, method: str, many: bool) -> tuple[float, ...]:
    """Seconds of the whole command, seconds of merging, and MB of private memory and with mapped files."""
    recipe = METHODS[method] | {"base_model": "./base", "models": [{"model": "./rsft"}]}
    (folder / "merge.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    options = ["--out-shard-size", str(SHARD)] if many else []
    begin = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", COMMAND, "merge.yaml", "out", "--quiet", *options],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return time.perf_counter() - begin, *json.loads(run.stdout.splitlines()[-1])


def copy(folder: Path) -> tuple[float, ...]:
    begin = time.perf_counter()
    shutil.copytree(folder / "base", folder / "out")
    read(folder / "rsft")
    seconds = time.perf_counter() - begin
    return seconds, seconds, 0.0, 0.0


def read(folder: Path) -> None:
    buffer = memoryview(bytearray(1 << 20))
    for path in folder.iterdir():
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def prepare(folder: Path, cold: bool) -> None:
    """Begin every run alike: no result, nothing waiting to be written, and the models in memory, or not."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    os.sync()
    for name in ("base", "rsft"):
        if not cold:
            read(folder / name)
            continue
        for path in (folder / name).iterdir():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@click.command()
@click.option("--layers", type=click.IntRange(min=6), default=12, show_default=True, help="88 MB each, and 262 MB.")
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--stock-runs", type=click.IntRange(min=0), default=1, show_default=True)
@click.option("--files", type=click.Choice(["one", "many", "both"]), default="both", show_default=True)
@click.option("--cold", is_flag=True, help="Read the models from the disk, not from the page cache.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to make the models; by default in $TMPDIR.")
def main(layers: int, runs: int, stock_runs: int, files: str, cold: bool, folder: Path | None) -> None:
    """Compare merging with mergekit's own method and with a copy."""
    console = Console(width=110)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, mergekit {version('mergekit')}, safetensors {version('safetensors')}"
    )
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        models = Path(temporary)
        make_models(models, layers)
        for many in (False, True) if files == "both" else (files == "many",):
            if many:
                shard(models / "base")
                shard(models / "rsft")
            measured: dict[str, list[tuple[float, ...]]] = {"stock": [], "mm4ke": [], "copy": []}
            rounds = range(max(runs, stock_runs))
            # Drawn seldom: the runs that are timed need the cores.
            for number in track(
                rounds, "measuring", console=Console(stderr=True), transient=True, refresh_per_second=1
            ):
                for method, count in (("stock", stock_runs), ("mm4ke", runs), ("copy", runs)):
                    if number < count:
                        prepare(models, cold)
                        run = copy(models) if method == "copy" else run_mergekit(models, method, many)
                        measured[method].append(run)
            show(console, models, measured, cold)


def show(console: Console, models: Path, measured: dict[str, list[tuple[float, ...]]], cold: bool) -> None:
    shards = [file.stat().st_size / 1e6 for file in (models / "base").glob("*.safetensors")]
    title = f"{sum(shards) / 1e3:.2f} GB in {len(shards)} files, {'from disk' if cold else 'in the page cache'}"
    table = Table("medians", "runs", "whole, s", "merging, s", "private, MB", "with files, MB", title=title)
    medians = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in measured.items() if rows}
    for name, (whole, merging, private, mapped) in medians.items():
        table.add_row(
            name, str(len(measured[name])), f"{whole:.2f}", f"{merging:.2f}", f"{private:.0f}", f"{mapped:.0f}"
        )
    console.print(table)
    if "stock" in medians:
        whole, merging = (medians["stock"][column] / medians["mm4ke"][column] for column in (0, 1))
        console.print(f"stock / mm4ke: {merging:.1f} in merging, {whole:.1f} for the whole command")
    pairs = [ours[1] / plain[1] for ours, plain in zip(measured["mm4ke"], measured["copy"], strict=True)]
    spread = f"{min(pairs):.2f} to {max(pairs):.2f}"
    console.print(f"merging / copy: {statistics.median(pairs):.2f} (median of pairs, which are {spread})")
    matrix = SIZES["hidden_size"] * SIZES["intermediate_size"] * 4 / 1e6
    console.print(f"largest file + 3 x largest changed matrix: {max(shards):.0f} + {3 * matrix:.0f} MB\n")


if __name__ == "__main__":
    main()
