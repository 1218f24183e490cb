"""Which folders a command may replace: those in which every file is one that such a command wrote.

Everything else is a user's: a quantized copy, notes, a `.git`, a model card that was edited. It is named and kept.
"""

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

from ..errors import MM4KEError

RECORD = ".mm4ke-files.json"


def note_files(folder: Path) -> None:
    """Note in the folder which files are in it, so that they are known as ours later. Call it when all are written.

    A file that changes afterwards shows by its size or by being younger than the record.
    """
    files = {name: (folder / name).lstat().st_size for name in sorted(_entries(folder))}
    (folder / RECORD).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def has_record(folder: Path) -> bool:
    """Whether `note_files` was called for the folder."""
    return (folder / RECORD).is_file()


def users_files(folder: Path, is_ours: Callable[[str], bool]) -> list[str]:
    """What is in a folder and must be kept: paths below it, sorted. Links and empty folders are always kept.

    is_ours: whether a file of this path below the folder is one that we write. Where there is a record it decides
             instead, and also files that changed since are the user's
    """
    record, noted = folder / RECORD, None
    if has_record(folder):
        try:
            noted = dict(json.loads(record.read_text(encoding="utf-8"))["files"])
            written = record.stat().st_mtime_ns
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MM4KEError(f"{record}: can't be read ({error}); remove {folder} or give another folder") from None
    kept = []
    for name in _entries(folder):
        found = (folder / name).lstat()
        if noted is None:
            ours = is_ours(name)
        else:
            ours = name == RECORD or (noted.get(name) == found.st_size and found.st_mtime_ns <= written)
        if not (ours and stat.S_ISREG(found.st_mode)):
            kept.append(name)
    return sorted(kept)


def refuse_to_replace(output: Path | str, problem: str, kept: list[str]) -> None:
    """Raise MM4KEError, in one line, where there are files to keep. problem: what the folder is not."""
    if kept:
        more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
        raise MM4KEError(
            f"{output}: {problem}: {', '.join(kept[:3])}{more} would be lost; move it away or give another folder"
        )


def _entries(folder: Path) -> list[str]:
    """The paths, below the folder, of all that is in it but folders which have something in them."""
    found = []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        found += [os.path.relpath(Path(place, name), folder) for name in (*files, *links)]
        if not (folders or files) and Path(place) != folder:
            found.append(os.path.relpath(place, folder))
    return found
