"""All rows of a study, one after the other, on the hosts' own commands."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from ..hosts import LLAMAFACTORY, MERGEKIT
from ..hosts.easyedit.benchmark import check_easyedit, find_hparams, run_worker
from ..hosts.easyedit.benchmark import versions as easyedit_versions
from ..hosts.easyedit.worker import Job
from ..hosts.llamafactory.templates import require_template
from ..knowedit.dataset import read_facts
from ..knowedit.records import Record
from ..knowedit.scorer import Scorer
from ..storage.atomic import locked_folder, refused_in_one_line, scratch_folder
from ..storage.models import load_model, load_tokenizer, require_model_folder
from .plan import Facts, Method, Study, read_recipe
from .steps import Step, StepFailed, Steps, digest, remove_model

HPARAMS = Path("recipes/easyedit")


@dataclass(frozen=True)
class Row:
    """What came out of one method on one set of facts with one seed.

    error:  one line where it failed, and then there are no scores
    scores: as from `Scorer.score`
    cost:   commands, seconds (of all of them, their start included), peak (bytes of memory)
    """

    facts: str
    method: str
    seed: int
    error: str | None
    scores: dict[str, Any] | None
    cost: dict[str, Any]


def run_study(
    study: Study,
    output: Path,
    *,
    easyedit: Path | None = None,
    retry: bool = False,
    keep_models: bool = False,
    show: Callable[[str], None],
) -> tuple[list[Row], dict[str, list[Record]]]:
    """Run what is not done yet. Returns a row for each facts, method and seed, and the records by the facts' names.

    A method that fails is a row with its error; `retry` tries it again. show: is told each command before it runs

    Raises MM4KEError before any work: a host that is needed is missing, an unknown template or method, no model, facts
    that can't be read.
    """
    for host in (LLAMAFACTORY, MERGEKIT):
        host.require_supported("mm4ke study")
    require_template(study.template, f"{study.file}: template: {study.template}")
    require_model_folder(study.model, f"{study.file}: model: {study.model}", "base")
    clone, hparams = None, {}
    if names := [method.easyedit for method in study.methods if method.easyedit]:
        clone = check_easyedit(easyedit)
        hparams = {name: find_hparams(name, HPARAMS, clone / "hparams", study.hparams) for name in names}
    records = {facts.name: read_facts(facts.file, facts.limit) for facts in study.facts}

    columns = (TextColumn("{task.description:<40}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with (
        refused_in_one_line(output),
        locked_folder(output, wait=False),
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        runner = _Runner(study, output, clone, hparams, records, retry, progress, show)
        return runner.rows(keep_models), records


class _Runner:
    def __init__(self, study, output, clone, hparams, records, retry, progress, show):
        self.study, self.clone, self.hparams, self.records, self.retry = study, clone, hparams, records, retry
        self.steps = Steps(study, output, retry, show)
        self.progress = progress
        self.scorers: dict[str, Scorer] = {}

    def rows(self, keep_models: bool) -> list[Row]:
        cells = [
            (facts, method, seed)
            for facts in self.study.facts
            for method in self.study.methods
            # Only a training has a seed to it.
            for seed in (self.study.seeds if method.train or method.run else self.study.seeds[:1])
        ]
        task = self.progress.add_task("all rows", total=len(cells))
        rows = []
        for place, (facts, method, seed) in enumerate(cells):
            self.progress.update(task, description=f"{facts.name}: {method.name}")
            rows.append(self._row(facts, method, seed))
            if not keep_models:
                self._remove(facts, method, seed, cells[place + 1 :])
            self.progress.advance(task)
        return rows

    def _row(self, facts: Facts, method: Method, seed: int) -> Row:
        scored = self.steps.step(
            "score",
            {
                "made": self._inputs(method, seed),
                "facts": digest(facts.file),
                "limit": facts.limit,
                "template": self.study.template,
                "in_context": method.in_context,
            },
        )
        done = scored.done()
        if not done or done["error"] and self.retry:
            try:
                done = self._measure(scored, facts, method, seed)
            except StepFailed as failed:
                done = {"error": str(failed), "commands": [], "seconds": None, "peak": None}
        cost = {key: done[key] for key in ("commands", "seconds", "peak")}
        return Row(facts.name, method.name, seed, done["error"], done.get("scores"), cost)

    def _measure(self, scored: Step, facts: Facts, method: Method, seed: int) -> dict[str, Any]:
        if method.easyedit:
            return self._easyedit(scored, facts, method)
        made: list[Step] = []
        if method.train:
            # Also where only what is merged from it is scored: its seconds count.
            made.append(self.steps.train(method, facts, seed))
        if method.merge:
            made.append(self.steps.merge(method, facts, seed))
        if method.run:
            made.append(self.steps.run(method, facts, seed))
        folder = made[-1].model if made else self.study.model
        scorer = self._scorer(facts)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load_model(folder, torch.float32, device)
        task = self.progress.add_task("asking", total=len(scorer.questions) * len(scorer.formats))
        try:
            scores = scorer.score(
                model,
                in_context=method.in_context,
                advance=lambda count: self.progress.advance(task, count),
            )
        finally:
            self.progress.remove_task(task)
        costs = [step.done() for step in made]
        return scored.finish(
            [line for cost in costs for line in cost["commands"]],
            sum(cost["seconds"] for cost in costs) if costs else None,
            max(cost["peak"] for cost in costs) if costs else None,
            scores=scores,
        )

    def _easyedit(self, scored: Step, facts: Facts, method: Method) -> dict[str, Any]:
        """EasyEdit's methods are scored in the process that made the edit: some live in a wrapper around the model."""
        records = self.records[facts.name]
        task = self.progress.add_task(method.name, total=None)

        def show(stage: str, done: int) -> None:
            self.progress.update(task, description=f"{method.name}: {stage} {done or ''}")

        begin = time.perf_counter()
        try:
            with scratch_folder() as scratch:
                job = Job(
                    method=method.easyedit,
                    hparams=str(self.hparams[method.easyedit]),
                    model=str(self.study.model.absolute()),
                    data=str(facts.file.absolute()),
                    records=len(records),
                    prompt_format="chat" if self.study.template != "empty" else "raw",
                    text=self.study.text and str(self.study.text.absolute()),
                    scratch=str(scratch),
                    output=str(scratch / "result.json"),
                    limit=facts.limit,
                    score=True,
                )
                answer = run_worker(job, self.clone, scored.log, show)
        finally:
            self.progress.remove_task(task)
        command = f"mm4ke easyedit --methods {method.easyedit} --data {facts.file}"
        command += f" --hparams-name {self.study.hparams}" + (f" --n {facts.limit}" if facts.limit else "")
        seconds = answer["seconds"] if answer["seconds"] is not None else time.perf_counter() - begin
        return scored.finish([command], seconds, answer.get("peak"), answer["error"], scores=answer.get("scores"))

    def _inputs(self, method: Method, seed: int) -> dict[str, Any]:
        """What makes a method's model another one; its name is not part of it."""
        recipes = [read_recipe(path) for path in (method.train, method.merge) if path]
        if method.easyedit:
            return {
                "easyedit": method.easyedit,
                "hparams": digest(self.hparams[method.easyedit]),
                "versions": easyedit_versions(self.clone),
                "text": self.study.text and digest(self.study.text),
            }
        scripts = self.steps.scripts(method)
        return {"recipes": recipes, "set": method.set, "run": method.run, "scripts": scripts, "seed": seed}

    def _scorer(self, facts: Facts) -> Scorer:
        if facts.name not in self.scorers:
            self.scorers.clear()  # the facts come one after the other
            tokenizer = load_tokenizer(self.study.model)
            records = self.records[facts.name]
            task = self.progress.add_task("base: asking", total=Scorer.cost(tokenizer, records))
            device = "cuda" if torch.cuda.is_available() else "cpu"
            base = load_model(self.study.model, torch.float32, device)
            self.scorers[facts.name] = Scorer(
                base, tokenizer, records, lambda count: self.progress.advance(task, count)
            )
            self.progress.remove_task(task)
        return self.scorers[facts.name]

    def _remove(self, facts: Facts, method: Method, seed: int, later: list) -> None:
        """Remove the models of a row that no later one needs."""
        with suppress(StepFailed):
            if method.merge:
                remove_model(self.steps.merge_step(method, facts, seed))
            if method.run:
                remove_model(self.steps.run_step(method, facts, seed))
            if method.train:
                mine = self.steps.train_step(method, facts, seed)
                others = (self.steps.train_step(m, f, s) for f, m, s in later if m.train)
                if all(mine != other for other in others):
                    remove_model(mine)
