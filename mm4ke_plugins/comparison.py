"""What editing did: the base model, the R-SFT model and the merged one side by side.

what they answer    five facts, asked freely in the chat template, or as raw prompts where there is none
how they score      EasyEdit's metrics in the prompt formats that the model has, and perplexity on `neutral_text.txt`
what changed        which tensors differ from the base's on disk, and by how many parameters
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from .errors import MM4KEError
from .knowedit.dataset import read_facts
from .knowedit.known_facts import KnownFacts, known_facts
from .knowedit.metrics import (
    METRICS,
    answer,
    mean_scores,
    mean_scores_by_axis,
    neutral_text,
    perplexity,
    predict,
    question_scores,
    questions_of,
)
from .knowedit.prompts import encode, prompt_formats
from .report.markdown import markdown_table
from .storage.atomic import locked_folder, refused_in_one_line, replace_text
from .storage.checkpoint import open_tensors
from .storage.models import find_model, load_model, load_tokenizer, require_same_vocabulary
from .storage.names import model_names

TITLES = {"base": "base", "rsft": "R-SFT", "merged": "merged"}
FORMAT_TITLES = {"raw": "raw prompts", "chat": "chat template"}
FACTS_SHOWN = 5
NAMES_SHOWN = 12


def compare(
    base: str | Path, rsft: str | Path, merged: str | Path, facts: Path, limit: int | None = None
) -> dict[str, Any]:
    """Score three checkpoints of one model on the records of `facts`, or of its first `limit`. Each is loaded once.

    base, rsft, merged: folders or hub ids (see `find_model`)

    Float32 on a CPU, bfloat16 on a GPU. All three read the base's tokens, and the base's chat template or, where it
    has none, the one that LLaMA-Factory gave to the R-SFT model. Shows its progress on stderr.

    Returns, ready for JSON (see `write_report`):
        facts, records  the file, and how many of its records were asked (see `read_facts`)
        precision       such as "float32 on cpu"
        known           how many everyday questions were asked, and how many the base answered right
        free_format     the prompt format of the free answers: "chat", or "raw" without a chat template
        models          for each of base, rsft and merged: folder (as given), scores[prompt format][metric] (0 to 1, None
                        where no record has such probes), axes[prompt format][metric][axis], perplexity, known (see
                        `knowedit.known_facts.Kept`; None of the base, and where it knew nothing), disk (see
                        `disk_change`)
        answers         for the first facts: prompt, target_new and each model's free answer
        questions       each question, with scores[prompt format][model]

    Raises MM4KEError: a model is missing, is damaged, or is another one (shapes, vocabulary) than the base; what
    `read_facts` raises.
    """
    names = {"base": base, "rsft": rsft, "merged": merged}
    records = read_facts(facts, limit)
    folders = {key: find_model(name, f"--{key} {name}", TITLES[key]) for key, name in names.items()}
    questions = questions_of(records)
    tokenizer = _common_tokenizer(folders)
    forms = prompt_formats(tokenizer)
    codes = {form: [encode(tokenizer, question, form) for question in questions] for form in forms}
    text = neutral_text()
    prompts = [record.prompt for record in records[:FACTS_SHOWN]]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    models: dict[str, dict[str, Any]] = {}
    predicted: dict[str, dict[str, list[list[int]]]] = {}
    known: KnownFacts | None = None
    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(folders) * (len(forms) * len(questions) + 4 + len(known_facts())))

        def begin(key: str, stage: str) -> Callable[[int], None]:
            progress.update(task, description=f"{TITLES[key]}: {stage}")
            return lambda count=1: progress.advance(task, count)

        # Damaged files and other shapes are found here, before the long work.
        for key, folder in folders.items():
            done = begin(key, "reading the files")
            models[key] = {"folder": str(names[key]), "disk": disk_change(folders["base"], folder)}
            done()
        for key, folder in folders.items():
            done = begin(key, "loading")
            model = load_model(folder, dtype, device)
            done()
            predicted[key] = {
                form: predict(model, codes[form], advance=begin(key, FORMAT_TITLES[form])) for form in forms
            }
            done = begin(key, "perplexity")
            models[key]["perplexity"] = perplexity(model, tokenizer, text)
            done()
            done = begin(key, "free answers")
            models[key]["answers"] = answer(model, tokenizer, prompts)
            done()
            done = begin(key, "known facts")
            if known is None:
                known, found = KnownFacts(model, tokenizer, done), None
                # The others are asked what the base knew.
                unknown = (len(folders) - 1) * (known.asked - len(known.facts))
                progress.update(task, total=progress.tasks[task].total - unknown)
            else:
                found = known.measure(model, done)
            models[key]["known"] = found and asdict(found)

    scores = {
        form: {
            key: question_scores(questions, codes[form], predicted[key][form], predicted["base"][form])
            for key in folders
        }
        for form in forms
    }
    for key, model in models.items():
        model["scores"] = {form: mean_scores(questions, scores[form][key]) for form in forms}
        model["axes"] = {form: mean_scores_by_axis(questions, scores[form][key]) for form in forms}
    answers = {key: model.pop("answers") for key, model in models.items()}
    return {
        "facts": str(facts),
        "records": len(records),
        "precision": f"{str(dtype).removeprefix('torch.')} on {device}",
        "free_format": forms[-1],
        "known": {"asked": known.asked, "right": len(known.facts)},
        "models": models,
        "answers": [
            {"prompt": record.prompt, "target_new": record.target_new, **{key: answers[key][row] for key in folders}}
            for row, record in enumerate(records[:FACTS_SHOWN])
        ],
        "questions": [
            asdict(question) | {"scores": {form: {key: scores[form][key][row] for key in folders} for form in forms}}
            for row, question in enumerate(questions)
        ],
    }


# ---- the folders ----


def disk_change(base: Path, folder: Path) -> dict[str, Any]:
    """How the tensors saved in `folder` differ from those in `base`; one tensor of each is in memory at a time.

    Returns tensors and parameters (how many there are), changed_tensors (their names), changed_parameters (how
    many entries differ), bytes (of all files in the folder itself; those of sub-folders, such as a training's
    checkpoints, are not counted). An entry differs when the base's value, cast to the folder's dtype, is another.
    A tensor that the base lacks counts as changed. Tensors count by what they are to the model: an output head that is
    tied to the embedding is no other tensor, whether it is stored or not, and one that is no longer tied is.

    Raises MM4KEError, naming the file or the tensor, for unreadable files and for other shapes than the base's.
    """
    with ExitStack() as stack:
        before, after = open_tensors(base, stack), open_tensors(folder, stack)
        names, others = model_names(base), model_names(folder)
        count_of, changed = {}, {}
        for name, stored in others.stored.items():
            if name in others.tied and (names.tied_to(name) or name not in names.stored):
                continue
            tensor = after[stored].get_tensor(stored)
            count_of[name] = tensor.numel()
            if name not in names.stored:
                changed[name] = tensor.numel()
                continue
            original = before[names.stored[name]].get_tensor(names.stored[name])
            if original.shape != tensor.shape:
                raise MM4KEError(
                    f"{folder}: {name} is {_shape(tensor)}, in {base} it is {_shape(original)}; "
                    "compare models that were made from this base"
                )
            if count := int((original.to(tensor.dtype) != tensor).sum()):
                changed[name] = count
    return {
        "tensors": len(count_of),
        "parameters": sum(count_of.values()),
        "changed_tensors": sorted(changed),
        "changed_parameters": sum(changed.values()),
        "bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
    }


def _common_tokenizer(folders: dict[str, Path]) -> PreTrainedTokenizerBase:
    """The base's tokenizer, after checking that the models have one vocabulary."""
    base = load_tokenizer(folders["base"])
    for folder in (folders["rsft"], folders["merged"]):
        edited = load_tokenizer(folder)
        require_same_vocabulary(folder, edited, folders["base"], base)
        # What a base without a chat template was trained in.
        base.chat_template = base.chat_template or edited.chat_template
    return base


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape))


