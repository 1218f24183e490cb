"""The choice of weight and density without training or merging again (`mm4ke sweep`).

The base model is loaded once, the edit is put on it with one weight and density after the other (`delta/live.py`), and
each time the model is asked the facts, and reads a neutral text and what the base answers to everyday questions.
Records with an even index decide, those with an odd one confirm: a grid's best point is always a bit lucky on the
records that it was picked by.

    edit_success ... locality    knowedit/metrics.py; locality is the share of the base's predictions that stay
    kl                           KL(base || edited), the mean over the tokens of a neutral text, in nats
    perplexity                   of the same text
    known_kl                     KL(base || edited), the mean over the tokens of the base's right answers, in nats
    known_kept                   the share of these answers that are right still; of three points, as asking is slow

The rule. A point can be picked if it keeps `keep` of R-SFT's edit success, that is, of the one at weight 1 and density
1. Of these points those count that no other one beats in locality and KL both (the Pareto front). Among them locality
decides first: those count whose locality is not more than one standard error below the highest. Of these the one with
the lowest KL is picked. The KL is `known_kl`, which is of what users notice, and `kl` where the base answered no
everyday question right. The standard error is that of the mean difference between the two points, record by record, and
the rule the one-standard-error rule of Breiman et al. (1984): without it, one token of one record outweighs a KL that is
a third lower. Without locality probes the KL decides.

What is not measured. Edit success is asked first, with a fifth of the questions or so. A point that loses too much of
it can't be picked, whatever else it scores, so it is asked no more (`hopeless`). Two hopeless weights in a row, and
the lower ones at this density are left out; two densities in a row with nothing but hopeless weights, and the lower
ones are left out too (`skipped`). That supposes that edit success falls with weight and with density. It does, up to
noise, hence the second one; but nothing proves it, and weights above 1, which may overshoot, don't count.

Where an edit has changed several layers, the grid is the same for all of them first. Then, layer by layer, other
weights and after these other densities of the grid are tried for this layer alone, and one that is better is kept. One
round of this coordinate descent has (weights + densities) points a layer; the grid of all layers would have as many
factors as there are layers.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from ..delta.folders import extract
from ..delta.format import KnowledgeDelta, load_delta
from ..delta.live import LiveDelta
from ..errors import MM4KEError
from ..knowedit.dataset import read_facts
from ..knowedit.metrics import neutral_text
from ..knowedit.prompts import prompt_formats
from ..merging.choice import choose
from ..storage.atomic import scratch_folder
from ..storage.models import find_model, load_model, load_tokenizer, require_model_folder, require_same_vocabulary
from ..storage.tensors import FLOATS
from .measure import Evaluator
from .points import DEFAULT, DENSITIES, HALVES, KEEP, RSFT, WEIGHTS, Point, Row, title

GIVE_UP_AFTER = 2


def sweep(
    base: str | Path,
    edited: Path,
    facts: Path,
    *,
    limit: int | None = None,
    keep: float = KEEP,
    weights: Sequence[float] = WEIGHTS,
    densities: Sequence[float] = DENSITIES,
    prompt_format: str | None = None,
    early_stop: bool = True,
    per_layer: bool = True,
) -> dict[str, Any]:
    """Measure the grid of weights and densities and pick a point. Shows its progress on stderr.

    base:       a folder or a hub id (see `find_model`)
    edited:     the folder of R-SFT's model, or an unfinished knowledge delta
    limit:      use only the first so many records of `facts`, of which duplicates are then left out (`read_facts`)
    keep:       the share of R-SFT's edit success that a point must keep
    prompt_format: "chat" or "raw"; by default "chat" where the base, or the edited folder, has a chat template
    early_stop: False measures every point, for complete figures
    per_layer:  False picks one weight and density for all layers

    The model has the dtype of the base's tensors, as a merged one would; it is on a GPU where there is one.

    Returns, ready for JSON:
        base, edited, facts, prompt_format, precision, keep
        records     how many are in each half
        required    the edit success that a point needs, on the half that decides
        deciding_kl "known_kl" or "kl"
        layers      the name of the list of layers, and the numbers of those that the edit changed
        untouched   the base's Row; points: a Row for each point. See `Row`
        picked, rsft, default: the Rows of these points, with the scores of both halves

    Raises MM4KEError: a number out of range, fewer than two records, what `read_facts`, `extract`, `load_delta` and
    `LiveDelta` raise (a base that the edit was not made from, an edit that equals it), a finished delta, an edit that
    does not know the facts better than the base, no point that keeps enough.
    """
    weights, densities = _checked_grid(keep, weights, densities)
    records = read_facts(facts, limit)
    if len(records) < 2:
        raise MM4KEError(f"{facts}: 1 record; give at least 2, one half decides and the other confirms")
    folder = find_model(base, f"--base {base}", "base")
    tokenizer = load_tokenizer(folder)
    if not tokenizer.chat_template and (edited / "config.json").is_file():
        tokenizer.chat_template = load_tokenizer(edited).chat_template  # what the facts were trained in
    prompt_format = prompt_format or prompt_formats(tokenizer)[-1]
    if prompt_format == "chat" and not tokenizer.chat_template:
        raise MM4KEError(f"{base}: the tokenizer has no chat template; add one, or use --prompt-format raw")

    with scratch_folder() as aside:
        delta = _delta(folder, tokenizer, edited, aside)
        dtype = FLOATS[next(iter(delta.manifest.tensors.values())).base_dtype]
        model = load_model(folder, dtype, "cuda" if torch.cuda.is_available() else "cpu")
        live = LiveDelta(model, delta)
    text = neutral_text()
    columns = TextColumn("{task.description:<34}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        evaluator = Evaluator(live, tokenizer, records, prompt_format, text, progress)
        try:
            return {
                "base": str(base),
                "edited": str(edited),
                "facts": str(facts),
                "records": {half: len(records[place::2]) for place, half in enumerate(HALVES)},
                "prompt_format": prompt_format,
                "precision": f"{str(dtype).removeprefix('torch.')} on {model.device.type}",
                "keep": keep,
                "layers": {"name": evaluator.layers_name, "numbers": sorted(evaluator.names_of)},
                **_choose(evaluator, weights, densities, keep, early_stop, per_layer, f"{edited} on {facts}"),
            }
        finally:
            live.remove()


def _checked_grid(
    keep: float, weights: Sequence[float], densities: Sequence[float]
) -> tuple[list[float], list[float]]:
    """Weights and densities, each once, the highest first."""
    if not 0 < keep <= 1:
        raise MM4KEError(f"--keep {keep}: give a share above 0, up to 1 (default {KEEP})")
    for option, numbers in (("--weights", weights), ("--densities", densities)):
        if not numbers:
            raise MM4KEError(f"{option}: none given; give numbers with commas, such as 0.6,0.8,1")
    for weight in weights:
        choose(weight, None)
    for density in densities:
        choose(None, density)
    return sorted(set(weights), reverse=True), sorted(set(densities), reverse=True)


def _delta(base: Path, tokenizer: PreTrainedTokenizerBase, edited: Path, aside: Path) -> KnowledgeDelta:
    """The unfinished delta that `edited` is, or that leads from the base's folder to it."""
    if not edited.exists():
        raise MM4KEError(f"--edited {edited}: no such file; give the folder of R-SFT's model, or a knowledge delta")
    if edited.is_dir():
        require_model_folder(edited, f"--edited {edited}", "edited")
        require_same_vocabulary(edited, load_tokenizer(edited), base, tokenizer)
        extract(base, edited, aside / "edit.safetensors")
        return load_delta(aside / "edit.safetensors")
    delta = load_delta(edited)
    if applied := delta.manifest.applied:
        raise MM4KEError(
            f"{edited}: is finished (weight {applied.weight:g}, density {applied.density:g}), so there is nothing to "
            "choose; give an unfinished delta, or the folder of R-SFT's model"
        )
    return delta


