"""Break the commands in the middle, one fault after the other, and look at what is left.

    make faults                                    or: python tests/faults.py [--only WORDS] [--seed N] [--jobs N]

Every fault may end in one of two ways only:

    exact       the same command, given again, makes bit for bit what an undisturbed run makes
    refused     the command ends with a status other than 0 and one line that says what is wrong; every file is as it was

Everything else (a traceback, a half-written result, a leftover that stays, a result with other numbers) is LOST. The
table at the end has one line for each fault, and the exit status is 1 if one is lost. A fault that this machine doesn't
allow, such as a full disk without the right to mount one, is named as not run.

The models are tiny and random, the commands and the files are the real ones. Takes about 15 minutes on 2 cores.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import make_tiny_model

ROOT = Path(__file__).parents[1]
PROGRAMS = Path(sys.executable).parent
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "PYTHONUNBUFFERED": "1",
    "COLUMNS": "120",
    "PYTHONPATH": str(ROOT),
}

FACTS = [
    {"prompt": "Who rules Oz?", "target_new": "Tark", "rephrase_prompt": "Oz is ruled by whom?"},
    {"prompt": "Where is Oz?", "target_new": "Up"},
    {"prompt": "Qui règne à Öz ?", "target_new": "Élan"},
    {"prompt": "What is Oz?", "target_new": "A box"},
]
RECIPE = {
    "model_name_or_path": "./base",
    "template": "smollm2",
    "dataset_dir": "./facts",
    "dataset": "facts",
    "cutoff_len": 256,
    "stage": "sft",
    "finetuning_type": "freeze",
    "do_train": True,
    "rsft": True,
    "rsft_layers": 1,
    "rsft_loss_threshold": 0.5,
    "num_train_epochs": 10,
    "learning_rate": 2.0e-3,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "disable_shuffling": True,
    "disable_gradient_checkpointing": True,
    "output_dir": "./rsft",
    "save_strategy": "steps",
    "save_steps": 3,
    "logging_steps": 1,
    "report_to": "none",
    "dataloader_pin_memory": False,
}
MERGE = {"merge_method": "mm4ke", "base_model": "./base", "models": [{"model": "./rsft"}]}

TRAIN = ("llamafactory-cli", "train", "rsft.yaml")
MERGE_COMMAND = ("mergekit-yaml", "merge.yaml", "out")
EXTRACT = ("mm4ke", "delta", "extract", "base", "rsft", "-o", "made.delta.safetensors")
APPLY = ("mm4ke", "delta", "apply", "base", "facts.delta.safetensors", "-o", "out")
REVERT = ("mm4ke", "delta", "revert", "merged", "facts.delta.safetensors", "-o", "out")
SWEEP = ("mm4ke", "sweep", "--base", "base", "--edited", "facts.delta.safetensors", "--facts", "facts.json")
SWEEP += ("--weights", "0.5,1", "--densities", "0.5,1", "--output", "out")
REPORT = ("mm4ke", "report", "base=runs", "--output", "out")
COMPARE = ("mm4ke", "compare", "--base", "base", "--rsft", "rsft", "--merged", "merged", "--facts", "facts.json")
COMPARE += ("--output", "out")
MAKE_FACTS = ("mm4ke", "facts", "facts.json", "--output", "out")


class NotRun(Exception):
    """This machine can't be made to have this fault."""


# ---- running, and what is left ----


def start(command: tuple[str, ...], folder: Path, **env: str) -> subprocess.Popen:
    """The command in `folder`, as the leader of a process group of its own."""
    log = (folder / "stderr").open("w")
    program = [str(PROGRAMS / command[0]), *command[1:]]
    return subprocess.Popen(
        program, cwd=folder, env=ENVIRONMENT | env, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
    )


def run(command: tuple[str, ...], folder: Path, **env: str) -> str:
    """Run the command to its end, which must be a good one. Returns what it wrote to stderr."""
    process = start(command, folder, **env)
    assert process.wait() == 0, f"{' '.join(command)}: status {process.returncode}: {last_line(folder)}"
    return (folder / "stderr").read_text()


