"""One kind of error for everything a user can put right.

The message is one line that names the file, the key, the value found and what would be right, for example

    recipes/rsft.yaml: rsft_loss_threshold: -1 is not a loss; give a number above 0 (the paper uses 0.1)
"""

import sys
from importlib.util import find_spec
from types import TracebackType


class MM4KEError(ValueError):
    """A mistake in the user's input. `str(error)` is the one line that the user sees."""


def require_report_extra(feature: str, *modules: str) -> None:
    """Refuse a feature that imports what only the extra "report" installs. Raises MM4KEError where one is missing."""
    for module in modules:
        if find_spec(module) is None:
            raise MM4KEError(f'{feature} needs {module}; pip install "mm4ke-plugins[report]"')


def first_line(error: Exception) -> str:
    """What a library's exception says, shortened to fit into one line of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def report_in_one_line() -> None:
    """Print an uncaught `MM4KEError` as one line, without its traceback. The exit status stays 1.

    The hosts' commands show every exception with a traceback of dozens of lines, in which a user's typo
    is hard to find. All other exceptions go to the hook that was installed before. Idempotent.
    """
    previous = sys.excepthook
    if getattr(previous, "is_mm4ke", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, MM4KEError):
            # The hosts' bars, or the line would go on where one ends.
            for bar in list(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())):
                bar.close()
            print(f"mm4ke: error: {error}", file=sys.stderr)
        else:
            previous(kind, error, trace)

    hook.is_mm4ke = True
    sys.excepthook = hook
