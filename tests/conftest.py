"""What all tests share: where the hosts' real commands are, and where the benchmark data is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

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


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real KnowEdit and CounterFact files."""
    folder = Path(os.environ.get("MM4KE_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no benchmark data at {folder}; set MM4KE_DATA to the folder that holds knowedit/")
    return folder