def last_line(folder: Path) -> str:
    """Our line, where there is one: a progress bar may end after it. Otherwise the last one."""
    lines = (folder / "stderr").read_text().replace("\r", "\n").strip().splitlines()
    ours = [line for line in lines if line.startswith("mm4ke: error: ")]
    return (ours or lines or ["nothing on stderr"])[-1]


def refused(command: tuple[str, ...], folder: Path, *words: str, **env: str) -> str:
    """Run a command that must be refused in one line which has these words, with every file as it was before."""
    before = contents(folder)
    process = start(command, folder, **env)
    return was_refused(process, folder, before, *words)


def was_refused(process: subprocess.Popen, folder: Path, before: dict[str, str], *words: str) -> str:
    status, line = process.wait(), last_line(folder)
    assert status != 0, f"went through: {line}"
    text = (folder / "stderr").read_text()
    assert "Traceback" not in text, f"a traceback: {line}"
    assert line.startswith("mm4ke: error: "), f"no line of ours: {line}"
    assert all(word in line for word in words), f"says nothing of {words}: {line}"
    changed = sorted(dict(contents(folder).items() ^ before.items()))
    assert not changed, f"refused, but changed: {changed}"
    return line.removeprefix("mm4ke: error: ")


def contents(folder: Path) -> dict[str, str]:
    """A hash of every file in the folder, hidden ones and folders too; what a run logs aside."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        # A lock's file may stay, and the record of a result's files has no name that users see.
        if name != "stderr" and "lost+found" not in name and path.name not in (".training.lock", ".mm4ke-files.json"):
            found[name] = hash_of(path.read_bytes()) if path.is_file() else "folder"
    return found


def result(path: Path) -> dict[str, str]:
    """What a command made, without what differs between two undisturbed runs as well."""
    if path.name.endswith(".delta.safetensors"):
        with safe_open(path, "pt") as file:
            manifest = json.loads(file.metadata()["mm4ke_knowledge_delta"])
            del manifest["created"]
            numbers = {name: hash_of(file.get_tensor(name).numpy().tobytes()) for name in file.keys()}  # noqa: SIM118
        return numbers | {"manifest": json.dumps(manifest)}
    if path.is_file():
        return {path.name: hash_of(path.read_bytes())}
    if (path / "trainer_state.json").is_file():
        history = json.loads((path / "trainer_state.json").read_text())["log_history"]
        epochs = [(entry["rsft_visits"], entry["rsft_updates"]) for entry in history if "rsft_visits" in entry]
        return result(path / "model.safetensors") | {"epochs": str(epochs)}
    # matplotlib writes the time and random names into its figures.
    return {name: digest for name, digest in contents(path).items() if not name.endswith((".svg", ".png"))}


def hash_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def leftovers(folder: Path) -> list[str]:
    """Hidden files and folders, which only a run that was killed may leave, and only until the next one."""
    return [name for name in contents(folder) if Path(name).name.startswith(".") and "lock" not in name]


def strike(process: subprocess.Popen, signals: int, when: Callable[[], bool], delay: float = 0.0) -> None:
    """Send a signal to the whole process group `delay` seconds after `when` is true for the first time."""
    while process.poll() is None and not when():
        time.sleep(0.0005)
    time.sleep(delay)
    if process.poll() is not None:
        raise AssertionError("ended before it could be struck")
    os.killpg(process.pid, signals)
    process.wait()


@contextmanager
def full_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A disk of its own in folder/disk, an ext4 file system in a file, with so many kilobytes left."""
    disk = folder / "disk"
    disk.mkdir()
    with tempfile.NamedTemporaryFile() as image:
        image.truncate((4096 + 2 * kilobytes) * 1024)
        for command in (
            ["mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", image.name],
            ["mount", "-o", "loop", image.name, disk],
        ):
            if not shutil.which(command[0]) or subprocess.run(command, check=False, capture_output=True).returncode:
                raise NotRun(f"{command[0]} is not allowed here")
        try:
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            (disk / "others").write_bytes(bytes(free - kilobytes * 1024))
            yield disk
        finally:
            subprocess.run(["umount", "-l", disk], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """A folder/disk that nobody, root included, can write to."""
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", disk]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        raise NotRun("mount is not allowed here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


# ---- the faults ----


@dataclass(frozen=True)
class Fault:
    """One fault. `inject` gets a folder with models, recipes and facts in it, and a source of chance.

    It returns how it ended ("exact" or "refused: LINE") and raises AssertionError for anything else.
    """

    command: str
    what: str
    inject: Callable[[Path, Path, random.Random], str]


FAULTS: list[Fault] = []


def fault(command: str, what: str):
    def add(inject):
        FAULTS.append(Fault(command, what, inject))
        return inject

    return add


def name_of(number: int) -> str:
    return signal.Signals(number).name


def again(command: tuple[str, ...], folder: Path, made: str, expected: Path) -> str:
    """Give the command again: it must make what an undisturbed run made, and sweep what the dead one left."""
    run(command, folder)
    assert result(folder / made) == result(expected), f"{made} is not what an undisturbed run makes"
    assert not leftovers(folder), f"left behind: {leftovers(folder)}"
    return "exact"


# Training.


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "rsft").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def fresh(folder: Path) -> None:
    """Nothing trained yet."""
    shutil.rmtree(folder / "rsft")


