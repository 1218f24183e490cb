"""What editing spares of what a model knew, and what it costs: settings of R-SFT side by side, on the same facts.

    python tests/benchmarks/sparing.py --facts ZsRE-test-all.json --skip 100 --n 40 \\
        --set plain: --set sparing:gradient_at=from_subject,guard_weight=20,learning_rate=2e-3

Needs:  work/base   mm4ke model --link work/base

Every `--set NAME:KEY=VALUE,...` changes some of BREADTH_FIRST, the settings of recipes/breadth-first/rsft.yaml; several
layers are 5/7/9. The facts are trained in the chat template. A row is added to --output as soon as it is measured:

    success ... locality   EasyEdit's metrics, teacher-forced, in the chat template
    free, free gen.        exact match of the free answers to the facts' prompts and to their first rephrases
    known, KL              everyday questions that the base answers right: the share kept, and see `known_facts.py`
    ppl                    perplexity of the neutral text, over the base's
    seconds                of training alone
"""

import dataclasses
import json
import time
from pathlib import Path

import click
import torch
import yaml
from matplotlib.figure import Figure
from training import ROOT, machine

from mm4ke_plugins.knowedit.dataset import consistent_records
from mm4ke_plugins.knowedit.known_facts import KnownFacts
from mm4ke_plugins.knowedit.metrics import (
    generate,
    mean_scores,
    neutral_text,
    perplexity,
    predict,
    question_scores,
    questions_of,
)
from mm4ke_plugins.knowedit.normalize import normalize
from mm4ke_plugins.knowedit.prompts import encode
from mm4ke_plugins.knowedit.records import read_records
from mm4ke_plugins.merging.equations import merge
from mm4ke_plugins.rsft.facts import encode_fact
from mm4ke_plugins.rsft.guard import Guard, guard_texts
from mm4ke_plugins.rsft.layers import ffn_parameter_names, ffns_of
from mm4ke_plugins.rsft.live import train_facts
from mm4ke_plugins.rsft.settings import Settings
from mm4ke_plugins.rsft.subject import learned_tokens, subjects_alone
from mm4ke_plugins.storage.models import load_model, load_tokenizer

BREADTH_FIRST = {
    "steps_per_sample": 1,
    "facts_per_visit": 4,
    "num_epochs": 40,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "weight": 1.0,
    "density": 1.0,
}


@click.command()
@click.option("--facts", type=click.Path(path_type=Path), required=True, help="As `mm4ke facts` reads them.")
@click.option("--n", default=40, show_default=True, help="Records.")
@click.option("--skip", default=0, show_default=True, help="Records before them that are left out.")
@click.option("--base", type=click.Path(path_type=Path), default=ROOT / "work/base", show_default=True)
@click.option("--set", "rows", multiple=True, metavar="NAME:KEY=VALUE,...")
@click.option("--merge", "merges", multiple=True, metavar="WEIGHT/DENSITY", help="Measure these of each training.")
@click.option("--output", type=click.Path(path_type=Path), help="A file of JSON lines.")
@click.option("--figure", type=click.Path(path_type=Path), help="Draw all rows of --output.")
def main(
    facts: Path,
    n: int,
    skip: int,
    base: Path,
    rows: tuple[str, ...],
    merges: tuple[str, ...],
    output: Path | None,
    figure: Path | None,
) -> None:
    records = consistent_records(read_records(facts, skip + n)[skip:], True)
    tokenizer = load_tokenizer(base)
    questions = questions_of(records)
    codes = [encode(tokenizer, question, "chat") for question in questions]
    model = load_model(base, torch.float32, "cpu")
    before = predict(model, codes)
    known = KnownFacts(model, tokenizer)
    base_ppl = perplexity(model, tokenizer, neutral_text())
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base_scores = mean_scores(questions, question_scores(questions, codes, before, before))
    print(
        f"{machine()}\n{facts.name}: {len(records)} facts after {skip}; the base knows {len(known.facts)}, {base_scores}"
    )

    def measure(name: str, settings: Settings, seconds: float) -> None:
        scores = mean_scores(questions, question_scores(questions, codes, predict(model, codes), before))

        def share(pairs: list[tuple[str, str]]) -> float:
            said = generate(model, tokenizer, [prompt for prompt, _ in pairs], 16)
            texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in said]
            right = sum(normalize(text) == normalize(answer) for text, (_, answer) in zip(texts, pairs, strict=True))
            return right / len(pairs)

        kept = known.measure(model)
        found = scores | {
            "free": share([(fact.prompt, fact.target_new) for fact in records]),
            "free_gen": share(
                [(fact.rephrase_prompts[0], fact.target_new) for fact in records if fact.rephrase_prompts]
            ),
            "known": kept.kept,
            "kl": kept.kl,
            "ppl": perplexity(model, tokenizer, neutral_text()) / base_ppl,
            "seconds": seconds,
        }
        line = "  ".join(f"{key} {value:.3f}" for key, value in found.items())
        print(f"{name:<24}{line}", flush=True)
        if output:
            content = {"name": name, "facts": facts.name, "skip": skip, "n": len(records)}
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(content | {"settings": dataclasses.asdict(settings)} | found) + "\n")

    for row in rows:
        name, _, changes = row.partition(":")
        values = {
            key: yaml.safe_load(value.replace("/", ","))
            for key, value in (pair.split("=") for pair in changes.split(",") if pair)
        }
        values = {
            key: float(value) if isinstance(value, str) and "e-" in value else value for key, value in values.items()
        }
        settings = Settings(**BREADTH_FIRST | values)
        model.load_state_dict(original)
        names = ffn_parameter_names(model, list(settings.layers), list(settings.modules))
        learned_from = subjects_alone([(fact.prompt, fact.subject) for fact in records])
        encoded = [
            encode_fact(
                tokenizer, fact.prompt, fact.target_new, "chat",
                gradient_at=settings.gradient_at, subject=learned_from[fact.prompt],
            )
            for fact in records
        ]  # fmt: skip
        begin = time.perf_counter()
        guard = None
        if settings.guard_weight:
            texts = guard_texts(tokenizer, [(fact.prompt, fact.subject) for fact in records], "chat")
            learned = learned_tokens([fact.ids for fact in encoded], [fact.learns for fact in encoded])
            guard = Guard(model, ffns_of(model, list(settings.layers)), texts, settings.guard_weight, learned)
        train_facts(model, names, encoded, settings, guard)
        seconds = time.perf_counter() - begin
        model.eval()
        trained = {each: model.get_parameter(each).detach().clone() for each in names}
        for merged in merges or (f"{settings.weight}/{settings.density}",):
            weight, density = map(float, merged.split("/"))
            with torch.no_grad():
                for each in names:
                    tensor = merge(original[each], [trained[each]], [weight], [density], names=["base", "edited"])
                    model.get_parameter(each).copy_(tensor)
            measure(f"{name} {merged}", settings, seconds)

    if output and figure:
        draw([json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()], figure)


def draw(rows: list[dict], path: Path) -> None:
    """What is learned over what is spared, a point for each row, in two panels."""
    panels = (("locality", "generalization"), ("known", "free_gen"))
    titles = {"known": "known facts kept", "free_gen": "generalization, asked freely"}
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    panes = figure.subplots(1, 2)
    for axes, (x, y) in zip(panes, panels, strict=True):
        for row in rows:
            axes.plot(row[x], row[y], "o", markersize=8, label=row["name"])
        axes.set(xlabel=titles.get(x, x), ylabel=titles.get(y, y), xlim=(0, 1.02), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    figure.legend(*panes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
