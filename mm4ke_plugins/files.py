"""Writing a file or a folder at once."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Put `text` into the file at once: who reads it meanwhile sees the old or the new content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def written_aside(out_path: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `out_path` if all goes well and is removed if not.

    An `out_path` that exists is replaced as a whole, and only then. The folder is in a hidden sibling of out_path, on
    the same disk, so that it can be renamed; and it has out_path's name, which mergekit writes into the model card. It is
    not made yet.
    """
    out_path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_path.parent, prefix=f".{out_path.name}-") as aside:
        folder = Path(aside, out_path.name)
        yield folder
        earlier = Path(aside, f"earlier-{out_path.name}")
        if out_path.exists():
            out_path.rename(earlier)
        try:
            folder.rename(out_path)
        except BaseException:
            if earlier.exists():
                earlier.rename(out_path)
            raise