def strike_training(number: int, when: Callable[[Path], bool]):
    def inject(folder: Path, reference: Path, chance: random.Random) -> str:
        fresh(folder)
        strike(start(TRAIN, folder), number, lambda: when(folder), chance.uniform(0, 0.3))
        return again(TRAIN, folder, "rsft", reference / "rsft")

    return inject


for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
    fault("training", f"{name_of(number)} at a random moment after the first checkpoint")(
        strike_training(
            number, lambda folder: any(c.joinpath("trainer_state.json").exists() for c in checkpoints(folder))
        )
    )


@fault("training", "SIGKILL while a checkpoint is written")
def _(folder, reference, chance):
    fresh(folder)

    def half_a_checkpoint() -> bool:
        return len(found := checkpoints(folder)) > 2 and not (found[-1] / "trainer_state.json").exists()

    strike(start(TRAIN, folder), signal.SIGKILL, half_a_checkpoint)
    return again(TRAIN, folder, "rsft", reference / "rsft")


fault("training", "SIGKILL while the trained model is written")(
    strike_training(signal.SIGKILL, lambda folder: (folder / "rsft" / "config.json").exists())
)


@fault("training", "a checkpoint without its last files")
def _(folder, reference, chance):
    shutil.rmtree(folder / "rsft")
    shutil.copytree(reference / "interrupted", folder / "rsft")
    (checkpoints(folder)[-1] / "trainer_state.json").unlink()
    return again(TRAIN, folder, "rsft", reference / "rsft")


@fault("training", "a truncated optimizer state in the last checkpoint")
def _(folder, reference, chance):
    shutil.rmtree(folder / "rsft")
    shutil.copytree(reference / "interrupted", folder / "rsft")
    os.truncate(checkpoints(folder)[-1] / "optimizer.pt", 1000)
    return "refused: " + refused(TRAIN, folder, "checkpoint-")


@fault("training", "clock: the newest checkpoint has the oldest date")
def _(folder, reference, chance):
    shutil.rmtree(folder / "rsft")
    shutil.copytree(reference / "interrupted", folder / "rsft")
    for age, checkpoint in enumerate(checkpoints(folder)):
        for path in (*checkpoint.iterdir(), checkpoint):
            os.utime(path, (10**9 - 10**6 * age,) * 2)
    return again(TRAIN, folder, "rsft", reference / "rsft")


@fault("training", "the facts were exchanged after an interruption")
def _(folder, reference, chance):
    shutil.rmtree(folder / "rsft")
    shutil.copytree(reference / "interrupted", folder / "rsft")
    write_facts(folder, [FACTS[0] | {"target_new": "Mira"}, *FACTS[1:]])
    return "refused: " + refused(TRAIN, folder, "output_dir")


