"""MM4KE beside EasyEdit's own methods: the same records, the same model, the same metrics.

Every method gets a process of its own (`worker.py`) and a fresh base model, so that none can harm the next. The
final model, after all edits, is asked everything: whether the first edits survived the later ones is part of the
score. EasyEdit's own numbers are taken right after each edit, and don't show that.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ...errors import MM4KEError, first_line
from ...knowedit.dataset import read_facts
from ...knowedit.metrics import METRICS, mean_scores, predict, question_scores, questions_of
from ...knowedit.prompts import Encoded, Question, encode, prompt_formats
from ...knowedit.records import Record, read_records
from ...report.markdown import markdown_table
from ...storage.atomic import locked_folder, refused_in_one_line, replace_text, scratch_folder
from ...storage.models import load_model, load_tokenizer, require_model_folder
from .. import package_versions
from .worker import Job

# What EasyEdit imports beyond the hosts of pyproject.toml; recipes/easyedit/requirements.txt has the versions.
EXTRA_MODULES = (
    "higher", "timm", "iopath", "fairscale", "hydra", "antlr4", "omegaconf", "portalocker", "cv2", "av",
    "qwen_vl_utils", "sentence_transformers", "zhipuai", "sniffio", "cachetools", "jwt", "httpx2", "openai", "jiter", "distro",
    "rouge",
)  # fmt: skip

VERSIONS = ("torch", "transformers", "peft")


def benchmark(
    easyedit: Path | None,
    model: Path,
    data: Path,
    methods: Sequence[str],
    output: Path,
    *,
    n: int | None = None,
    hparams: Path,
    hparams_name: str,
    prompt_format: str = "raw",
    text: Path | None = None,
) -> list[dict[str, Any]]:
    """Run the methods one after the other. Shows its progress on stderr.

    easyedit:      a clone of EasyEdit
    model:         folder of the base model, loaded in float32
    data, n:       a file as `read_facts` reads it, and of how many of its records the facts are edited (all)
    methods:       names of folders in `hparams` or in EasyEdit's own hparams folder, with `hparams_name`.yaml in them
    output:        the folder for METHOD.json, METHOD.log (what the method printed) and table.md
    prompt_format: what the questions are asked in, and MM4KE is trained in; the other methods edit raw prompts
    text:          a plain text that MEMIT and AlphaEdit take covariance statistics from, instead of Wikipedia

    Returns what was written to the METHOD.json files:
        kind, version, method, status ("ok" or "failed"), error (one line or None), model, data, data_sha256, records,
        prompt_format, hparams, editing ("batch" or "sequential"), seconds (in the method), versions,
        scores (before and after, by metric: 0 to 1 or None), questions (each with before and after, texts, and
        score_before and score_after). Of a method that failed hparams, editing, seconds and the scores after are None,
        and questions is empty.

    Raises MM4KEError before any work when a folder, a file, a method or a package is missing.
    """
    easyedit = check_easyedit(easyedit)
    model = model.absolute()
    require_model_folder(model, f"--model {model}", "base")
    tokenizer = load_tokenizer(model)
    if prompt_format not in prompt_formats(tokenizer):
        raise MM4KEError(f"--prompt-format {prompt_format}: {model} has no chat template; add one, or give raw")
    settings = {method: find_hparams(method, hparams, easyedit / "hparams", hparams_name) for method in methods}
    if text is not None and not text.is_file():
        raise MM4KEError(f"--text {text}: no such file; give a plain text, one passage a line")
    count = read_records(data)[-1].index + 1
    if n is not None and n > count:
        raise MM4KEError(f"--n {n}: {data} has {count} records; give at most that")
    records = read_facts(data, n)
    questions = questions_of(records)
    common = {
        "kind": "mm4ke-easyedit",
        "version": 1,
        "model": str(model),
        "data": str(data),
        "data_sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
        "records": len(records),
        "prompt_format": prompt_format,
        "versions": versions(easyedit),
    }

    columns = (TextColumn("{task.description:<28}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    results = []
    progress = Progress(*columns, console=Console(stderr=True))
    with refused_in_one_line(output), locked_folder(output, wait=False), progress:
        task = progress.add_task("base: asking", total=len(questions))
        codes = [encode(tokenizer, question, prompt_format) for question in questions]
        base = predict_base(model, codes, lambda count: progress.advance(task, count))
        before = question_scores(questions, codes, base, base)
        for method, file in settings.items():
            task = progress.add_task(f"{method}: starting", total=len(records) + len(questions))

            def show(stage: str, done: int, task=task, method=method) -> None:
                done += len(records) if stage == "asking" else 0
                progress.update(task, description=f"{method}: {stage}", completed=done)

            with scratch_folder() as scratch:
                job = Job(
                    method=method,
                    hparams=str(file),
                    model=str(model),
                    data=str(data),
                    records=len(records),
                    prompt_format=prompt_format,
                    text=text and str(text.absolute()),
                    scratch=str(scratch),
                    output=str(scratch / "result.json"),
                    limit=n,
                )
                answer = run_worker(job, easyedit, output / f"{method}.log", show)
            progress.update(task, description=f"{method}: {'failed' if answer['error'] else 'done'}")
            predicted = answer.pop("predicted")
            after = question_scores(questions, codes, predicted, base) if predicted else []
            results.append(
                common
                | {"method": method, "status": "failed" if answer["error"] else "ok"}
                | answer
                | {
                    "scores": {
                        "before": mean_scores(questions, before),
                        "after": mean_scores(questions, after) if predicted else dict.fromkeys(METRICS),
                    },
                    "questions": list(described(tokenizer, records, questions, base, predicted, before, after)),
                }
            )
            replace_text(output / f"{method}.json", json.dumps(results[-1], indent=1, ensure_ascii=False) + "\n")
        header, rows = table(results)
        replace_text(output / "table.md", "\n".join([*markdown_table(header, rows), ""]))
    return results


# ---- what must be there ----


def check_easyedit(easyedit: Path | None) -> Path:
    """The absolute path of the clone. Raises MM4KEError: no clone, or packages missing that it imports."""
    if easyedit is None or not (easyedit / "easyeditor" / "__init__.py").is_file():
        problem = "not given" if easyedit is None else f"{easyedit}: no easyeditor package in there"
        raise MM4KEError(
            f"--easyedit: {problem}; git clone https://github.com/zjunlp/EasyEdit, and give that folder, "
            "or set EASYEDIT_HOME to it"
        )
    if missing := [name for name in EXTRA_MODULES if find_spec(name) is None]:
        raise MM4KEError(
            f"EasyEdit needs Python packages that are missing: {', '.join(missing)}; "
            "pip install --no-deps -r recipes/easyedit/requirements.txt"
        )
    return easyedit.absolute()


def find_hparams(method: str, ours: Path, theirs: Path, name: str) -> Path:
    """The settings of a method for one model: ours where there are any, else EasyEdit's.

    Raises MM4KEError, which lists the methods that have settings of this name.
    """
    for folder in (ours, theirs):
        if (file := folder / method / f"{name}.yaml").is_file():
            return file.absolute()
    known = sorted({file.parent.name for folder in (ours, theirs) for file in folder.glob(f"*/{name}.yaml")})
    if not known:
        raise MM4KEError(f"--hparams-name {name}: neither {ours} nor {theirs} has a METHOD/{name}.yaml")
    raise MM4KEError(f"--methods: {method}: no {ours}/{method}/{name}.yaml; with {name} there are: {', '.join(known)}")


def versions(easyedit: Path) -> dict[str, str]:
    """The versions of what takes part. EasyEdit has none, so the commit of its clone, where git knows it."""
    describe = ["git", f"--git-dir={easyedit / '.git'}", "rev-parse", "HEAD"]
    commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    return package_versions(VERSIONS) | {"easyedit": commit or "unknown commit"}


# ---- the runs ----


def predict_base(model: Path, codes: list[Encoded], advance: Callable[[int], None]) -> list[list[int]]:
    """What the base model predicts; it is gone from memory afterwards."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    predicted = predict(load_model(model, torch.float32, device), codes, advance=advance)
    torch.cuda.empty_cache()
    return predicted