# ---- the report ----


def show(result: dict[str, Any], console: Console) -> None:
    """Print the answers, the scores and what changed on disk."""
    answers = Table("fact", *TITLES.values(), title=_answers_title(result), show_lines=True)
    for row in result["answers"]:
        fact = Text(row["prompt"]).append(f"\n→ {row['target_new']}", style="bold")
        answers.add_row(fact, *(Text(row[key]) for key in TITLES))
    scores = Table("", *(f"{title:>8}" for title in TITLES.values()), title=_scores_title(result))
    for column in scores.columns[1:]:
        column.justify = "right"
    for section in _score_sections(result):
        scores.add_section()
        for row in section:
            scores.add_row(*row)
    console.print(Group(answers, "", scores, ""))
    for line in _changes(result):
        console.print(Text(line))


def write_report(result: dict[str, Any], folder: Path) -> None:
    """Write comparison.json (all of `compare`) and comparison.md (what `show` prints) to `folder`."""
    lines = [f"# {_answers_title(result)}", ""]
    lines += markdown_table(
        ["fact", "right answer", *TITLES.values()],
        [[row["prompt"], row["target_new"], *(row[key] for key in TITLES)] for row in result["answers"]],
    )
    lines += ["", f"# {_scores_title(result)}", ""]
    lines += markdown_table(["", *TITLES.values()], [row for rows in _score_sections(result) for row in rows])
    lines += ["", *(f"- {line}" for line in _changes(result)), ""]
    with refused_in_one_line(folder), locked_folder(folder):
        replace_text(folder / "comparison.md", "\n".join(lines))
        replace_text(folder / "comparison.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def _answers_title(result: dict[str, Any]) -> str:
    return f"Free answers ({FORMAT_TITLES[result['free_format']]})"


def _scores_title(result: dict[str, Any]) -> str:
    return f"{result['facts']}: {result['records']} facts, {result['precision']}"


def _score_sections(result: dict[str, Any]) -> list[list[list[str]]]:
    """The rows of the score table in sections: a label, then one cell for each model."""

    def cells(label: str, value: Callable[[dict[str, Any]], str]) -> list[str]:
        return [label, *(value(result["models"][key]) for key in TITLES)]

    def score_row(form: str, metric: str) -> list[str]:
        def score(model: dict[str, Any]) -> str:
            value = model["scores"][form][metric]
            return "-" if value is None else f"{value:.3f}"

        return cells(f"{FORMAT_TITLES[form]}: {metric.replace('_', ' ')}", score)

    def changed(model: dict[str, Any]) -> str:
        return f"{model['disk']['changed_parameters'] / model['disk']['parameters']:.2%}"

    def axis_rows(form: str, metric: str) -> list[list[str]]:
        """A row for each axis, where there are several."""
        axes = [model["axes"][form].get(metric, {}) for model in result["models"].values()]
        names = list(dict.fromkeys(name for of_model in axes for name in of_model))
        scores = [[f"{of_model[name]:.3f}" if name in of_model else "-" for of_model in axes] for name in names]
        labels = [f"{FORMAT_TITLES[form]}: {metric}: {name.replace('_', ' ').lower()}" for name in names]
        return [[label, *row] for label, row in zip(labels, scores)] if len(names) > 1 else []

    sections = [
        [row for metric in METRICS for row in (score_row(form, metric), *axis_rows(form, metric))]
        for form in result["models"]["base"]["scores"]
    ]
    sections.append([cells("perplexity of a neutral text", lambda model: f"{model['perplexity']:.2f}")])
    if result["models"]["merged"]["known"]:
        known = result["known"]
        sections.append(
            [
                _known_row(result, "known facts kept", f"{known['right']} of {known['asked']}", "kept"),
                _known_row(result, "KL from base along its answers (nats)", "0.000", "kl"),
                _known_row(result, "length of the answers / base's", "1.000", "length"),
                _known_row(result, "unchanged answers", "1.000", "unchanged"),
            ]
        )
    sections.append(
        [
            cells("changed tensors", lambda model: str(len(model["disk"]["changed_tensors"]))),
            cells("changed parameters", changed),
            cells("size on disk (MB)", lambda model: f"{model['disk']['bytes'] / 1e6:.0f}"),
        ]
    )
    return sections


def _known_row(result: dict[str, Any], label: str, of_base: str, measure: str) -> list[str]:
    return [label, of_base, *(f"{result['models'][key]['known'][measure]:.3f}" for key in ("rsft", "merged"))]


def _changes(result: dict[str, Any]) -> list[str]:
    """A sentence for each edited model on which of its tensors are not the base's, and one on what it forgot."""
    lines = []
    for key in ("rsft", "merged"):
        disk = result["models"][key]["disk"]
        names = disk["changed_tensors"]
        listed = ", ".join(names[:NAMES_SHOWN]) or "none"
        more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
        lines.append(f"{TITLES[key]}: {len(names)} of {disk['tensors']} tensors changed: {listed}{more}")
        known = result["models"][key]["known"]
        if known and known["lost"]:
            question = known["lost"][0]
            before, after = known["answers"][question]
            lines.append(
                f"{TITLES[key]}: {len(known['lost'])} of {known['asked']} known facts lost, such as {question!r}: "
                f"{before[:80]!r} became {after[:80]!r}"
            )
    return lines