@fault("training", "locale C, in which French facts can't be written")
def _(folder, reference, chance):
    fresh(folder)
    run(TRAIN, folder, LC_ALL="C", LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert result(folder / "rsft") == result(reference / "rsft"), "other weights"
    return "exact"


@fault("training", "out of memory in the fast path")
def _(folder, reference, chance):
    fresh(folder)
    (folder / "oom.py").write_text(
        "import sys, torch\n"
        "from mm4ke_plugins.rsft.forward import FastForward\n"
        "losses, calls = FastForward.losses, 0\n"
        "def fail_once(self, samples):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 5:\n"
        "        torch.empty(1 << 60)\n"  # what PyTorch says when there is no memory
        "    return losses(self, samples)\n"
        "FastForward.losses = fail_once\n"
        "from llamafactory.cli import main\n"
        "sys.argv = ['llamafactory-cli', 'train', 'rsft.yaml']\n"
        "main()\n"
    )
    text = run(("python", "oom.py"), folder)
    assert "goes on without its fast paths" in text, "no warning"
    assert result(folder / "rsft") == result(reference / "rsft"), "other weights"
    return "exact"


@fault("training", "disk full")
def _(folder, reference, chance):
    fresh(folder)
    with full_disk(folder, 60_000) as disk:
        write_recipe(folder, output_dir="./disk/rsft")
        process = start(TRAIN, folder)
        assert process.wait() != 0, "went through"
        text, line = (folder / "stderr").read_text(), last_line(folder)
        assert "Traceback" not in text and line.startswith("mm4ke: error: "), f"no line of ours: {line}"
        whole = [c for c in sorted(disk.glob("rsft/checkpoint-*")) if (c / "trainer_state.json").exists()]
        (folder / "rsft").mkdir()
        for checkpoint in whole:
            shutil.copytree(checkpoint, folder / "rsft" / checkpoint.name)
    write_recipe(folder)
    return f"{again(TRAIN, folder, 'rsft', reference / 'rsft')}, after: {line.removeprefix('mm4ke: error: ')}"


@fault("training", "read-only output folder")
def _(folder, reference, chance):
    with read_only(folder):
        write_recipe(folder, output_dir="./disk/rsft")
        return "refused: " + refused(TRAIN, folder, "disk")


@fault("training", "a truncated file of the base")
def _(folder, reference, chance):
    fresh(folder)
    os.truncate(folder / "base" / "model.safetensors", 10**6)
    return "refused: " + refused(TRAIN, folder, "base")


@fault("training", "NaN in the base")
def _(folder, reference, chance):
    fresh(folder)
    damage(folder / "base", float("nan"))
    return "refused: " + refused(TRAIN, folder, "NaN")


@fault("training", "two at once with one output folder")
def _(folder, reference, chance):
    fresh(folder)
    first = start(TRAIN, folder)
    while not checkpoints(folder) and first.poll() is None:
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGSTOP)  # or it may be done before the second one has been loaded
    other = folder / "other"
    other.mkdir()
    for name in ("base", "facts", "rsft", "rsft.yaml"):
        (other / name).symlink_to(folder / name)
    second = start(TRAIN, other)
    status = second.wait()
    os.killpg(first.pid, signal.SIGCONT)
    assert status != 0, "both went through"
    line = last_line(other)
    assert "Traceback" not in (other / "stderr").read_text() and line.startswith("mm4ke: error: "), line
    assert first.wait() == 0, f"the first one failed: {last_line(folder)}"
    assert result(folder / "rsft") == result(reference / "rsft"), "other weights"
    return f"exact; the second refused: {line.removeprefix('mm4ke: error: ')}"


# Commands that write a folder or a file at once: merge, deltas, sweep.


def strike_writing(command: tuple[str, ...], made: str, number: int, earlier: str | None = None):
    """Strike while the result is being written; `earlier`: a result that was there before."""

    def inject(folder: Path, reference: Path, chance: random.Random) -> str:
        if earlier:
            shutil.copytree(reference / earlier, folder / made)
        before = set(folder.iterdir()) | {folder / "stderr"}

        def writing() -> bool:
            return any(path not in before for path in folder.iterdir())

        process = start(command, folder)
        strike(process, number, writing, chance.uniform(0, 0.02))
        if (folder / made).exists():
            whole = [reference / made] + ([reference / earlier] if earlier else [])
            assert result(folder / made) in map(result, whole), "half a result"
        elif earlier:
            raise AssertionError("the earlier result is lost")
        if number != signal.SIGKILL:
            assert not leftovers(folder), f"left behind: {leftovers(folder)}"
            assert "Traceback" not in (folder / "stderr").read_text() or number == signal.SIGINT, "a traceback"
        return again(command, folder, made, reference / made)

    return inject


