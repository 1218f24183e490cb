"""The commands behind a study's rows, each in a folder of its own that is named after all that it depends on.

    OUTPUT/steps/KIND-XXXXXXXXXXXX/     inputs.json   what the name is a hash of
                                        done.json     commands, seconds, peak memory, error: written last
                                        log.txt       what the commands printed
                                        model/        of a step that makes one; removed when no row needs it any more

So what was done once is not done again, in whatever order and however often a study is run; and what depends on
something that was changed is another step. A training that was interrupted goes on from its last checkpoint, since it
is started again in the same folder.
"""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import MM4KEError, first_line
from ..hosts import environment, package_versions
from ..hosts.easyedit.benchmark import last_error
from ..storage.atomic import replace_text, scratch_folder
from ..storage.models import local_path
from .plan import Facts, Method, Study, read_recipe

# A change of one of these may change what a step makes.
PACKAGES = ("llamafactory", "mergekit", "torch", "transformers")


class StepFailed(MM4KEError):
    """A step failed; the message is one line that says why."""


@dataclass(frozen=True)
class Step:
    """A step's folder, and what is noted of it."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def done(self) -> dict[str, Any] | None:
        """commands, seconds, peak (bytes of memory), error (one line or None); None where the step is not done."""
        try:
            return json.loads((self.folder / "done.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def finish(
        self, commands: Sequence[str], seconds: float | None, peak: int | None, error: str | None = None, **more: Any
    ) -> dict[str, Any]:
        """Note what was done, and return it as `done` does."""
        found = {"commands": list(commands), "seconds": seconds, "peak": peak, "error": error} | more
        replace_text(self.folder / "done.json", json.dumps(found, ensure_ascii=False) + "\n")
        return found


class Steps:
    """The steps of one study in its output folder.

    retry: whether steps that failed are tried again; else the failure that is noted counts
    """

    def __init__(self, study: Study, output: Path, retry: bool, show: Callable[[str], None]):
        self.study, self.output, self.retry, self.show = study, output, retry, show
        self.common = {"model": fingerprint(study.model), "versions": package_versions(PACKAGES)}

    def step(self, kind: str, inputs: Mapping[str, Any]) -> Step:
        """The step of this kind with these inputs; its folder is made."""
        text = json.dumps({**self.common, **inputs}, sort_keys=True, ensure_ascii=False, default=str)
        folder = self.output / "steps" / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "inputs.json").exists():
            replace_text(folder / "inputs.json", text + "\n")
        return Step(folder)

    def facts(self, facts: Facts) -> Path:
        """The folder of the data set that trainings get: `mm4ke facts`."""
        step = self.step("facts", {"facts": digest(facts.file), "limit": facts.limit})
        limit = [] if facts.limit is None else ["--limit", str(facts.limit)]
        output = step.folder / "data"
        command = ["mm4ke", "facts", str(facts.file), *limit, "--allow-contradictions", "--output", str(output)]
        self._run(step, [command], makes=output)
        return output

    def train(self, method: Method, facts: Facts, seed: int) -> Step:
        """The model that LLaMA-Factory makes by the method's recipe; a LoRA is exported into a model."""
        step = self.train_step(method, facts, seed)
        if self._is_there(step):
            return step
        data = self.facts(facts)
        is_lora = (read_recipe(method.train) | method.set).get("finetuning_type", "lora") == "lora"
        model, template = local_path(self.study.model), self.study.template
        trained = step.folder / "adapter" if is_lora else step.model
        changes = {
            "model_name_or_path": model,
            "template": template,
            "dataset_dir": str(data),
            "dataset": "facts",
            "output_dir": local_path(trained),
            "seed": seed,
            **method.set,
        }
        given = [f"{key}={_given(value)}" for key, value in changes.items()]
        commands = [["llamafactory-cli", "train", str(method.train), *given]]
        if is_lora:
            merging = {
                "model_name_or_path": model,
                "adapter_name_or_path": str(trained),
                "template": template,
                "export_dir": str(step.model),
            }
            export = step.folder / "export.yaml"
            replace_text(export, yaml.safe_dump(merging))
            commands.append(["llamafactory-cli", "export", str(export)])
        self._run(step, commands, makes=step.model)
        return step

    def merge(self, method: Method, facts: Facts, seed: int) -> Step:
        """The model that mergekit makes by the method's recipe from the base and what was trained."""
        step = self.merge_step(method, facts, seed)
        if self._is_there(step):
            return step
        recipe = read_recipe(method.merge)
        trained = self.train(method, facts, seed)
        moved = with_models(recipe, local_path(self.study.model), local_path(trained.model), method.merge)
        replace_text(step.folder / "merge.yaml", yaml.safe_dump(moved, sort_keys=False))
        command = ["mergekit-yaml", str(step.folder / "merge.yaml"), str(step.model), "--random-seed", str(seed)]
        self._run(step, [command], makes=step.model)
        return step

    def run(self, method: Method, facts: Facts, seed: int) -> Step:
        """The model that a command of the study makes."""
        step = self.run_step(method, facts, seed)
        if self._is_there(step):
            return step
        data = self.facts(facts)
        dataset = json.loads((data / "facts.json").read_text(encoding="utf-8"))
        names = {"instruction": "prompt", "output": "target_new", "subject": "subject"}
        told = [{names[key]: value for key, value in fact.items()} for fact in dataset]
        replace_text(step.folder / "facts.json", json.dumps(told, ensure_ascii=False))
        environment = {
            "MODEL": str(self.study.model.absolute()),
            "FACTS": str((step.folder / "facts.json").absolute()),
            "TEMPLATE": self.study.template,
            "SEED": str(seed),
            "OUTPUT": str(step.model.absolute()),
        }
        given = [f"{key}={value}" for key, value in environment.items()]
        self._run(step, [["env", *given, *shlex.split(method.run)]], makes=step.model)
        return step

    def train_step(self, method: Method, facts: Facts, seed: int) -> Step:
        return self.step("train", self._training(method, facts, seed))

    def merge_step(self, method: Method, facts: Facts, seed: int) -> Step:
        inputs = {"train": self._training(method, facts, seed), "recipe": read_recipe(method.merge), "seed": seed}
        return self.step("merge", inputs)

    def run_step(self, method: Method, facts: Facts, seed: int) -> Step:
        inputs = {"run": method.run, "scripts": self.scripts(method), "template": self.study.template}
        return self.step("run", inputs | {"facts": digest(facts.file), "limit": facts.limit, "seed": seed})

    @staticmethod
    def scripts(method: Method) -> list[str]:
        """The content of the files that a command is made of, as hashes."""
        return [digest(Path(word)) for word in shlex.split(method.run or "") if Path(word).is_file()]

    def _training(self, method: Method, facts: Facts, seed: int) -> dict[str, Any]:
        """What a training depends on."""
        return {
            "recipe": read_recipe(method.train) | method.set,
            "template": self.study.template,
            "facts": digest(facts.file),
            "limit": facts.limit,
            "seed": seed,
        }

    def _is_there(self, step: Step) -> bool:
        """Whether the step is done and its model still there. Raises StepFailed where it failed before."""
        done = step.done()
        if done and done["error"] and not self.retry:
            raise StepFailed(done["error"])
        return bool(done and not done["error"] and step.model.is_dir())

    def _run(self, step: Step, commands: list[list[str]], makes: Path) -> None:
        """Run commands one after the other, unless what they make is there; raises StepFailed, and notes it."""
        done = step.done()
        if done and not done["error"] and makes.exists():
            return
        seconds, peak = 0.0, 0
        lines = [shlex.join(command) for command in commands]
        for line, command in zip(lines, commands, strict=True):
            self.show(f"$ {line}   > {step.log}")
            status, spent, most = run(command, step.log)
            seconds, peak = seconds + spent, max(peak, most)
            if status:
                error = f"{name_of(command)} ended with status {status}: {last_error(step.log)}"
                step.finish(lines, seconds, peak, error)
                raise StepFailed(error)
        if not makes.exists():
            error = f"{name_of(commands[-1])} made no {makes.name}; see {step.log}"
            step.finish(lines, seconds, peak, error)
            raise StepFailed(error)
        step.finish(lines, seconds, peak)


