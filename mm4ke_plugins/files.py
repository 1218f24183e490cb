"""Writing a file at once."""

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Put `text` into the file at once: who reads it meanwhile sees the old or the new content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