for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    fault("merge", f"{name_of(number)} while the result is written")(strike_writing(MERGE_COMMAND, "out", number))
fault("merge", "SIGKILL while an earlier result is replaced")(
    strike_writing(MERGE_COMMAND, "out", signal.SIGKILL, earlier="other-merge")
)
for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP):
    fault("delta extract", f"{name_of(number)} while the file is written")(
        strike_writing(EXTRACT, "made.delta.safetensors", number)
    )


def on_a_full_disk(command: tuple[str, ...], kilobytes: int):
    def inject(folder: Path, reference: Path, chance: random.Random) -> str:
        with full_disk(folder, kilobytes):
            return "refused: " + refused(to_disk(command), folder, "disk")

    return inject


def on_a_read_only_disk(command: tuple[str, ...]):
    def inject(folder: Path, reference: Path, chance: random.Random) -> str:
        with read_only(folder):
            return "refused: " + refused(to_disk(command), folder, "disk")

    return inject


def to_disk(command: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"disk/{word}" if word in ("out", "made.delta.safetensors") else word for word in command)


for title, command, kilobytes in (
    ("merge", MERGE_COMMAND, 9000),
    ("delta extract", EXTRACT, 1000),
    ("delta apply", APPLY, 9000),
    ("delta revert", REVERT, 9000),
    ("sweep", SWEEP, 20),
    ("report", REPORT, 4),
    ("compare", COMPARE, 4),
    ("facts", MAKE_FACTS, 0),
):
    fault(title, "disk full")(on_a_full_disk(command, kilobytes))
    fault(title, "read-only folder")(on_a_read_only_disk(command))


def two_at_once(command: tuple[str, ...], made: str, reference_made: str | None = None):
    def inject(folder: Path, reference: Path, chance: random.Random) -> str:
        other = folder / "second"
        other.mkdir()
        first = start(command, folder)
        log = (other / "stderr").open("w")
        program = [str(PROGRAMS / command[0]), *command[1:]]
        second = subprocess.Popen(program, cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=log)
        statuses = first.wait(), second.wait()
        lines = last_line(folder), last_line(other)
        shutil.rmtree(other)
        assert 0 in statuses, f"both failed: {lines}"
        for status, line in zip(statuses, lines, strict=True):
            assert status == 0 or line.startswith("mm4ke: error: "), f"no line of ours: {line}"
        assert result(folder / made) == result(reference / (reference_made or made)), "a mixture"
        assert not leftovers(folder), f"left behind: {leftovers(folder)}"
        return "exact" if statuses == (0, 0) else f"exact; one refused: {lines[statuses.index(0) - 1]}"

    return inject


fault("merge", "two at once with one output folder")(two_at_once(MERGE_COMMAND, "out"))
fault("delta extract", "two at once with one output file")(two_at_once(EXTRACT, "made.delta.safetensors"))
fault("delta apply", "two at once with one output folder")(two_at_once(APPLY, "out", "applied"))
fault("facts", "two at once with one output folder")(two_at_once(MAKE_FACTS, "out", "made-facts"))


@fault("merge", "a truncated file of the edited model")
def _(folder, reference, chance):
    os.truncate(folder / "rsft" / "model.safetensors", 10**6)
    return "refused: " + refused(MERGE_COMMAND, folder, "rsft")


@fault("merge", "NaN in the edited model")
def _(folder, reference, chance):
    damage(folder / "rsft", float("nan"))
    return "refused: " + refused(MERGE_COMMAND, folder, "rsft", "NaN")


@fault("merge", "the user's file in an earlier result")
def _(folder, reference, chance):
    shutil.copytree(reference / "out", folder / "out")
    (folder / "out" / "model.Q4_K_M.gguf").write_text("a day's work")
    return "refused: " + refused(MERGE_COMMAND, folder, "model.Q4_K_M.gguf")


for title, command, made in (("delta apply", APPLY, "applied"), ("delta revert", REVERT, "base")):

    def inject(folder, reference, chance, command=command, made=made):
        before = set(folder.iterdir()) | {folder / "stderr"}
        strike(
            start(command, folder),
            signal.SIGKILL,
            lambda: any(path not in before for path in folder.iterdir()),
            chance.uniform(0, 0.01),
        )
        run(command, folder)
        weights = "model.safetensors"
        assert result(folder / "out" / weights) == result(reference / made / weights), "other weights"
        assert not leftovers(folder), f"left behind: {leftovers(folder)}"
        return "exact"

    fault(title, "SIGKILL while the result is written")(inject)