# ---- choosing ----


class Search:
    """The points measured so far, and which of them keep enough.

    required:    the edit success that a point needs
    deciding_kl: the field of a row that has the KL of the rule
    """

    def __init__(
        self, evaluator: Evaluator, references: Iterable[Row], required: float, deciding_kl: str, early_stop: bool
    ):
        self.evaluator, self.required, self.early_stop = evaluator, required, early_stop
        self.deciding_kl = deciding_kl
        self.rows = {row.point: row for row in references}

    def try_in_turn(self, points: Sequence[Point], layer: int | None = None) -> bool:
        """Measure points, the most of the edit first, until some in a row are hopeless. Whether any keeps enough.

        layer: the one whose weight or density falls; None for all
        """
        hopeless, found = 0, False
        for place, point in enumerate(points):
            if hopeless == GIVE_UP_AFTER and self.early_stop:
                self.skip(points[place:])
                break
            enough = self._measure(point).edit_success >= self.required
            found |= enough
            if (point.weight if layer is None else point.of_layer(layer)[0]) <= 1:
                hopeless = 0 if enough else hopeless + 1
        return found

    def skip(self, points: Sequence[Point]) -> None:
        """Leave points out, unless they are measured already."""
        self.evaluator.plan(-len(points))
        for point in points:
            self.rows.setdefault(point, Row(point, state="skipped"))

    def _measure(self, point: Point) -> Row:
        if point not in self.rows or self.rows[point].state == "skipped":
            self.rows[point] = self.evaluator.measure(point, self.required if self.early_stop else -math.inf)
        else:
            self.evaluator.plan(-1)
        return self.rows[point]

    def able(self) -> list[Row]:
        """The rows that can be picked."""
        return [
            row
            for row in self.rows.values()
            if row.in_grid
            and None not in (row.kl, getattr(row, self.deciding_kl))
            and row.edit_success >= self.required
        ]

    def rank(self, row: Row) -> tuple[float, float]:
        """(locality, -KL) of a row that can be picked: the larger, the better."""
        return row.locality, -getattr(row, self.deciding_kl)

    def front(self) -> list[Row]:
        """The rows that can be picked and that no other one of these beats in locality and KL."""
        able = [(row, self.rank(row)) for row in self.able()]
        return [row for row, rank in able if not any(_beats(other, rank) for _, other in able)]

    def best(self) -> Row:
        """The row that the rule picks. Raises MM4KEError where none keeps enough."""
        if front := self.front():
            highest = max(front, key=self.rank)
            return max((row for row in front if _is_as_local(row, highest)), key=lambda row: self.rank(row)[1])
        best = max((row for row in self.rows.values() if row.in_grid), key=lambda row: row.edit_success)
        raise MM4KEError(
            f"no point of the grid keeps the edit success of {self.required:.3f} that is asked for; the best has "
            f"{best.edit_success:.3f} ({title(best.point)}): give higher --weights or --densities, or a lower --keep"
        )