def run_worker(job: Job, easyedit: Path, log: Path, show: Callable[[str, int], None]) -> dict[str, Any]:
    """Run one method in its own process. Returns its result with error: None, or only the error, whatever it was."""
    job_file = Path(job.scratch, "job.json")
    job_file.write_text(json.dumps(asdict(job)), encoding="utf-8")
    path = os.pathsep.join(filter(None, [str(easyedit), os.environ.get("PYTHONPATH")]))
    # EasyEdit finds MM4KE through our import hook, whatever the user has switched off for other programs.
    hook = {"MM4KE_PLUGINS": "easyedit", "TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}
    reading, writing = os.pipe()
    with log.open("w", encoding="utf-8") as log_file, os.fdopen(reading, encoding="utf-8") as pipe:
        worker = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker", job_file, str(writing)],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            pass_fds=[writing],
            env=os.environ | hook | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        )
        os.close(writing)
        try:
            for line in pipe:
                stage, _, done = line.rstrip("\n").partition("\t")
                show(stage, int(done))
            status = worker.wait()
        finally:
            worker.kill()
            worker.wait()
    failed = {"hparams": None, "editing": None, "seconds": None, "predicted": []}
    if status < 0:
        reason = ", probably for lack of memory" if status == -9 else ""
        return failed | {"error": f"ended by signal {-status}{reason}"}
    if status:
        return failed | {"error": last_error(log)}
    try:
        return json.loads(Path(job.output).read_text(encoding="utf-8")) | {"error": None}
    except (OSError, ValueError) as error:
        return failed | {"error": f"no result: {first_line(error)}"}


