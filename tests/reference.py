"""Write recipes/mm4ke.md, the reference of the `mm4ke` command, from the command itself.

    make docs                                      or: python tests/reference.py

`tests/test_docs.py` fails where the page is not what this writes.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from mm4ke_plugins.cli import cli

PAGE = Path(__file__).parents[1] / "recipes" / "mm4ke.md"
WIDTH = 110
HEAD = """\
# The `mm4ke` command

What `mm4ke --help` and the help of every subcommand print. `make docs` writes this page.
"""


def commands(command: click.Command, parent: click.Context | None = None) -> Iterator[click.Context]:
    """A command and all that are below it, in the order of their names."""
    context = click.Context(
        command,
        info_name=command.name if parent else "mm4ke",
        parent=parent,
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        **command.context_settings,
    )
    yield context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from commands(command.get_command(context, name), context)


def text() -> str:
    """The whole page."""
    sections = [HEAD]
    for context in commands(cli):
        sections.append(f"## {context.command_path}\n\n```\n{context.command.get_help(context)}\n```\n")
    return "\n".join(sections)


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
    sys.stdout.write(f"written: {PAGE}\n")
