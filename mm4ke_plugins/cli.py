"""The `mm4ke` command. Each subcommand parses its options and calls one function; the work is elsewhere.

The imports are inside the subcommands so that `mm4ke --help` and `mm4ke facts` need not wait for torch.
"""

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


def main() -> None:
    """Entry point of the console script: a user's mistake is one line and exit status 1."""
    report_in_one_line()
    cli(prog_name="mm4ke")
