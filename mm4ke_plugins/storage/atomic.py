"""Writing a file or a folder at once, whatever ends the writer: nobody ever sees half of it.

    replace_text, replaced_file   one file
    replaced_folder               one folder
    locked_folder                 several files of a folder that fit each other, each by one of the above
    folder_beside, scratch_folder for what is needed meanwhile only
    refused_in_one_line           around any of them: a full disk as an MM4KEError

What is not complete lies in a hidden folder beside its target, `.NAME.mm4ke-XXXXXXXX`, on the same disk, so that it
can be renamed. It is removed

    after an exception, Ctrl-C   at once
    on SIGTERM and SIGHUP        at once; then the signal ends the process as it would have done without us. Where a
                                 program handles or ignores these signals, that is left as it is
    after SIGKILL, a crash       by the next run that writes to the same target

A folder that is left over is told from one in use by a lock, which the kernel drops with the process that holds it,
and from a user's own by its marker, a file that says which target the folder is for.
"""

import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import EEXIST, ENOTDIR, ENOTEMPTY
from pathlib import Path
from typing import IO

from ..errors import MM4KEError

MARKER = ".mm4ke-unfinished"
EARLIER = ".mm4ke-earlier"  # what the target was, between its being moved away and the new one's taking its place
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
# Some network file systems keep locks within one machine. What another one left is given up after so long.
SECONDS_UNTOUCHED = 24 * 3600


# ---- what to write with ----


def replace_text(path: Path, text: str) -> None:
    """Put `text` into the file at once: who reads it meanwhile sees the old or the new content."""
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A path to write a file to, which becomes `path` if all goes well. A symbolic link is followed.

    Raises MM4KEError where `path` is a folder or a device.
    """
    target = _real(path)
    if target.exists() and not target.is_file():
        raise MM4KEError(f"{path}: is no file that can be replaced; give another place")
    with folder_beside(target) as aside:
        yield aside / target.name
        os.replace(aside / target.name, target)


@contextmanager
def replaced_folder(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """A folder to write to, which becomes `path` if all goes well. It is not made yet.

    overwrite: a `path` that exists is replaced as a whole when the new folder is complete. Else it may be an empty
               folder; where another run has put something there meanwhile, the OSError of the renaming is raised

    The folder has path's name, which mergekit writes into the model card. Whether what is there may go is not asked
    here: see `replacing`.
    """
    with folder_beside(path) as aside:
        folder, earlier = aside / path.name, aside / EARLIER
        yield folder
        while True:
            try:
                folder.rename(path)
                return
            except OSError as error:
                if not overwrite or error.errno not in (ENOTEMPTY, EEXIST, ENOTDIR):
                    raise
            # Between these two another run may put its result there; then that is the earlier one.
            with suppress(FileNotFoundError):
                _delete(earlier)
                path.rename(earlier)


@contextmanager
def folder_beside(target: Path) -> Iterator[Path]:
    """An empty hidden folder beside `target`, for what is not complete; removed with all that is still in it.

    Folders that earlier runs left over for this target are removed first. Parents of `target` that don't exist are
    made, and stay if something is in them at the end.
    """
    aside = target.with_name(f".{target.name}.mm4ke-{secrets.token_hex(4)}")
    with removed_when_ended(), _made_folder(target.parent):
        try:
            _remove_left_over(target)
            aside.mkdir(mode=0o700)
            with _marked(aside, target):
                yield aside
        finally:
            _remove(aside, target)


@contextmanager
def _made_folder(folder: Path) -> Iterator[None]:
    """A folder that is there, with its parents. Those of them that were not there, and are empty at the end, go."""
    new = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for part in new:
            with suppress(OSError):
                part.rmdir()


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder in the system's folder for temporary files, removed as those beside a target are."""
    with folder_beside(Path(tempfile.gettempdir(), "mm4ke")) as folder:
        yield folder


