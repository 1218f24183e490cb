"""Editing a model in memory: R-SFT on (prompt, answer) pairs, then the merge with the base, one FFN at a time.

What LLaMA-Factory and mergekit do with checkpoints (`recipes/rsft.yaml`, `recipes/merge.yaml`), for programs that hold
a live model of the transformers library. The same steps in the same order: AdamW without weight decay, a cosine
schedule over visits, gradients clipped to norm 1, the end-of-sequence token as a part of the answer.

`Editor` keeps what one edit must know of the ones before it; `changed_tensors` reads an edit that was made elsewhere.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import PreTrainedModel, get_scheduler

from ..errors import MM4KEError
from ..merging.equations import merge
from ..storage.checkpoint import open_tensors
from ..storage.names import model_names
from ..storage.tensors import equal
from .algorithm import EpochStatistics, LossNotFinite
from .facts import Fact, fact_losses, sample_of
from .forward import FastForward, active_dropout
from .guard import Guard
from .layers import ffn_parameter_names, ffns_of
from .prefix import PREFIX_CACHE_MB
from .settings import Settings
from .subject import learned_tokens
from .visitor import Visitor

MAX_GRAD_NORM = 1.0


def train_facts(
    model: PreTrainedModel,
    names: Sequence[str],
    facts: Sequence[Fact],
    settings: Settings,
    guard: Guard | None = None,
) -> None:
    """R-SFT of the parameters `names` on `facts`, in place, beside a guard if there is one. Shows its progress on stderr.

    The trained parameters should be float32; a model of another dtype around them computes in bfloat16 (autocast).
    Training ends after an epoch without an update. All other parameters stay as they are, gradients are cleared,
    and the model's mode and `requires_grad` flags are put back.

    Raises FloatingPointError, with the number of the fact, when a loss is not finite, and MM4KEError for a fact that
    is longer than the model's texts may be.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for index, fact in enumerate(facts):
        if limit and len(fact.ids) > limit:
            raise MM4KEError(
                f"fact {index} (0-based) has {len(fact.ids)} tokens, and the model reads {limit} "
                "(max_position_embeddings); shorten it or leave it out"
            )
    parameters = dict(model.named_parameters())
    trained = [parameters[name] for name in names]
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    was_training = model.training
    size = settings.facts_per_visit
    mixed = any(parameter.dtype != torch.float32 for parameter in parameters.values())

    samples = [sample_of(fact, model.device) for fact in facts]
    batches = [range(len(facts))[start : start + size] for start in range(0, len(facts), size)]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    schedule = get_scheduler(settings.lr_scheduler_type, optimizer, 0, settings.num_epochs * len(batches))

    def plain_losses(batch: range, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=mixed):
            losses = [fact_losses(model, facts[batch[index]]) for index in indices]
        trained, judged = (torch.cat(parts) for parts in zip(*losses, strict=True))
        return trained, judged

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()

    columns = TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    # Drawn seldom, since the training has use for every core.
    progress = Progress(*columns, console=Console(stderr=True), refresh_per_second=2)
    task = progress.add_task("R-SFT", total=settings.num_epochs * len(facts))
    progress.start()
    try:
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train()
        fast = None
        if not active_dropout(model):
            fast = FastForward(model, min(settings.layers), PREFIX_CACHE_MB * 2**20, autocast=mixed)
        visitor = Visitor(
            fast,
            loss_threshold=settings.loss_threshold,
            steps_per_sample=settings.steps_per_sample,
            guard=guard,
        )
        for epoch in range(settings.num_epochs):
            statistics = EpochStatistics()
            for place, batch in enumerate(batches):
                try:
                    visit = visitor.visit(
                        [samples[index] for index in batch],
                        number=epoch * len(batches) + place,
                        plain_losses=lambda indices, batch=batch: plain_losses(batch, indices),
                        backward=torch.Tensor.backward,
                        step=step,
                        zero_grad=optimizer.zero_grad,
                    )
                except LossNotFinite as error:
                    raise FloatingPointError(f"fact {batch[error.index]} (0-based): {error}") from None
                schedule.step()
                statistics.add(visit)
                converged = f"R-SFT: {statistics.converged} of {statistics.visits} learned"
                progress.update(task, advance=len(batch), description=converged)
            if statistics.updates == 0:
                break
    finally:
        progress.stop()
        model.train(was_training)
        for name, parameter in parameters.items():
            parameter.requires_grad_(flags[name])
            if name in names:
                parameter.grad = None


@dataclass(frozen=True)
class _Edit:
    """What one call left: the R-SFT parameters, in float32, and what was put into the model, in its dtypes."""

    trained: dict[str, torch.Tensor]
    merged: dict[str, torch.Tensor]