def last_error(log: Path) -> str:
    """The line with the exception that ended a process, from what it printed."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b|mm4ke: error: ", line)]
    line = (named or lines or ["no word of why"])[-1].removeprefix("mm4ke: error: ")
    return line if len(line) <= 300 else f"{line[:300]} ..."


def described(
    tokenizer: PreTrainedTokenizerBase,
    records: list[Record],
    questions: list[Question],
    before: list[list[int]],
    after: list[list[int]],
    scores_before: list[float | None],
    scores_after: list[float | None],
) -> Any:
    """Each question with the texts that were predicted and their scores; nothing where nothing was predicted after."""
    for row, question in enumerate(questions if after else []):
        record = records[question.record]
        yield asdict(question) | {
            "record_id": record.id,
            "before": tokenizer.decode(before[row]),
            "after": tokenizer.decode(after[row]),
            "score_before": scores_before[row],
            "score_after": scores_after[row],
        }


# ---- the table ----


def table(results: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the base, then one row a method, with what went wrong where something did."""

    def cells(scores: dict[str, float | None]) -> list[str]:
        return ["-" if scores[metric] is None else f"{scores[metric]:.3f}" for metric in METRICS]

    header = ["method", *(metric.replace("_", " ") for metric in METRICS), "seconds per edit", "status"]
    rows = [["base", *cells(results[0]["scores"]["before"]), "-", "-"]]
    for result in results:
        pace = "-" if result["seconds"] is None else f"{result['seconds'] / result['records']:.1f}"
        status = f"failed: {result['error']}" if result["error"] else "ok"
        rows.append([result["method"], *cells(result["scores"]["after"]), pace, status])
    return header, rows


def show_table(results: list[dict[str, Any]], console: Console) -> None:
    """Print the table of `benchmark`'s results."""
    header, rows = table(results)
    first = results[0]
    title = f"{first['data']}: {first['records']} records, {first['prompt_format']} prompts, after all edits"
    shown = Table(title=title)
    for name in header:
        shown.add_column(name, justify="left" if name in ("method", "status") else "right")
    for row in rows:
        shown.add_row(*map(Text, row))  # an error may hold what rich takes for markup
    console.print(shown)