def _choose(
    evaluator: Evaluator,
    weights: list[float],
    densities: list[float],
    keep: float,
    early_stop: bool,
    per_layer: bool,
    edit: str,
) -> dict[str, Any]:
    """Measure the points and pick one. edit: what an error calls the edited model and its facts."""
    evaluator.plan(2 + len(weights) * len(densities))
    untouched, rsft, default = evaluator.untouched(), evaluator.measure(RSFT), evaluator.measure(DEFAULT)
    if rsft.edit_success <= untouched.edit_success:
        raise MM4KEError(
            f"{edit}: edit success {rsft.edit_success:.3f} at weight 1 and density 1, the base has "
            f"{untouched.edit_success:.3f}; give the facts that the edit was trained on, in its --prompt-format"
        )
    for row in (rsft, default):
        row.in_grid = row.point.weight in weights and row.point.density in densities
    deciding_kl = "kl" if untouched.known_kl is None else "known_kl"
    search = Search(evaluator, (rsft, default), keep * rsft.edit_success, deciding_kl, early_stop)

    barren = 0
    for density in densities:
        points = [Point(weight, density) for weight in weights]
        if barren == GIVE_UP_AFTER and early_stop:
            search.skip(points)
        else:
            barren = 0 if search.try_in_turn(points) else barren + 1
    picked = search.best()

    for layer in sorted(evaluator.names_of) if per_layer and len(evaluator.names_of) > 1 else ():
        evaluator.plan(len(weights) + len(densities))
        _, density = picked.point.of_layer(layer)
        points = [picked.point.with_layer(layer, weight, density) for weight in weights]
        search.try_in_turn(points, layer)
        picked = search.best()
        weight, _ = picked.point.of_layer(layer)
        points = [picked.point.with_layer(layer, weight, density) for density in densities]
        search.try_in_turn(points, layer)
        picked = search.best()

    for row in search.front():
        row.on_front = True
    evaluator.plan(3)
    for row in (rsft, default, picked):
        evaluator.confirm(row)
    return {
        "required": search.required,
        "deciding_kl": deciding_kl,
        "untouched": asdict(untouched),
        "points": [asdict(row) for row in search.rows.values()],
        "picked": asdict(picked),
        "rsft": asdict(rsft),
        "default": asdict(default),
    }


def _beats(other: tuple[float, float], rank: tuple[float, float]) -> bool:
    return other != rank and all(mine >= its for mine, its in zip(other, rank, strict=True))


def _is_as_local(row: Row, highest: Row) -> bool:
    """Whether a row's locality is at most one standard error below the highest."""
    pairs = zip(highest.locality_by_record, row.locality_by_record, strict=True)
    differences = [high - low for high, low in pairs]
    if len(differences) < 2:
        return row.locality == highest.locality
    error = stdev(differences) / math.sqrt(len(differences))
    return fmean(differences) <= error * (1 + 1e-9)  # one record alone makes both equal
