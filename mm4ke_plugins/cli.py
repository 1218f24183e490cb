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


def main() -> None:
    """Entry point of the console script: a user's mistake is one line and exit status 1."""
    report_in_one_line()
    cli(prog_name="mm4ke")