# A process of little memory between us and the command: a command begins with the peak of the one that started it. And
# one that ends the command where we are gone, so that a study that is started again finds nobody else at work.
_LAUNCHER = """
import json, os, resource, signal, subprocess, sys
parent, process = os.getppid(), subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
while process.poll() is None:
    try:
        process.wait(1)
    except subprocess.TimeoutExpired:
        if os.getppid() != parent:
            os.killpg(0, signal.SIGTERM)
with open(sys.argv[1], "w") as file:
    json.dump([process.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss], file)
"""


def run(command: list[str], log: Path) -> tuple[int, float, int]:
    """Run a command with its output in `log`. Returns its exit status, its seconds, and its peak memory in bytes."""
    begin = time.perf_counter()
    with scratch_folder() as scratch, log.open("w", encoding="utf-8") as file:
        result = scratch / "status.json"
        launcher = [sys.executable, "-IS", "-c", _LAUNCHER, str(result), *command]
        process = subprocess.Popen(launcher, stdout=file, stderr=file, env=environment(), start_new_session=True)
        try:
            process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
        seconds = time.perf_counter() - begin
        status, kilobytes = json.loads(result.read_text()) if result.exists() else (process.returncode, 0)
    return status, seconds, kilobytes * 1024


def name_of(command: list[str]) -> str:
    """The program of a command, without the variables that it is given."""
    return next(word for word in command if word != "env" and "=" not in word)


def with_models(recipe: Any, base: str, trained: str, path: Path) -> Any:
    """A recipe of mergekit with other models: its base model's name becomes `base`, the only other one's `trained`.

    Raises MM4KEError: there is no other one, or several.
    """
    names = set()

    def collect(value: Any) -> None:
        for key, item in value.items() if isinstance(value, dict) else ():
            if key in ("model", "base_model") and isinstance(item, str):
                names.add(item)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            collect(item)

    collect(recipe)
    first = recipe.get("base_model") if isinstance(recipe, dict) else None
    others = names - {first}
    if first is None or len(others) != 1:
        raise MM4KEError(f"{path}: give a recipe with base_model and one other model, it has {sorted(names)}")

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {
            key: (base if item == first else trained)
            if key in ("model", "base_model") and isinstance(item, str)
            else moved(item)
            for key, item in value.items()
        }

    return moved(recipe)


def remove_model(step: Step) -> None:
    """Free the disk of what is not needed any more."""
    for name in ("model", "adapter"):
        shutil.rmtree(step.folder / name, ignore_errors=True)


def digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise MM4KEError(f"{path}: can't be read ({first_line(error)})") from None


def fingerprint(model: Path) -> str:
    """A hash of a model folder's files."""
    total = hashlib.sha256()
    for path in sorted(path for path in model.iterdir() if path.is_file()):
        with path.open("rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def _given(value: Any) -> str:
    """A value as LLaMA-Factory's command line takes it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
