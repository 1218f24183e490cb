"""Writing at once: what interrupts a writer, what it leaves, two writers of one target, and what must not be touched."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mm4ke_plugins.errors import MM4KEError
from mm4ke_plugins.storage.atomic import (
    EARLIER,
    MARKER,
    SECONDS_UNTOUCHED,
    locked_folder,
    refused_in_one_line,
    removed_when_ended,
    replace_text,
    replaced_file,
    replaced_folder,
)

# Says that it is writing, and waits for as long as it may live.
WRITER = """
import signal, sys, time
from pathlib import Path
from mm4ke_plugins.storage.atomic import replaced_file, replaced_folder

{before}
with {writer}(Path(sys.argv[1])) as place:
    if "{writer}" == "replaced_folder":
        place.mkdir()
        place = place / "model"
    place.write_text("half")
    print("writing", flush=True)
    {inside}
print("written", flush=True)
"""
WRITERS = ["replaced_folder", "replaced_file"]


def start(target: Path, writer: str, before: str = "", inside: str = "time.sleep(60)") -> subprocess.Popen:
    code = WRITER.format(writer=writer, before=before, inside=inside)
    process = subprocess.Popen([sys.executable, "-c", code, target], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    return process


def end(process: subprocess.Popen, number: int) -> int:
    process.send_signal(number)
    process.communicate(timeout=30)
    return process.returncode


def write(target: Path, writer: str, text: str = "whole") -> None:
    if writer == "replaced_file":
        replace_text(target, text)
        return
    with replaced_folder(target) as folder:
        folder.mkdir()
        (folder / "model").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- interrupted writers ----


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing_and_ends_the_process(tmp_path, writer, number):
    process = start(tmp_path / "new" / "out", writer)
    assert names(tmp_path / "new")
    status = end(process, number)
    assert status == -number  # its parent sees which signal it was
    assert names(tmp_path) == []


@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path, writer):
    out = tmp_path / "out"
    for _ in range(2):
        assert end(start(out, writer), signal.SIGKILL) == -signal.SIGKILL
        assert len(names(tmp_path)) == 1 and not out.exists()
    write(out, writer)
    assert names(tmp_path) == ["out"]


def test_a_program_that_handles_or_ignores_a_signal_goes_on_doing_so(tmp_path):
    own = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))"
    assert end(start(tmp_path / "out", "replaced_folder", own), signal.SIGTERM) == 7
    assert names(tmp_path) == []
    ignored = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"  # as nohup does
    assert end(start(tmp_path / "out", "replaced_folder", ignored, "time.sleep(1)"), signal.SIGHUP) == 0
    assert names(tmp_path) == ["out"]


def test_handlers_are_those_of_before_and_only_the_outermost_ends_the_process(tmp_path):
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with removed_when_ended(), replaced_folder(tmp_path / "out") as folder:
        handler = signal.getsignal(signal.SIGTERM)
        write(folder, "replaced_folder")
        assert signal.getsignal(signal.SIGTERM) is handler != signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    inside = "with replaced_file(place.with_name('part')) as part: part.touch(); time.sleep(60)"
    assert end(start(tmp_path / "nested", "replaced_folder", inside=inside), signal.SIGTERM) == -signal.SIGTERM
    assert names(tmp_path) == ["out"]


def test_in_another_thread(tmp_path):
    """Only the main thread may set handlers."""
    thread = threading.Thread(target=write, args=(tmp_path / "out", "replaced_folder"))
    thread.start()
    thread.join()
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("writer", WRITERS)
def test_an_exception_leaves_nothing(tmp_path, writer):
    with (
        pytest.raises(RuntimeError),
        {"replaced_folder": replaced_folder, "replaced_file": replaced_file}[writer](
            tmp_path / "deep" / "out"
        ) as place,
    ):
        place.touch()
        raise RuntimeError
    assert names(tmp_path) == []


def left_over(target: Path, host: str | None = None, name: str | None = None, **files: str) -> Path:
    folder = target.with_name(f".{target.name}.mm4ke-0123abcd")
    folder.mkdir()
    (folder / MARKER).write_text(json.dumps({"unfinished": name or target.name, "host": host or socket.gethostname()}))
    for file, text in files.items():
        (folder / file.replace("_", ".").replace("earlier", EARLIER)).write_text(text)
    return folder


def test_an_earlier_result_comes_back_where_a_run_was_killed_between_two_renamings(tmp_path):
    out = tmp_path / "out"
    left_over(out, out="new", earlier="old")
    with pytest.raises(RuntimeError), replaced_file(out):
        raise RuntimeError
    assert names(tmp_path) == ["out"] and out.read_text() == "old"
    left_over(out, out="new", earlier="older")
    write(out, "replaced_file")
    assert names(tmp_path) == ["out"] and out.read_text() == "whole"


# ---- what is a user's ----


def test_what_only_looks_like_a_leftover_stays(tmp_path):
    out = tmp_path / "out"
    (tmp_path / ".out.1234").write_text("by hand")
    (tmp_path / ".out-abcdefgh").mkdir()
    (tmp_path / ".out.mm4ke-abcd0123").write_text("by hand")
    (tmp_path / ".out.mm4ke-abcd4567").mkdir()
    (tmp_path / ".out.mm4ke-abcd4567" / "notes").touch()
    (tmp_path / ".out.mm4ke-abcd89ab").symlink_to(left_over(tmp_path / "other"))
    left_over(out, out="half", notes="by hand")
    (tmp_path / ".out.mm4ke-00000000").mkdir()
    (tmp_path / ".out.mm4ke-00000000" / MARKER).write_text("[]")
    left_over(tmp_path / "out.2", name="out")
    before = names(tmp_path)
    write(out, "replaced_folder")
    assert names(tmp_path) == sorted([*before, "out"])
    assert sum(len(files) for _, _, files in os.walk(tmp_path)) == 10


@pytest.mark.parametrize("days", [0, 2])
def test_what_another_machine_left_is_removed_after_a_day(tmp_path, days):
    """Its lock may not be seen here, on a network file system."""
    folder = left_over(tmp_path / "out", host="another", out="half")
    then = time.time() - days * SECONDS_UNTOUCHED
    for path in folder.iterdir():
        os.utime(path, (then, then))
    write(tmp_path / "out", "replaced_folder")
    assert folder.exists() is (days == 0)


# ---- several writers ----


@pytest.mark.parametrize("writer", WRITERS)
def test_two_writers_of_one_target_both_succeed(tmp_path, writer):
    out = tmp_path / "out"
    process = start(out, writer, inside="time.sleep(1.5)")
    write(out, writer)
    text = out.read_text() if writer == "replaced_file" else (out / "model").read_text()
    assert text == "whole"
    assert process.communicate(timeout=30)[0] == "written\n"
    assert names(tmp_path) == ["out"]


MANY = """
import sys
from pathlib import Path
from mm4ke_plugins.storage.atomic import replaced_folder

