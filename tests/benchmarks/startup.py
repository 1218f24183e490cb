"""What the plugin adds to `import torch`, with the plugin and without it, in turn.

    python tests/benchmarks/startup.py

Without: PyTorch looks for plugins as ever, but ours is left out of what it finds, as if it were not installed.
The times of `import torch` are those of `python -X importtime`.
"""

import os
import platform
import re
import statistics
import subprocess
import sys

RUNS = 25
IMPORT = """
import importlib.metadata as metadata
find = metadata.entry_points
metadata.entry_points = lambda **group: [e for e in find(**group) if {wanted} or not e.value.startswith("mm4ke")]
import torch
"""


def import_torch(wanted: bool) -> float:
    """Milliseconds of `import torch`."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", IMPORT.format(wanted=wanted)],
        capture_output=True,
        text=True,
        check=True,
    )
    # "import time: self [us] | cumulative | imported package"
    return int(re.search(r"\|\s+(\d+) \| torch$", run.stderr, re.MULTILINE)[1]) / 1000


ALONE = """
import torch, time
begin = time.perf_counter()
from mm4ke_plugins.activation import activate
activate()
print((time.perf_counter() - begin) * 1000)
"""


def entry_point_alone() -> float:
    """Milliseconds of what PyTorch calls: loading and running our entry point, after `import torch` without plugins."""
    env = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    return float(
        subprocess.run([sys.executable, "-c", ALONE], env=env, capture_output=True, text=True, check=True).stdout
    )


def main() -> None:
    import_torch(True)  # warms the disk cache
    pairs = [(import_torch(True), import_torch(False)) for _ in range(RUNS)]
    with_plugin, without = zip(*pairs, strict=True)
    ratio = statistics.median(first / second for first, second in pairs)
    difference = statistics.median(first - second for first, second in pairs)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {RUNS} pairs, medians")
    print(f"import torch with the plugin      {statistics.median(with_plugin):8.1f} ms")
    print(f"import torch without it           {statistics.median(without):8.1f} ms   ratio {ratio:.3f}")
    print(f"difference within a pair          {difference:8.1f} ms")
    print(f"our entry point alone             {statistics.median(entry_point_alone() for _ in range(RUNS)):8.1f} ms")


if __name__ == "__main__":
    main()
