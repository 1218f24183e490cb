"""How much faster R-SFT is for its fast paths: the same training, plain and fast, visit by visit in turn.

    python tests/benchmarks/rsft.py --facts ZsRE-test-all.json --n 100

Needs:  work/base   mm4ke model --link work/base

The settings are those of recipes/paper/rsft.yaml. Plain is Algorithm 1 with the whole model's forward for every loss. Every
variant has its own copy of the model; at the end all must hold the same parameters. `--variants all` takes the fast
paths apart.
"""

import tempfile
from contextlib import nullcontext
from pathlib import Path

import click
from training import ROOT, Recipe, Run, machine

from mm4ke_plugins.knowedit.dataset import consistent_records, write_dataset
from mm4ke_plugins.knowedit.records import read_records
from mm4ke_plugins.rsft.forward import FastForward


class OnlyAnswerRows(FastForward):
    """Without the frozen prefix."""

    def __init__(self, *args):
        super().__init__(*args)
        self.prefix.given = lambda prefix: nullcontext()

    def _prefix(self, samples, tokens):
        return None


VARIANTS = {
    "plain": None,
    "answer rows": OnlyAnswerRows,
    "+ frozen prefix": FastForward,
}


@click.command()
@click.option("--facts", type=click.Path(path_type=Path), required=True, help="As `mm4ke facts` reads them.")
@click.option("--n", default=100, show_default=True, help="Records.")
@click.option("--base", type=click.Path(path_type=Path), default=ROOT / "work/base", show_default=True)
@click.option("--epochs", default=5, show_default=True)
@click.option("--variants", type=click.Choice(["two", "all"]), default="two", show_default=True)
def main(facts: Path, n: int, base: Path, epochs: int, variants: str) -> None:
    names = list(VARIANTS) if variants == "all" else ["plain", "+ frozen prefix"]
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(consistent_records(read_records(facts, n), True), Path(folder), "facts")
        recipe = Recipe(
            ROOT / "recipes/paper/rsft.yaml",
            model_name_or_path=str(base),
            dataset_dir=folder,
            num_train_epochs=epochs,
            output_dir=f"{folder}/rsft",
        )
    runs = {name: Run(recipe, VARIANTS[name]) for name in names}
    tokens = [batch["input_ids"].shape[1] for batch in recipe.batches]
    print(f"{machine()}\n{len(tokens)} facts of {min(tokens)} to {max(tokens)} tokens with padding, {epochs} epochs")
    order = list(runs.values())
    for epoch in range(epochs):
        before = [(run.seconds, run.updates) for run in order]
        for index in range(len(tokens)):
            for run in order[index % len(order) :] + order[: index % len(order)]:  # none is always first
                run.visit(index)
        seconds = ", ".join(f"{run.seconds - was[0]:.1f} s" for run, was in zip(order, before, strict=True))
        print(f"epoch {epoch + 1}: {order[0].updates - before[0][1]} updates; {seconds}", flush=True)
    plain = runs["plain"]
    print(
        f"\n{'':<18}{'seconds':>9}{'ratio':>8}{'updates':>9}   relative distance of the trained weights from plain's"
    )
    for name, run in runs.items():
        distance = (run.weights() - plain.weights()).norm() / plain.weights().norm()
        print(f"{name:<18}{run.seconds:>9.1f}{plain.seconds / run.seconds:>8.2f}{run.updates:>9}   {distance:.1e}")


if __name__ == "__main__":
    main()
