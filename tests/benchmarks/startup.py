"""What the plugin adds to `import torch`, with the plugin and without it, in turn.

    python tests/benchmarks/startup.py

Without: TORCH_DEVICE_BACKEND_AUTOLOAD=0, so PyTorch looks for no plugin at all. The rows "our modules" are the
times that `python -X importtime` gives for mm4ke_plugins and what only it imports.
"""

import os
import platform
import re
import statistics
import subprocess
import sys

RUNS = 15


def import_torch(autoload: str) -> tuple[float, float]:
    """Milliseconds of `import torch` as a whole, and of our modules in it."""
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import torch"],
        env=os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": autoload},
        capture_output=True,
        text=True,
        check=True,
    )
    # "import time: self [us] | cumulative | imported package", nested modules indented and before their parent
    rows = re.findall(r"import time:\s+\d+ \|\s+(\d+) \| ( *)(\S+)", run.stderr)
    total = next(int(microseconds) for microseconds, _, name in rows if name == "torch")
    ours = [(len(indent), int(microseconds)) for microseconds, indent, name in rows if name.startswith("mm4ke")]
    outermost = min((indent for indent, _ in ours), default=0)
    return total / 1000, sum(microseconds for indent, microseconds in ours if indent == outermost) / 1000


def main() -> None:
    import_torch("1")  # warms the disk cache
    pairs = [(import_torch("1"), import_torch("0")) for _ in range(RUNS)]
    with_plugin, without = ([pair[i][0] for pair in pairs] for i in (0, 1))
    ratio = statistics.median(first / second for first, second in zip(with_plugin, without))
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {RUNS} pairs, medians")
    print(f"import torch with the plugin      {statistics.median(with_plugin):8.1f} ms")
    print(f"import torch without it           {statistics.median(without):8.1f} ms   ratio {ratio:.3f}")
    print(f"our modules                       {statistics.median(pair[0][1] for pair in pairs):8.1f} ms")


if __name__ == "__main__":
    main()