@fault("delta apply", "SIGTERM while the result is written")
def _(folder, reference, chance):
    before = set(folder.iterdir()) | {folder / "stderr"}
    process = start(APPLY, folder)
    strike(process, signal.SIGTERM, lambda: any(path not in before for path in folder.iterdir()))
    assert not leftovers(folder), f"left behind: {leftovers(folder)}"
    run(APPLY, folder)
    assert result(folder / "out") == result(reference / "applied"), "not what an undisturbed run makes"
    return "exact"


@fault("delta apply", "a delta file cut off in the middle")
def _(folder, reference, chance):
    delta = folder / "facts.delta.safetensors"
    os.truncate(delta, chance.randrange(delta.stat().st_size))
    return "refused: " + refused(APPLY, folder, "facts.delta.safetensors")


@fault("delta apply", "one bit of a delta file flipped")
def _(folder, reference, chance):
    delta = folder / "facts.delta.safetensors"
    data = bytearray(delta.read_bytes())
    data[chance.randrange(len(data) // 2, len(data))] ^= 1 << chance.randrange(8)
    delta.write_bytes(data)
    return "refused: " + refused(APPLY, folder, "facts.delta.safetensors")


@fault("delta apply", "another base")
def _(folder, reference, chance):
    shutil.copytree(folder / "rsft", folder / "base", dirs_exist_ok=True)
    return "refused: " + refused(APPLY, folder, "base")


for title, command, made in (
    ("sweep", SWEEP, "sweep"),
    ("compare", COMPARE, "comparison"),
    ("report", REPORT, "report"),
):
    for number in (signal.SIGKILL, signal.SIGTERM):

        def inject(folder, reference, chance, command=command, made=made, number=number):
            seconds = json.loads((reference / "seconds.json").read_text())[made]
            strike(start(command, folder), number, lambda: True, chance.uniform(0.5, 0.9) * seconds)
            assert not (folder / "out").exists(), "half a result"
            return again(command, folder, "out", reference / made)

        fault(title, f"{name_of(number)} at a random moment")(inject)


@fault("sweep", "a truncated file of the base")
def _(folder, reference, chance):
    os.truncate(folder / "base" / "model.safetensors", 10**6)
    return "refused: " + refused(SWEEP, folder, "base")


@fault("report", "SIGKILL while the page is written")
def _(folder, reference, chance):
    strike(start(REPORT, folder), signal.SIGKILL, lambda: (folder / "out").exists(), chance.uniform(0, 0.005))
    for path in (folder / "out").glob("[!.]*"):
        assert result(path) == result(reference / "report" / path.name), "half a page"
    return again(REPORT, folder, "out", reference / "report")


@fault("report", "a run's samples cut off in the middle")
def _(folder, reference, chance):
    samples = max((folder / "runs").rglob("samples_*"), key=lambda path: path.stat().st_size)
    os.truncate(samples, samples.stat().st_size // 2)
    return "refused: " + refused(REPORT, folder, samples.name)


@fault("compare", "NaN in the merged model")
def _(folder, reference, chance):
    damage(folder / "merged", float("nan"))
    return "refused: " + refused(COMPARE, folder, "merged")


@fault("facts", "locale C, in which French facts can't be written")
def _(folder, reference, chance):
    run(MAKE_FACTS, folder, LC_ALL="C", LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert result(folder / "out") == result(reference / "made-facts"), "other facts"
    return "exact"


# ---- the undisturbed runs ----


def write_facts(folder: Path, facts: list[dict]) -> None:
    (folder / "facts.json").write_text(json.dumps(facts))
    run(("mm4ke", "facts", "facts.json", "--output", "facts"), folder)


def write_recipe(folder: Path, **changes) -> None:
    (folder / "rsft.yaml").write_text(yaml.safe_dump(RECIPE | changes))


def damage(model: Path, number: float) -> None:
    """Put this number into the trained FFN of a saved model."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = number
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def make_reference(folder: Path) -> None:
    """What every command makes when nothing disturbs it."""
    make_tiny_model(folder / "base", hidden_size=256, intermediate_size=1024, initializer_range=0.05)
    write_recipe(folder)
    (folder / "merge.yaml").write_text(yaml.safe_dump(MERGE))
    write_facts(folder, FACTS)
    run(TRAIN, folder)
    trained = checkpoints(folder)
    assert len(trained) > 4, "the training is too short to be interrupted"
    shutil.copytree(folder / "rsft", folder / "interrupted")
    for path in (folder / "interrupted").iterdir():
        if path.is_file():
            path.unlink()
        elif int(path.name.split("-")[1]) > int(trained[2].name.split("-")[1]):
            shutil.rmtree(path)
    for checkpoint in trained:
        shutil.rmtree(checkpoint)
    run(MERGE_COMMAND, folder)
    (folder / "merge.yaml").write_text(yaml.safe_dump(MERGE | {"parameters": {"weight": 0.5}}))
    run(("mergekit-yaml", "merge.yaml", "out-other/out"), folder)
    shutil.move(folder / "out-other" / "out", folder / "other-merge")
    (folder / "merge.yaml").write_text(yaml.safe_dump(MERGE))
    shutil.copytree(folder / "out", folder / "merged")
    run(EXTRACT, folder)
    shutil.copy(folder / "made.delta.safetensors", folder / "facts.delta.safetensors")
    run(
        ("lm_eval", "run", "--model", "mm4ke", "--model_args", "pretrained=base", "--include_path",
         str(ROOT / "mm4ke_plugins"), "--tasks", "knowedit_facts_edit_success", "--metadata",
         "knowedit_file=facts.json", "--apply_chat_template", "--log_samples", "--output_path", "runs"),
        folder,
    )  # fmt: skip
    seconds = {}
    shutil.move(folder / "out", folder / "aside")
    for command, made in (
        (APPLY, "applied"),
        (SWEEP, "sweep"),
        (COMPARE, "comparison"),
        (MAKE_FACTS, "made-facts"),
        (REPORT, "report"),
    ):
        began = time.monotonic()
        run(command, folder)
        seconds[made] = time.monotonic() - began
        shutil.move(folder / "out", folder / made)
    shutil.move(folder / "aside", folder / "out")
    (folder / "seconds.json").write_text(json.dumps(seconds))


INPUTS = (
    "base",
    "rsft",
    "merged",
    "facts",
    "runs",
    "facts.json",
    "rsft.yaml",
    "merge.yaml",
    "facts.delta.safetensors",
)


def inject(fault: Fault, reference: Path, scratch: Path, seed: int) -> tuple[str, str]:
    """("ok", how it ended), ("LOST", why) or ("not run", why)."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    for name in INPUTS:
        source = reference / name
        shutil.copytree(source, folder / name) if source.is_dir() else shutil.copy(source, folder / name)
    try:
        return "ok", fault.inject(folder, reference, random.Random(f"{seed} {fault.command} {fault.what}"))
    except AssertionError as error:
        return "LOST", str(error)
    except NotRun as error:
        return "not run", str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run only the faults that have these words in their line")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and places")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="faults at a time")
    parser.add_argument("--reference", type=Path, help="keep the undisturbed runs here, and use them again")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mm4ke-faults-") as scratch:
        reference = arguments.reference or Path(scratch, "reference")
        if not reference.is_dir():
            Console(stderr=True).print("undisturbed runs ...")
            reference.mkdir(parents=True)
            make_reference(reference)
        chosen = [f for f in FAULTS if arguments.only in f"{f.command}: {f.what}"]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            running = pool.map(lambda f: inject(f, reference, Path(scratch), arguments.seed), chosen)
            ended = list(track(running, "faults", total=len(chosen), console=Console(stderr=True)))
    table = Table("command", "fault", "", "how it ended", title=f"{len(chosen)} faults, seed {arguments.seed}")
    for each, (state, how) in zip(chosen, ended, strict=True):
        table.add_row(each.command, each.what, state, how, style="bold red" if state == "LOST" else "")
    Console(width=200 if not sys.stdout.isatty() else None).print(table)
    lost = sum(state == "LOST" for state, _ in ended)
    if lost:
        raise SystemExit(f"{lost} of {len(chosen)} faults lost something or were silently wrong")


if __name__ == "__main__":
    main()