for number in range(100):
    with replaced_folder(Path(sys.argv[1])) as folder:
        folder.mkdir()
        for name in "abc":
            (folder / name).write_text(f"{sys.argv[2]} {number}")
"""


def test_many_writers_make_no_mix(tmp_path):
    out = tmp_path / "out"
    runs = [subprocess.Popen([sys.executable, "-c", MANY, out, str(run)]) for run in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert names(tmp_path) == ["out"]
    assert len({(out / name).read_text() for name in "abc"}) == 1


def test_where_nothing_may_be_replaced_the_second_writer_is_refused(tmp_path):
    with pytest.raises(OSError, match="not empty"), replaced_folder(tmp_path / "out", overwrite=False) as second:
        write(second, "replaced_folder", "second")
        with replaced_folder(tmp_path / "out", overwrite=False) as first:
            write(first, "replaced_folder", "first")
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "model").read_text() == "first"


def test_locked_folder(tmp_path):
    out, message = tmp_path / "out", "^.*/out: another run is writing there"
    with locked_folder(out), pytest.raises(MM4KEError, match=message), locked_folder(out, wait=False):
        pass
    with locked_folder(out, wait=False):
        (out / "file").touch()
    assert names(out) == ["file"]
    with locked_folder(tmp_path / "deep" / "out"):
        pass
    assert names(tmp_path) == ["out"]  # nothing was written to the other


# ---- targets that can't be ----


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to("file")
    replace_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "text"


def test_no_file_that_can_be_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(MM4KEError, match=f"^{target}: is no file that can be replaced; give another place"):
            replace_text(target, "text")
    assert names(tmp_path) == ["pipe"] and Path("/dev/null").is_char_device()


def test_what_the_system_says_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "out"
    message = f"^{target}: can't be written: {tmp_path}/file: File exists; give another place$"
    with pytest.raises(MM4KEError, match=message), refused_in_one_line(target):
        write(target, "replaced_folder")
    source = tmp_path / "source"
    message = f"^{tmp_path}/out: can't be written: {source}: No such file or directory; give another place$"
    out = tmp_path / "out"
    with pytest.raises(MM4KEError, match=message), refused_in_one_line(out), replaced_folder(out):
        source.read_text()
    with pytest.raises(OSError, match="^no answer$"), refused_in_one_line(target):
        raise OSError("no answer")  # a library's: not about the target
    assert names(tmp_path) == ["file"]
