"""How long it takes to learn the facts: plain depth-first R-SFT against breadth-first batches, epoch by epoch in turn.

    python tests/benchmarks/breadth_first.py --facts ZsRE-test-all.json --n 100

Needs:  work/base   mm4ke model --link work/base

Depth-first are the settings of recipes/paper/rsft.yaml, plain (the whole model for every loss) and fast; breadth-first those
of recipes/breadth-first/rsft.yaml. A way is done when, after an epoch, the edit success in the chat template is at
least the goal; asking for it is not counted. The scores are EasyEdit's, in the chat template, at that point.
"""

import tempfile
from pathlib import Path

import click
from training import ROOT, Recipe, Run, machine

from mm4ke_plugins.knowedit.dataset import consistent_records, write_dataset
from mm4ke_plugins.knowedit.metrics import METRICS, mean_scores, predict, question_scores, questions_of
from mm4ke_plugins.knowedit.prompts import encode
from mm4ke_plugins.knowedit.records import read_records
from mm4ke_plugins.rsft.forward import FastForward

WAYS = {
    "depth-first, plain": ("recipes/paper/rsft.yaml", None),
    "depth-first": ("recipes/paper/rsft.yaml", FastForward),
    "breadth-first": ("recipes/breadth-first/rsft.yaml", FastForward),
}


@click.command()
@click.option("--facts", type=click.Path(path_type=Path), required=True, help="As `mm4ke facts` reads them.")
@click.option("--n", default=100, show_default=True, help="Records.")
@click.option("--skip", default=0, show_default=True, help="Records before them that are left out.")
@click.option("--base", type=click.Path(path_type=Path), default=ROOT / "work/base", show_default=True)
@click.option("--goal", default=0.99, show_default=True, help="Edit success.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Of the breadth-first recipe.")
@click.option("--only-breadth", is_flag=True)
def main(
    facts: Path, n: int, skip: int, base: Path, goal: float, overrides: tuple[str, ...], only_breadth: bool
) -> None:
    import yaml

    records = consistent_records(read_records(facts, skip + n)[skip:], True)
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(records, Path(folder), "facts")
        for name, (path, fast) in WAYS.items():
            if only_breadth and name != "breadth-first":
                continue
            changes = {"model_name_or_path": str(base), "dataset_dir": folder, "output_dir": f"{folder}/rsft"}
            if name == "breadth-first":
                changes |= {key: yaml.safe_load(value) for key, value in (pair.split("=") for pair in overrides)}
            runs[name] = Run(Recipe(ROOT / path, **changes), fast)
    run = next(iter(runs.values()))
    questions = questions_of(records)
    codes = [encode(run.recipe.tokenizer, question, "chat") for question in questions]
    edits = [index for index, question in enumerate(questions) if question.metric == "edit_success"]
    before = predict(run.recipe.model(), codes)

    def success(run: Run) -> float:
        asked = [codes[index] for index in edits]
        said = predict(run.model.eval(), asked)
        run.model.train()
        scores = question_scores([questions[index] for index in edits], asked, said, said)
        return sum(scores) / len(scores)

    print(f"{machine()}\n{len(records)} facts, edit success wanted: {goal}")
    waiting, curves = dict(runs), {name: [] for name in runs}
    while waiting:
        for name, run in list(waiting.items()):
            for index in range(len(run.recipe.batches)):
                run.visit(index)
            curves[name].append((round(run.seconds, 1), round(success(run), 3)))
            print(f"{name}: epoch {len(curves[name])}: {run.seconds:.1f} s, {curves[name][-1][1]}", flush=True)
            if curves[name][-1][1] >= goal or len(curves[name]) == int(run.recipe.training.num_train_epochs):
                del waiting[name]

    first = next(iter(runs.values()))
    print(f"\n{'':<20}{'seconds':>8}{'ratio':>7}{'epochs':>7}{'updates':>8}  " + "  ".join(METRICS))
    for name, run in runs.items():
        after = predict(run.model.eval(), codes)
        scores = mean_scores(questions, question_scores(questions, codes, after, before))
        shown = "  ".join(f"{scores[metric]:>{len(metric)}.3f}" for metric in METRICS)
        print(
            f"{name:<20}{run.seconds:>8.1f}{first.seconds / run.seconds:>7.2f}{len(curves[name]):>7}{run.updates:>8}"
            f"  {shown}"
        )


if __name__ == "__main__":
    main()