class Editor:
    """R-SFT and merge of one live model, again and again.

    Every call trains further from where R-SFT stood, not from the merged parameters, and merges with the base of the
    first call. Merging a merged model would scale the earlier edits by `weight` each time, until they are gone.

    Whether earlier edits still count is seen from the model: where its parameters are those that the last call left,
    training goes on; where they are those from before that call, it was rolled back, and does not count; where they
    are any others, they are a new base.
    """

    def __init__(self) -> None:
        self.base: dict[str, torch.Tensor] = {}
        self.guard: tuple[tuple, Guard] | None = None  # the last one, and what it was made for
        self.edits: list[_Edit] = []  # the last one and the one before it, to which one can roll back

    def edit(
        self,
        model: PreTrainedModel,
        facts: Sequence[Fact],
        settings: Settings,
        guard_texts: Sequence[Sequence[int]] = (),
    ) -> dict[str, torch.Tensor]:
        """Put the facts into the model, in place: nothing but the FFN of the chosen layers changes.

        guard_texts: with `guard_weight`, the tokens of what is to stay as it is in the base: see `guard_texts`

        Returns a copy of the parameters that were trained, by name, as they were before this call.

        Raises MM4KEError (unknown layers or modules, a fact that is too long, an edit that is not finite) and
        FloatingPointError (a loss that is not finite); the model is then as it was before.
        """
        names = ffn_parameter_names(model, list(settings.layers), list(settings.modules), settings.gradient_at)
        parameters = {name: model.get_parameter(name) for name in names}
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._recall(before)
        start = self.edits[-1].trained if self.edits else self.base
        storage = {name: parameter.data for name, parameter in parameters.items()}
        try:
            guard = None
            if settings.guard_weight:
                learned = learned_tokens([fact.ids for fact in facts], [fact.learns for fact in facts])
                guard = self._guard(model, parameters, settings, guard_texts, learned)
            for name, parameter in parameters.items():
                parameter.data = start[name].to(torch.float32, copy=True)
            train_facts(model, names, facts, settings, guard)
            trained = {name: parameter.detach() for name, parameter in parameters.items()}
            merged = {
                name: merge(
                    self.base[name],
                    [trained[name]],
                    [settings.weight],
                    [settings.density],
                    names=[f"base: {name}", f"R-SFT: {name}"],
                )
                for name in names
            }
        finally:
            for name, parameter in parameters.items():
                parameter.data = storage[name]
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(merged[name])
        self.edits = [*self.edits[-1:], _Edit(trained, merged)]
        return before

    def _guard(
        self,
        model: PreTrainedModel,
        parameters: dict[str, torch.nn.Parameter],
        settings: Settings,
        texts: Sequence[Sequence[int]],
        learned: frozenset[int],
    ) -> Guard:
        """The guard of the base, whose parameters are put into the model; that of the last call if it is the same."""
        key = (settings.layers, settings.guard_weight, learned, tuple(map(tuple, texts)))
        if self.guard is None or self.guard[0] != key:
            for name, parameter in parameters.items():
                parameter.data = self.base[name].to(torch.float32, copy=True)
            ffns = ffns_of(model, list(settings.layers))
            self.guard = key, Guard(model, ffns, texts, settings.guard_weight, learned)
        return self.guard[1]

    def _recall(self, current: dict[str, torch.Tensor]) -> None:
        """Keep of the earlier edits those that `current` still has; where it has none, it is the new base."""

        def same(other: dict[str, torch.Tensor]) -> bool:
            return other.keys() == current.keys() and all(torch.equal(other[name], current[name]) for name in current)

        while self.edits and not same(self.edits[-1].merged):
            self.edits.pop()
        if not self.edits and not same(self.base):
            self.base, self.guard = current, None


def changed_tensors(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint that differ from the model's, by name, on the CPU and in the checkpoint's dtypes.

    A tensor differs when the model's, cast to the checkpoint's dtype, holds other numbers. One is in memory at a time,
    beside those that differ. Of tensors that the model ties, one is returned.

    Raises MM4KEError, naming the folder and the tensor: no such folder, an unreadable file, a tensor that only one of
    the two has, another shape, two that the model ties and the checkpoint doesn't.
    """
    if not folder.is_dir():
        raise MM4KEError(f"{folder}: no such folder; give the folder of a merged model, or a knowledge delta")
    state = model.state_dict()
    changed = {}
    with ExitStack() as stack:
        files, names = open_tensors(folder, stack), model_names(folder)
        if missing := [name for name, _ in model.named_parameters() if name not in names.stored]:
            raise MM4KEError(f"{folder}: {missing[0]} is missing; give a merged model that was made from this model")
        parameters = dict(model.named_parameters(remove_duplicate=False))
        firsts: dict[int, str] = {}
        for name, stored in names.stored.items():
            if name not in state:
                raise MM4KEError(
                    f"{folder}: {name} is unknown to {type(model).__name__}; "
                    "give a merged model that was made from this model"
                )
            first = firsts.setdefault(id(parameters.get(name, name)), name)
            if first != name:
                if not names.same(first, name):
                    raise MM4KEError(
                        f"{folder}: unties {name} from {first}, which the model ties; give a merged model that ties them"
                    )
                continue
            tensor, current = files[stored].get_tensor(stored), state[name].cpu()
            if tensor.shape != current.shape:
                raise MM4KEError(
                    f"{folder}: {name} is {tuple(tensor.shape)}, in the model it is {tuple(current.shape)}; "
                    "give a merged model that was made from this model"
                )
            if not equal(current.to(tensor.dtype), tensor):
                changed[name] = tensor
    return changed
