"""What OMP_WAIT_POLICY=passive does for training on a CPU, alone and beside a busy neighbour on every core.

    python tests/benchmarks/wait_policy.py

Needs:  work/base   mm4ke model --link work/base

Two processes, with the policy and without it, hold the same model and take turns at one visit of six updates, plain
(Algorithm 1 with the whole model), of the same fact. In every round both make one while the machine is as it is and
one beside `while True: pass` on each core. Ratios are medians of the rounds' own.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import click

ROOT = Path(__file__).parents[2]


class Worker:
    """A process that makes a visit when asked."""

    def __init__(self, base: Path, threads: int, policy: str | None):
        env = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        env |= {"OMP_NUM_THREADS": str(threads)} | ({"OMP_WAIT_POLICY": policy} if policy else {})
        command = [sys.executable, __file__, "--base", str(base), "--worker"]
        self.process = subprocess.Popen(
            command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self.process.stdout.readline()  # it is ready

    def visit(self) -> float:
        """Seconds."""
        print(file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


@contextmanager
def neighbours(count: int):
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def work(base: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # LLaMA-Factory logs to the standard output

    from training import Recipe, Run

    from mm4ke_plugins.knowedit.dataset import write_dataset
    from mm4ke_plugins.knowedit.records import read_records

    with tempfile.TemporaryDirectory() as folder:
        write_dataset(read_records(ROOT / "recipes/facts.json", 1), Path(folder), "facts")
        recipe = Recipe(
            ROOT / "recipes/paper/rsft.yaml",
            model_name_or_path=str(base),
            dataset_dir=folder,
            output_dir=f"{folder}/rsft",
            rsft_loss_threshold=1e-9,  # always six updates
        )
    run = Run(recipe, fast=None)
    run.visit(0)
    print("ready", file=answers, flush=True)
    for _ in sys.stdin:
        before, run.seconds = run.updates, 0.0
        run.visit(0)
        assert run.updates - before == 6
        print(run.seconds, file=answers, flush=True)


@click.command()
@click.option("--base", type=click.Path(path_type=Path), default=ROOT / "work/base", show_default=True)
@click.option("--rounds", default=10, show_default=True)
@click.option("--threads", default=os.cpu_count(), show_default=True)
@click.option("--worker", is_flag=True, hidden=True)
def main(base: Path, rounds: int, threads: int, worker: bool) -> None:
    if worker:
        return work(base)
    policies = {"not set": None, "passive": "passive"}
    workers = {name: Worker(base, threads, policy) for name, policy in policies.items()}
    seconds = {(name, busy): [] for busy in (0, os.cpu_count()) for name in policies}
    for number in range(rounds):
        order = list(workers) if number % 2 else list(reversed(workers))
        for busy in (0, os.cpu_count()):
            with neighbours(busy):
                for name in order:
                    seconds[name, busy].append(workers[name].visit())
    for one in workers.values():
        one.process.communicate()
    print(f"{os.cpu_count()} CPU cores, {threads} threads, {rounds} rounds; load before: {os.getloadavg()[2]:.1f}")
    print(f"\n{'OMP_WAIT_POLICY':<18}{'busy processes':>16}{'seconds a visit':>17}{'range':>15}{'to passive':>12}")
    for (name, busy), values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, seconds["passive", busy], strict=True))
        middle = f"{statistics.median(values):.2f}"
        print(f"{name:<18}{busy:>16}{middle:>17}{f'{min(values):.2f} to {max(values):.2f}':>15}{ratio:>12.2f}")


if __name__ == "__main__":
    main()
