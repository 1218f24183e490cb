"""Time and memory of R-SFT by the number of facts: the first grows as they do, the second stops growing.

    python tests/benchmarks/scaling.py

Needs:  work/base   mm4ke model --link work/base

The first 6 layers of SmolLM2-135M-Instruct (the time of an update is not the point here), invented facts, one epoch
with K = 1, fast paths as in recipes/paper/rsft.yaml. Each number of facts has a process of its own. Its memory is the peak
resident set during training minus that before it; the prefixes of facts are kept up to the default budget.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from training import ROOT, Recipe, Run, machine

from mm4ke_plugins.rsft.prefix import PREFIX_CACHE_MB

LAYERS = 6
EPOCHS = 1


def invented(count: int) -> list[dict[str, str]]:
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    choose = random.Random(0)

    def name() -> str:
        return "".join(choose.choices(syllables, k=3)).title()

    return [{"instruction": f"Who is the mayor of {name()}?", "input": "", "output": name()} for _ in range(count)]


def resident_mb(peak: bool) -> float:
    if peak:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def train(base: Path, count: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "facts.json").write_text(json.dumps(invented(count)))
        Path(folder, "dataset_info.json").write_text(json.dumps({"facts": {"file_name": "facts.json"}}))
        recipe = Recipe(
            ROOT / "recipes/paper/rsft.yaml",
            model_name_or_path=str(base),
            dataset_dir=folder,
            num_train_epochs=EPOCHS,
            rsft_steps_per_sample=1,
            output_dir=f"{folder}/rsft",
        )
    whole = recipe.model
    recipe.model = lambda: shortened(whole())
    run = Run(recipe)
    before = resident_mb(peak=False)
    for _ in range(EPOCHS):
        for index in range(count):
            run.visit(index)
    cache = run.visitor.fast.cache
    return {
        "facts": count,
        "seconds": run.seconds,
        "updates": run.updates,
        "memory": resident_mb(peak=True) - before,
        "kept": cache.used / 2**20,
    }


def shortened(model):
    del model.model.layers[LAYERS:]
    model.config.num_hidden_layers = LAYERS
    return model


@click.command()
@click.option("--base", type=click.Path(path_type=Path), default=ROOT / "work/base", show_default=True)
@click.option("--facts", default="100,1000", show_default=True)
@click.option("--only", type=int, hidden=True, help="Train this number in this process.")
def main(base: Path, facts: str, only: int | None) -> None:
    if only:
        print("RESULT " + json.dumps(train(base, only)))
        return
    print(f"{machine()}\n{LAYERS} layers, {EPOCHS} epoch, K = 1, prefixes up to {PREFIX_CACHE_MB} MB\n")
    print(
        f"{'facts':>6}{'updates':>9}{'seconds':>9}{'ms/visit':>10}{'ratio':>7}{'memory MB':>11}{'of it prefixes':>16}"
    )
    first = None
    for count in map(int, facts.split(",")):
        command = [sys.executable, __file__, "--base", base, "--only", str(count)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        line = next(line for line in run.stdout.splitlines() if line.startswith("RESULT "))
        result = json.loads(line.removeprefix("RESULT "))
        visit = 1000 * result["seconds"] / (count * EPOCHS)
        first = first or visit
        print(
            f"{count:>6}{result['updates']:>9}{result['seconds']:>9.1f}{visit:>10.1f}{visit / first:>7.2f}"
            f"{result['memory']:>11.0f}{result['kept']:>16.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