@contextmanager
def locked_folder(folder: Path, wait: bool = True) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if missing, while several files in it are to fit each other.

    wait: until another run has finished; else MM4KEError is raised. Where a file system has no locks, nothing happens
    """
    with _made_folder(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problem = f"{folder}: another run is writing there; wait for it or give another folder"
                raise MM4KEError(problem) from None
            except OSError:
                pass
            yield
        finally:
            os.close(descriptor)


@contextmanager
def refused_in_one_line(target: Path, advice: str = "give another place") -> Iterator[None]:
    """Turn what the operating system says (a full disk, no permission ...) into an MM4KEError that names `target`."""
    try:
        yield
    except OSError as error:
        if error.strerror is None:  # not the operating system's, but a library's
            raise
        real, named = _real(target), error.filename if isinstance(error.filename, (str, Path)) else ""
        # Such as a file that was only read. What is beside the target and not complete, users don't know.
        is_other = named and f".{real.name}.mm4ke-" not in str(named) and _real(named) != real
        reason = f"{named}: {error.strerror}" if is_other else error.strerror
        raise MM4KEError(f"{target}: can't be written: {reason}; {advice}") from None


# ---- signals ----


class Ended(BaseException):
    """A signal came that is to end the process. Raised so that what is unfinished gets removed before."""


@contextmanager
def removed_when_ended() -> Iterator[None]:
    """While this is open, a signal that would end the process at once becomes `Ended` in the main thread.

    When it closes, the process ends by that signal, as its parent expects. Only the outermost of several does this,
    and only where the signal has its default meaning: a program's own handler knows better what to do.
    """
    received: list[int] = []

    def handle(number: int, _frame: object) -> None:
        received.append(number)
        if len(received) == 1:  # a second one does not interrupt the removing
            raise Ended(number)

    is_main = threading.current_thread() is threading.main_thread()
    numbers = [number for number in ENDING_SIGNALS if is_main and signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in numbers:
            signal.signal(number, handle)
        yield
    finally:
        for number in numbers:
            if signal.getsignal(number) is handle:
                signal.signal(number, signal.SIG_DFL)
        if received:
            os.kill(os.getpid(), received[0])


# ---- what is left over ----


def _marker(target: Path) -> dict[str, str]:
    return {"unfinished": target.name, "host": socket.gethostname()}


@contextmanager
def _marked(aside: Path, target: Path) -> Iterator[None]:
    """Hold the lock on the folder's marker, which appears when it is locked."""
    new = aside / f"{MARKER}-new"
    with new.open("w", encoding="utf-8") as file:
        json.dump(_marker(target), file)
        file.flush()
        _try_to_lock(file)  # where that can't be done, nobody else can take the lock either
        new.rename(aside / MARKER)
        yield


def _try_to_lock(file: IO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_left_over(target: Path) -> None:
    """Remove what runs that were killed have left over for this target."""
    name = re.compile(rf"\.{re.escape(target.name)}\.mm4ke-[0-9a-f]{{8}}")
    for folder in [Path(entry) for entry in os.scandir(target.parent) if name.fullmatch(entry.name)]:
        with suppress(OSError, ValueError):
            if folder.is_symlink() or (folder / MARKER).is_symlink():
                continue
            with (folder / MARKER).open("r+", encoding="utf-8") as file:
                marker = json.load(file)
                here = marker == _marker(target)
                elsewhere = isinstance(marker, dict) and marker.get("unfinished") == target.name
                untouched = time.time() - max(path.lstat().st_mtime for path in folder.rglob("*")) > SECONDS_UNTOUCHED
                ours = {path.name for path in folder.iterdir()} <= {MARKER, EARLIER, target.name}
                if ours and (here or elsewhere and untouched) and _try_to_lock(file):
                    _remove(folder, target)


def _remove(aside: Path, target: Path) -> None:
    """Remove such a folder, the marker last. What `target` was goes back if nothing took its place."""
    with suppress(OSError):
        if os.path.lexists(aside / EARLIER) and not os.path.lexists(target):
            (aside / EARLIER).rename(target)
        for path in aside.iterdir():
            if path.name != MARKER:
                _delete(path)
    shutil.rmtree(aside, ignore_errors=True)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _real(path: Path | str) -> Path:
    """The absolute path behind symbolic links; of what does not exist too."""
    return Path(os.path.realpath(path))
